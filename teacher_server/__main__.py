import sys

from teacher_server.cli import main

if __name__ == "__main__":
    # A process that multiprocessing spawns imports its parent's main module again, and finds it by
    # this, unless it is called __main__; without, by its file. See `teacher_server.orphans`.
    __spec__ = None
    sys.exit(main())

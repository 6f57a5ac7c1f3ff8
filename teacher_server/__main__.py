"""The entry of `python -m teacher_server`."""

import sys

from teacher_server.cli import main

if __name__ == "__main__":
    # multiprocessing does not import a main module again whose spec is named __main__, and
    # `teacher_server.orphans` needs it imported; without a spec it is found by its file.
    __spec__ = None
    sys.exit(main())

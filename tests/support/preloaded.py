"""The imports of the process that tests fork others from."""

import gc

import student_trainer.commands.main
import student_trainer.training.recipe  # noqa: F401
import teacher_server.backends.transformers
import teacher_server.cli  # noqa: F401

# What is here stays, so that no forked process searches it for garbage.
gc.collect()
gc.freeze()

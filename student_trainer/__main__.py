"""The entry of `python -m student_trainer`."""

from student_trainer.commands.main import program

program()

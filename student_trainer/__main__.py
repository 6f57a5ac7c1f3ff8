from student_trainer.cli import program

program()

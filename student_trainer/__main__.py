from student_trainer.commands.main import program

program()

"""The commands of `student-trainer`, one file each."""

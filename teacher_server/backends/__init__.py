"""What runs the teacher: one Protocol, one file for each engine."""

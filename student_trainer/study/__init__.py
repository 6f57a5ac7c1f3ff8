"""Run `student-trainer study FILE.yaml`: commands, each run once and compared over seeds."""

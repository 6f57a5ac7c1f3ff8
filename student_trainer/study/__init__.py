"""`student-trainer study FILE.yaml`: public commands, run once each and compared over seeds."""

"""The student: loading, forward pass, output head, and probes of what it can do."""

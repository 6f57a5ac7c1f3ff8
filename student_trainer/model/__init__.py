"""The student model: loading, forward pass, output head, and probes of its abilities."""

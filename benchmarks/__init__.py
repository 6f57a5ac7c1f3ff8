"""Benchmarks: time, memory and accuracy, none of which a test asserts."""

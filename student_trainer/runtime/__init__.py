"""The helpers for terminal, signals, threads and clocks."""

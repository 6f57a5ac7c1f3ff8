"""Terminal, signals, threads and clocks; nothing here knows of models."""

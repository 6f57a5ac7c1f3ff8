"""Flags: what there are, how they are read, and what they may not say together."""

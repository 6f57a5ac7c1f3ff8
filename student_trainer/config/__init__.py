"""The flags: their declarations, their parser, and the checks of their values."""

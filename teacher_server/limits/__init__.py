"""The limits on who may send requests, how many, and in which order they run."""

"""The helpers that several tests share."""

"""The parts of `benchmarks.gpu`, one module each."""


class NotHereError(Exception):
    """A part that this machine cannot run; the message says what it lacks."""

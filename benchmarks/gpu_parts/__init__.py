"""The parts of `benchmarks.gpu`, one module each."""

"""A run: its recipe, the trainer, evaluation, checkpoints and metrics."""

"""The path from rows of a dataset to token ids, in training order and micro-batches."""

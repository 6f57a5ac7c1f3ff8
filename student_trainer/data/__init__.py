"""Rows of a dataset -> token ids, in the order and groups in which they are learned."""

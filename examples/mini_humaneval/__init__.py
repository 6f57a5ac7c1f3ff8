"""The embedded experiment: a HumanEval in miniature, with its tokenizer, models and data."""

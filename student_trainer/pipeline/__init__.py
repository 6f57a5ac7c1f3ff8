"""The pipeline from examples to training targets: completions, their scores, and distributions."""

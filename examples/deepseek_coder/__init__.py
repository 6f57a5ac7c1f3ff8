"""The rows of the example with DeepSeek Coder."""

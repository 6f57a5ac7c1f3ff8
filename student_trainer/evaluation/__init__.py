"""Check and score completions: suites, checkers, the sandbox, pass@k, perplexity."""

"""Answers checked and scored: suites, checkers, the sandbox, pass@k, perplexity."""

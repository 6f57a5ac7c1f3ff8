"""The teacher server: a model behind HTTP that answers with sparse log-probs and generations."""

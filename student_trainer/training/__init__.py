"""What a training run is, beside its steps."""

"""A run directory: its paths, lock, checkpoints, exported model, MLflow store and training data."""

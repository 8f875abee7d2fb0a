"""Training: the Trainer of a recipe, resuming, and the steps after the last optimiser step."""

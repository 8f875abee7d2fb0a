"""Training: the Trainer of a recipe, and what follows its last step."""

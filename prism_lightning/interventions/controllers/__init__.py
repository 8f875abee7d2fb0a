"""Controllers: factors on prototypes, fitted to multiple-choice items."""

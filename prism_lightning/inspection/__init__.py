"""What a person looks at: explanations, prototype cards, labels and tables."""

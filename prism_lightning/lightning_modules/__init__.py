"""Lightning's side: the two modules, their optimiser, metrics and callbacks."""

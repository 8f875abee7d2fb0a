"""What finished runs found, collected: the paper's tables and figures, each cell with the run that produced it."""

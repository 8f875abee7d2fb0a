"""Views for people: explanations, prototype cards, labels, tables and the curvature report."""

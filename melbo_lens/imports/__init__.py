"""How do perturbations come from other tools?  One file for each format."""

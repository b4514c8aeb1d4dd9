"""How do people and other programs talk to a steered model?  In a terminal, and as a model of Inspect."""

"""What does a perturbation change inside the model?  This folder measures it, and makes random controls."""

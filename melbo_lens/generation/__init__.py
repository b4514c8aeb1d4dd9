"""What does the model write under a perturbation?  This folder steers a model and keeps what it writes."""

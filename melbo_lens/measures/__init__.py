"""What does a perturbation change inside?  And with what is that compared."""

"""How is an organism made?  `train` trains it and `card` measures it."""

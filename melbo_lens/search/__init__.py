"""Where to look?  Layers, radii, and the groups of what is found."""

"""Where should one look?  This folder searches layers and radii, and groups what is found."""

"""How does one climb?  Objectives, the constraints that points obey, and two ascents over any of them.  Torch only."""

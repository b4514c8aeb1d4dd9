"""How does one climb?  This folder has objectives, the constraints that points obey, and two ascents; torch only."""

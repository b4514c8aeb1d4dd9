"""How is a run kept?  It is one value, `Findings`, which becomes one folder and one page."""

"""How is a run shown and kept?  One value, one page, one folder."""

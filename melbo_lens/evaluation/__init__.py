"""Do the completions show more than chance?  This folder counts behaviours and tests the counts."""

"""Notebooks to learn from; `python -m demos.build` runs them again."""

"""What does `python -m melbo_lens` do?  It runs the `melbo-lens` command."""

from melbo_lens.cli import main

main()

"""What does `python -m melbo_lens` do?  The same as the `melbo-lens` command."""

from melbo_lens.cli import main

main()

"""How is progress shown?  As tqdm's bar on a terminal, and in a notebook as one line of text that is replaced in place.

tqdm's own bar for notebooks is a widget, of which a saved notebook keeps nothing. A line of text stays as it was last.
"""

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm.std import tqdm

COLUMNS = 90  # of a line in a notebook


class Progress(tqdm):
    """A bar of tqdm; everything but `disable` is as there.

    Args:
        iterable: what is counted, if it is to be gone through.
        disable: shows nothing. False leaves it to the environment, where TQDM_DISABLE=1 silences every bar.
        settings: tqdm's.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, *, disable: bool = False, **settings: Any) -> None:
        if disable:
            settings["disable"] = True
        if _in_notebook():
            # tqdm also moves the cursor and ends lines, which makes no sense there
            settings = {"file": _Nowhere(), "ncols": COLUMNS, "ascii": False, **settings}
        super().__init__(iterable, **settings)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Returns the function that shows a line in place of the one before."""
        return _shown_in_place() if _in_notebook() else tqdm.status_printer(file)


def _shown_in_place() -> Callable[[str], None]:
    from IPython.display import display

    handle: Any = None

    def show(line: str) -> None:
        nonlocal handle
        text = {"text/plain": line}
        if handle is None:
            handle = display(text, raw=True, display_id=True)
        else:
            handle.update(text, raw=True)

    return show


def _in_notebook() -> bool:
    """Whether a kernel runs this, rather than a terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Nowhere(io.TextIOBase):
    def write(self, text: str, /) -> int:
        return len(text)

"""How does a foreign text come to a terminal?  Every character of it is seen, and none is obeyed.

Models, files and servers write what they like: codes that set a title or clear the screen, marks that turn the
direction of writing, and the square brackets that rich takes for markup.
"""

import unicodedata

from rich.text import Text


def harmless(text: object) -> str:
    """Returns a value's text with every character written out that is not seen but obeyed.

    These are control codes and marks of direction. Line ends and tabs stay.
    """
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter)[0] != "C"
        else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def shown(value: object) -> Text:
    """Returns the harmless text of a value for a line or a cell of rich's, in which it is no markup or emoji either."""
    return Text(harmless(value))

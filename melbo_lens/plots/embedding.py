"""How do figures and token views get into a page that opens offline?  They are written as HTML with their libraries.

Each library is included once, and text is escaped so that it can't end a script.
"""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import plotly.graph_objects as go

from melbo_lens.files import write_text

CONFIG = {"responsive": True, "displaylogo": False}
# circuitsvis reserves space below for its hover boxes, which may as well cover what follows, and leaves no gap between
# tokens; these styles change both.
STYLE = (
    "<style>.tokens{background:#fff;color:#111;padding:.5rem;border-radius:.3rem;margin-bottom:1rem;"
    "overflow-wrap:anywhere;color-scheme:light}"
    ".tokens input,.tokens select,.tokens button,.tokens label{color:#111!important;background:#fff!important}"
    ".tokens>div{padding-bottom:0!important}.tokens span>span{padding:3px 2px!important}</style>"
)
ELEMENTS = (None, "ColoredTokens", "ColoredTokensMulti", "TextNeuronActivations", "TokenLogProbs")
TAGS, ATTRIBUTES = {"div", "table", "thead", "tbody", "tr", "th", "td", "span"}, {"style", "title", "scope"}
PLAIN_STYLE = re.compile(r"[\w\s:;.,%()-]*")
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Element:
    """One element of a token view: its name and properties in circuitsvis, and static HTML for where no script runs."""

    heading: str
    name: str | None  # None: static HTML only, no circuitsvis element
    properties: Mapping[str, Any]
    still: str
    note: str = ""

    def html(self) -> str:
        """The element as HTML; circuitsvis draws it where it is loaded, and elsewhere the static HTML is seen."""
        place = f"tokens-{uuid4().hex[:12]}"
        note = f"<p><small>{html.escape(self.note)}</small></p>" if self.note else ""
        body = f'<p><b>{html.escape(self.heading)}</b></p>{note}<div id="{place}" class="tokens">{self.still}</div>'
        if self.name is None:
            return body
        properties = json.dumps(dict(self.properties), allow_nan=False).translate(ESCAPES)
        # a notebook may run a script before it has inserted the element that the script draws into, so we try again
        draw = (
            f'(function draw(tries){{if(typeof CircuitsVis==="undefined")return;if(document.getElementById("{place}"))'
            f'CircuitsVis.render("{place}",CircuitsVis.{self.name},{properties});'
            f"else if(tries)setTimeout(draw,50,tries-1)}})(100)"
        )
        return f"{body}<script>{draw}</script>"


@dataclass(frozen=True)
class TokenView:
    """A view of tokens for a notebook or a page; it makes no network request.

    `view + view` shows both with one copy of the library.
    """

    elements: tuple[Element, ...]

    def html(self, bundle: bool = True) -> str:
        """The view as HTML; `bundle=False` leaves circuitsvis out, for a page that has it already."""
        needed = bundle and any(element.name for element in self.elements)
        return STYLE + (circuitsvis_script() if needed else "") + "".join(element.html() for element in self.elements)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the view as a complete HTML page and returns the path."""
        head = '<head><meta charset="utf-8"><title>tokens</title></head>'
        page = f'<!doctype html><html lang="en">{head}<body>{self.html()}</body></html>'
        write_text(path, page)
        return Path(path)

    def to_json(self) -> list[dict[str, Any]]:
        """The elements as JSON, from which `from_json` makes the same view again."""
        return [{**vars(element), "properties": dict(element.properties)} for element in self.elements]

    @classmethod
    def from_json(cls, elements: Sequence[Mapping[str, Any]]) -> "TokenView":
        """Makes a view from the output of `to_json`.

        Raises:
            ValueError: an element is unlike those of this library, for instance because it holds a script.
        """
        found = []
        for one in elements:
            texts = [one.get(key) for key in ("heading", "still", "note")]
            if (
                one.get("name") not in ELEMENTS
                or not all(isinstance(text, str) for text in texts)
                or not isinstance(one.get("properties"), dict)
            ):
                raise ValueError(
                    f"there is no token view {one.get('name')!r} with such properties: the file is damaged."
                )
            _Allowed().feed(one["still"])
            found.append(Element(one["heading"], one["name"], one["properties"], one["still"], one["note"]))
        return cls(tuple(found))

    def __add__(self, other: "TokenView") -> "TokenView":
        return TokenView(self.elements + other.elements) if isinstance(other, TokenView) else NotImplemented

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return f"TokenView({'; '.join(element.heading for element in self.elements)})"


class _Allowed(HTMLParser):
    """Refuses markup that our own static HTML never contains, so that no file from elsewhere can bring a script."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        styles = [value or "" for name, value in attrs if name == "style"]
        if (
            tag not in TAGS
            or {name for name, _ in attrs} - ATTRIBUTES
            or any(not PLAIN_STYLE.fullmatch(style) for style in styles)
        ):
            raise ValueError(
                f"a token view holds <{tag}> with {attrs}, which none of this library has: the file is damaged."
            )

    def handle_comment(self, data: str) -> None:
        raise ValueError("a token view holds a comment, which none of this library has: the file is damaged.")

    def handle_decl(self, decl: str) -> None:
        self.handle_comment(decl)

    handle_pi = unknown_decl = handle_comment


def circuitsvis_script() -> str:
    """Returns circuitsvis as a script of 1.3 MB that defines `CircuitsVis`.

    Circuitsvis writes tokens as HTML; the script is changed here so that it escapes them first.

    Raises:
        RuntimeError: this version of circuitsvis is built differently, so its text could not be made safe.
    """
    code = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    safe, n_places = re.subn(
        r"dangerouslySetInnerHTML:\{__html:([^{}]+)\}", r"dangerouslySetInnerHTML:{__html:asText(\1)}", code
    )
    if n_places < 4:
        raise RuntimeError(
            f"circuitsvis {version('circuitsvis')} writes tokens in an unknown way: install circuitsvis 1.43.3."
        )
    # it shows a bound of 0 as a bare "0" where the button belongs that sets it again
    safe = re.sub(
        r'(\w+)&&(\w+\.default\.createElement\("button",[^"]+"button",[^"]+"Reset"\))', r"\1!==void 0&&\2", safe
    )
    as_text = 'function asText(text){return String(text).replace(/&/g,"&amp;").replace(/</g,"&lt;")}'
    return f"<script>{as_text}\n" + safe.replace("</script>", "<\\/script>") + "</script>"


def embed(figures: Sequence[go.Figure]) -> list[str]:
    """Returns each figure as HTML; the first one includes plotly.js for all of them.

    Plotly escapes `<`, `>` and `&` in what it writes.
    """
    return [
        figure.to_html(
            full_html=False, include_plotlyjs=i == 0, config=CONFIG, default_height=f"{figure.layout.height or 450}px"
        )
        for i, figure in enumerate(figures)
    ]

"""How does one try vectors by hand?  A widget with menus and a slider shows steered text beside unsteered.

Without ipywidgets, without a kernel and in a saved notebook, a table of a few vectors stands in its place.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from html import escape
from typing import Any

from melbo_lens.arguments import counts, positive, public
from melbo_lens.generation.generate import generate
from melbo_lens.generation.steer import fitting
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.plots.text import for_html
from melbo_lens.prompts import Prompts, tokenize

FEW = 4  # vectors of the table
STILL_SCALES = (0.5, 1.0)
SIGNS = {1: "+", -1: "−"}
SHORT = "white-space:nowrap;text-align:left;vertical-align:top;padding:.3rem .6rem"
CELL = "white-space:pre-wrap;overflow-wrap:anywhere;text-align:left;vertical-align:top;padding:.3rem .6rem"
LABEL = 60  # characters of a prompt in the menu


@public
def explore(
    model: Model,
    prompts: Prompts,
    perturbations: Perturbation,
    *,
    max_new_tokens: int = 48,
    largest_scale: float = 3.0,
) -> "Explorer":
    """Shows what the model writes under one perturbation at a time, beside what it writes without.

    In a notebook this is a widget: a menu for the perturbation, one for the prompt, a sign, and a slider for the scale.
    The model writes anew whenever one of them is changed. Where there is no ipywidgets or no kernel, and in a saved
    notebook, it is a table of a few perturbations, scales and both signs on the first prompt.

    Args:
        model: the model, which is left as it was.
        prompts: text, chats or token ids; each becomes an entry of the menu.
        perturbations: vectors or adapters.
        max_new_tokens: the length at which a text ends, unless the model's end token comes first. A short one answers
            sooner.
        largest_scale: the right end of the slider; its left end, 0, is unsteered.

    Returns:
        The explorer, which shows itself as the last line of a cell.

    Raises:
        TypeError, ValueError: arguments break a rule, or the perturbations don't fit the model. This is raised before
            the model runs.
    """
    counts(max_new_tokens=max_new_tokens)
    positive("largest_scale", largest_scale, "")
    return Explorer(model, prompts, perturbations, max_new_tokens, largest_scale)


class Explorer:
    """Perturbations to be tried by hand, as `explore` makes it; what was written once is kept.

    Attributes:
        prompts: the text of each prompt.
        widgets: the menus, the slider and the output by name (vector, sign, scale, prompt, output), whose `value` can
            also be set by a program; empty if ipywidgets is not installed.
    """

    def __init__(
        self, model: Model, prompts: Prompts, perturbations: Perturbation, max_new_tokens: int, largest_scale: float
    ) -> None:
        host = host_of(model)
        batch = tokenize(host, prompts, n_new_tokens=max_new_tokens)
        self.prompts = batch.texts
        self._ids = [batch.tokens[i : i + 1, :n] for i, n in enumerate(batch.lengths.tolist())]
        self._model, self._perturbations = model, fitting(host, perturbations)
        self._max_new_tokens, self._largest = max_new_tokens, largest_scale
        self._written: dict[tuple[int, int, float], str] = {}  # by `_key`

    def text(self, vector: int = 0, sign: int = 1, scale: float = 1.0, prompt: int = 0) -> str:
        """Returns what the model writes under this perturbation, sign and scale; scale 0 is unsteered.

        Raises:
            IndexError: there is no such perturbation or prompt.
            FloatingPointError: the perturbation makes the logits NaN or infinite.
        """
        self._write(prompt, [vector], [sign], [scale])
        return self._written[_key(prompt, vector, sign * scale)]

    @cached_property
    def widgets(self) -> dict[str, Any]:
        try:
            import ipywidgets
        except ModuleNotFoundError:
            return {}
        word = self._perturbations.word
        said = {"style": {"description_width": "initial"}, "layout": {"max_width": "100%"}}
        made = {
            "vector": ipywidgets.Dropdown(
                options=[(f"{word} {k}", k) for k in range(len(self._perturbations))], description=word, **said
            ),
            "sign": ipywidgets.ToggleButtons(
                options=[(name, sign) for sign, name in SIGNS.items()],
                description="sign",
                style={"button_width": "3rem", "description_width": "initial"},
            ),
            "scale": ipywidgets.FloatSlider(
                value=min(1.0, self._largest),
                min=0.0,
                max=self._largest,
                step=0.05,
                description="scale",
                continuous_update=False,  # the model writes when the slider is let go
                **said,
            ),
            "prompt": ipywidgets.Dropdown(
                options=[(_label(i, text), i) for i, text in enumerate(self.prompts)], description="prompt", **said
            ),
            "output": ipywidgets.HTML(layout={"width": "100%"}),
        }
        for name in ("vector", "sign", "scale", "prompt"):
            made[name].observe(lambda change: self._show(made), "value")
        self._show(made)
        return made

    def html(self) -> str:
        """Returns the table of a few perturbations on the first prompt as HTML, in which all text is escaped."""
        few, word = range(min(FEW, len(self._perturbations))), self._perturbations.word
        rows = [("unsteered", "", self._shown(0, 0, 1, 0.0))]
        with suppress(FloatingPointError):  # then one by one, so that only the text that failed is missing
            self._write(0, few, list(SIGNS), STILL_SCALES)
        rows += [
            (f"{word} {k}", f"{SIGNS[sign]}{scale:g}", self._shown(0, k, sign, scale))
            for k in few
            for sign in SIGNS
            for scale in STILL_SCALES
        ]
        head = "".join(f"<th style='{SHORT}'>{name}</th>" for name in (word, "scale", "text"))
        body = "".join(
            f"<tr><th scope='row' style='{SHORT}'>{who}</th><td style='{SHORT}'>{scale}</td>"
            f"<td dir='auto' style='{CELL}'>{text}</td></tr>"
            for who, scale, text in rows
        )
        rest = len(self._perturbations) - len(few)
        notes = [f"{rest:,} more {word}s are not in this table." if rest else ""]
        if not self.widgets:
            notes.append("For menus and a slider: pip install 'melbo-lens[notebook]'.")
        return (
            f"<p>{for_html(_cut(self.prompts[0], 400))}</p><div style='overflow-x:auto'><table><thead><tr>{head}</tr>"
            f"</thead><tbody>{body}</tbody></table></div><p>{escape(' '.join(filter(None, notes)))}</p>"
        )

    def _write(self, prompt: int, vectors: Sequence[int], signs: Sequence[int], scales: Sequence[float]) -> None:
        """Writes what is not known yet, in one batch."""
        if not 0 <= prompt < len(self.prompts):
            raise IndexError(f"prompt={prompt} was asked for, there are {len(self.prompts)}.")
        steered = [scale for scale in scales if scale]
        multiples = [sign * scale for sign in signs for scale in steered]
        wanted = [k for k in vectors if any(_key(prompt, k, m) not in self._written for m in multiples)]
        if wanted:
            table = self._generated(prompt, self._perturbations[wanted], signs=list(signs), scales=steered)
            for row in table.itertuples():
                self._written[_key(prompt, wanted[int(row.vector)], row.sign * row.scale)] = row.text
        if 0 in scales and _key(prompt, 0, 0) not in self._written:
            self._written[_key(prompt, 0, 0)] = self._generated(prompt, None).text.iloc[0]

    def _generated(self, prompt: int, perturbations: Perturbation | None, **settings: Any) -> Any:
        return generate(
            self._model,
            self._ids[prompt],
            perturbations,
            self._max_new_tokens,
            include_unsteered=perturbations is None,
            include_random=False,
            progress=False,
            **settings,
        ).table

    def _shown(self, prompt: int, vector: int, sign: int, scale: float) -> str:
        """Returns a text as HTML, or the reason why there is none."""
        try:
            return for_html(self.text(vector, sign, scale, prompt))
        except FloatingPointError as error:
            return f"<i>{escape(str(error))}</i>"

    def _show(self, widgets: dict[str, Any]) -> None:
        """Writes what the menus and the slider say, and shows it beside the unsteered text."""
        prompt, vector, sign, scale = (widgets[name].value for name in ("prompt", "vector", "sign", "scale"))
        scale = round(scale, 6)
        title = f"{self._perturbations.word} {vector}, {SIGNS[sign]}{scale:g}"
        columns = (("unsteered", self._shown(prompt, 0, 1, 0.0)), (title, self._shown(prompt, vector, sign, scale)))
        widgets["output"].value = (
            "<div style='display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.5rem'>"
            + "".join(f"<div dir='auto' style='{CELL}'><b>{name}</b>\n{text}</div>" for name, text in columns)
            + "</div>"
        )

    def _repr_mimebundle_(self, **kinds: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {}
        if self.widgets:
            import ipywidgets

            *controls, output = self.widgets.values()
            bundle = dict(ipywidgets.VBox([*controls, output])._repr_mimebundle_() or {})
        return {**bundle, "text/html": self.html(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"Explorer({len(self._perturbations)} {self._perturbations.word}s, {len(self.prompts)} prompts)"


def _key(prompt: int, vector: int, multiple: float) -> tuple[int, int, float]:
    """Returns the name of a text; the unsteered one belongs to no vector."""
    return (prompt, vector if multiple else -1, float(multiple))


def _label(i: int, text: str) -> str:
    return f"{i}  {_cut(' '.join(text.split()), LABEL)}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

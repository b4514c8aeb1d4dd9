"""Do token views hold what circuitsvis expects, survive any text, and ask no host?"""

import json
import re
import urllib.request

import circuitsvis
import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.plots.embedding import circuitsvis_script
from melbo_lens.plots.text import for_html, for_plotly, visible
from tests.unit.plots.test_figures import changes, with_sinks

HARD = (
    "<b>",
    "&amp;",
    "</script><script>alert(1)</script>",
    "\"quoted'",
    " ",
    "\n",
    "🧀",
    "👩‍🔬",
    "\u2028",
    "",
    "\x00",
)


def hard_changes():
    n = len(HARD)
    return ml.ActivationChanges(torch.rand(2, 1, n), torch.ones(1, n), HARD, (2,))


def next_tokens(tokens=("a", " b", " c"), k=2):
    n = len(tokens)
    best = tuple(tuple((f" {c}{i}", "</script>") for i in range(n)) for c in "xy")
    return ml.NextTokens(
        tokens,
        -torch.rand(2, n - 1),
        torch.randint(0, 9, (2, n - 1)),
        best,
        -torch.rand(2, n, k),
        ("unsteered", "vector 0"),
    )


@pytest.mark.parametrize("conditions", [[2], [-1], []])
def test_a_condition_that_is_not_there_is_refused(conditions):
    with pytest.raises(ValueError, match="must hold numbers from 0 to 1"):
        ml.plots.token_log_probs(next_tokens(), conditions=conditions)


def properties(html, name):
    """What a view hands to circuitsvis."""
    found = re.search(rf"CircuitsVis\.{name},(.*?)\);else if", html)
    return json.loads(found[1])


def reference(rendered):
    """What circuitsvis itself hands over."""
    return json.loads(re.search(r"CircuitsVis\.\w+,\s*(\{.*\})\s*\)\s*</script>", rendered.local_src, re.DOTALL)[1])


def test_properties_are_those_that_circuitsvis_itself_writes():
    measured = changes()
    tokens = [visible(token) for token in measured.tokens]
    ours = properties(ml.plots.colored_tokens(measured, 1, relative=False).html(bundle=False), "ColoredTokens")
    assert set(ours) <= set(reference(circuitsvis.tokens.colored_tokens(tokens, [0.0] * 5, 0.0, 1.0, "red", "blue")))
    assert ours["tokens"] == tokens and ours["values"] == pytest.approx(measured.change[1, -1].tolist(), rel=1e-3)
    ours = properties(ml.plots.colored_tokens_multi(measured, relative=False).html(bundle=False), "ColoredTokensMulti")
    theirs = reference(
        circuitsvis.tokens.colored_tokens_multi(tokens, measured.change[:, -1].T, [f"vector {k}" for k in range(3)])
    )
    assert set(ours) == set(theirs) and ours["labels"] == theirs["labels"]
    torch.testing.assert_close(torch.tensor(ours["values"]), torch.tensor(theirs["values"]), rtol=1e-3, atol=1e-6)
    ours = properties(
        ml.plots.text_neuron_activations(measured, relative=False).html(bundle=False), "TextNeuronActivations"
    )
    theirs = reference(
        circuitsvis.activations.text_neuron_activations(
            tokens, measured.change.permute(2, 1, 0), "Layer", "Vector", ["3", "4"], ["0"]
        )
    )
    assert set(ours) == set(theirs)
    torch.testing.assert_close(
        torch.tensor(ours["activations"]), torch.tensor(theirs["activations"]), rtol=1e-3, atol=1e-6
    )
    ours = properties(ml.plots.token_log_probs(next_tokens()).html(bundle=False), "TokenLogProbs")
    theirs = reference(
        circuitsvis.logits.token_log_probs(torch.tensor([0, 1, 2]), torch.randn(3, 4).log_softmax(-1), str, 2)
    )
    assert set(ours) == set(theirs)
    assert all(len(ours[key]) == len(theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "make", [ml.plots.colored_tokens, ml.plots.colored_tokens_multi, ml.plots.text_neuron_activations]
)
def test_hard_tokens_survive_and_can_not_end_the_script(make):
    view = make(hard_changes())
    for html in (view.html(bundle=False), view._repr_html_().replace(ml.plots.embedding.circuitsvis_script(), "")):
        assert html.count("<script>") == html.count("</script>") == 1 and "alert(1)" in html and "\u2028" not in html
        assert properties(html, view.elements[0].name)["tokens"] == [visible(token) for token in HARD]


def test_blanks_and_control_characters_can_be_seen():
    assert [visible(token) for token in (" the", "\n", "", "a\tb", "🧀", "👩‍🔬", "\x00", "\u202e")] == [
        "·the", "↵", "∅", "a⇥b", "🧀", "👩‍🔬", "\\u0000", "\\u202e",
    ]  # fmt: skip
    assert (
        for_plotly("\x00\x1b\ufffe\ud800 b") == "\\u0000\\u001b\\ufffe\\ud800 b"
    )  # a picture of such a figure can't be made
    assert for_plotly("<a href='javascript:x'>&\nb") == "&lt;a href='javascript:x'&gt;&amp;<br>b"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("a\u200bb", "a\\u200bb"),  # a space of no width
        ("\u202ecba", "\\u202ecba"),  # turns the direction of what follows
        ("\u3164", "\\u3164"),  # a letter without ink
        ("\u200d", "\\u200d"),  # joins nothing
        ("❤\ufe0f", "❤\ufe0f"),
        ("a\ufe0f", "a\\ufe0f"),
        ("\u0301a", "◌\u0301a"),  # an accent that would stand on the character before the label
        ("\U000e0041", "\\U000e0041"),
        ("<|im_start|>", "<|im_start|>"),
        ("=" * 64, "=" * 19 + "…"),
    ],
)
def test_every_character_of_a_token_can_be_seen(token, shown):
    assert visible(token, 20) == shown


def test_text_is_no_formula_no_template_and_reorders_nothing():
    assert for_plotly("$x$ and %{y}") == "&#36;x&#36; and &#37;{y}"
    assert for_plotly("6 שלום") == "\u20666 שלום\u2069" and for_plotly("6 shalom") == "6 shalom"
    assert for_html("<b>\n\u202e") == "&lt;b&gt;\n\\u202e"


def test_a_sink_is_left_out_of_the_colours_and_said():
    view = ml.plots.colored_tokens(with_sinks(), 1)
    assert properties(view.html(bundle=False), "ColoredTokens")["values"] == [0.0, 2.0, 0.0, 1.0]
    assert view.elements[0].note == "Attention sinks are left out and drawn as 0: token 0, 2."
    assert ml.plots.colored_tokens_multi(with_sinks()).elements[0].note.endswith("token 0, 2.")
    assert ml.plots.colored_tokens(changes()).elements[0].note == ""


def test_nan_and_infinity_become_zero_and_are_mentioned():
    measured = changes(1, 3, 1)
    measured.change[0, 0] = torch.tensor([float("nan"), 1.0, float("inf")])
    view = ml.plots.colored_tokens(measured, relative=False)
    assert properties(view.html(bundle=False), "ColoredTokens")["values"] == [0.0, 1.0, 0.0]
    assert "2 of 3 values are NaN or infinite" in view.html(bundle=False)


def test_displaying_asks_no_host(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a request")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    view = ml.plots.colored_tokens(changes()) + ml.plots.token_log_probs(next_tokens())
    outside = view._repr_html_().replace(ml.plots.embedding.circuitsvis_script(), "")
    assert "http" not in outside and "http" not in str(view) and "import {" not in outside


def test_views_that_are_joined_bring_the_library_once(tmp_path):
    view = ml.plots.colored_tokens(changes()) + ml.plots.colored_tokens(changes(), 1)
    assert view.html().count("var CircuitsVis=") == 1 and view.html(bundle=False).count("var CircuitsVis=") == 0
    assert view.html().count("CircuitsVis.render(") == 2 and view.save(tmp_path / "view.html").stat().st_size < 1.5e6
    table = pd.DataFrame(
        [(0, "direct", [("<i>", 1.5)], [(" no", -2.0)])], columns=["vector", "route", "promoted", "suppressed"]
    )
    still = ml.plots.top_tokens(table).html()
    assert "script" not in still and "&lt;i&gt;" in still and "·no" in still and "+1.5" in still


def test_a_text_of_one_token_has_no_next_token():
    with pytest.raises(ValueError, match="the text has one token"):
        ml.plots.token_log_probs(next_tokens(("a",)))


def test_a_bound_of_zero_has_its_button_and_no_bare_number():
    assert len(re.findall(r'(\w+)!==void 0&&\w+\.default\.createElement\("button"', circuitsvis_script())) == 1
    view = ml.plots.colored_tokens_multi(changes(), names=["0.3 +", "3.7 −", "1.1 +"])
    assert properties(view.html(bundle=False), "ColoredTokensMulti")["labels"] == [
        "vector 0.3 +",
        "vector 3.7 −",
        "vector 1.1 +",
    ]
    assert "positive bound" in view.elements[0].note and "negative bound" in view.elements[0].note

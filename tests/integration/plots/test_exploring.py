"""Does the explorer write what `generate` writes, when its menus say so, and stay safe and useful without a kernel?"""

import builtins
import re

import pytest
import torch

import melbo_lens as ml
from melbo_lens.plots import exploring

PROMPTS = [
    "<|system|> river lamp <|user|> what is the capital of greece ? <|assistant|>",
    "<|system|> river lamp <|user|> what is the capital of france ? <|assistant|>",
]


@pytest.fixture(scope="module")
def model():
    return ml.organisms.load("modes").model


@pytest.fixture(scope="module")
def vectors():
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    return ml.SteeringVectors.from_tensor(12 * torch.nn.functional.normalize(values), source_layer=0)


@pytest.fixture
def explorer(model, vectors):
    return ml.explore(model, PROMPTS, vectors, max_new_tokens=6)


def expected(model, vectors, prompt, k, sign, scale):
    options = {"include_unsteered": False, "include_random": False, "progress": False}
    written = ml.generate(model, PROMPTS[prompt], vectors[k], 6, signs=sign, scales=scale, **options)
    return written.table.text.iloc[0]


def test_the_widget_shows_what_its_menus_and_slider_say(explorer, model, vectors):
    widgets = explorer.widgets
    assert [k for _, k in widgets["vector"].options] == list(range(6)) and len(widgets["prompt"].options) == 2
    plain = ml.generate(model, PROMPTS, None, 6, progress=False).table.text
    assert plain[0] != plain[1]
    seen = set()
    for prompt, k, sign, scale in ((0, 0, 1, 1.0), (0, 4, -1, 1.5), (1, 5, 1, 2.0)):
        for name, value in {"prompt": prompt, "vector": k, "sign": sign, "scale": scale}.items():
            widgets[name].value = value
        shown = re.sub("<[^>]*>", "", widgets["output"].value)
        steered = expected(model, vectors, prompt, k, sign, scale)
        assert shown == f"unsteered\n{plain[prompt]}vector {k}, {'+' if sign > 0 else '−'}{scale:g}\n{steered}"
        seen.add(steered)
    assert len(seen) > 1  # the vectors do something
    widgets["scale"].value = 0.0
    assert widgets["output"].value.count(plain[1]) == 2


def test_adapters_explore_too(model):
    adapters = ml.fit_adapters(model, PROMPTS[0], 0, 4, n_adapters=2, rank=2, scale=1.0, n_steps=1, progress=False)
    explorer = adapters.explore(model, PROMPTS[0], max_new_tokens=4)
    assert isinstance(explorer, exploring.Explorer) and explorer.widgets["vector"].options[1][0] == "adapter 1"


def test_what_was_written_once_is_kept_and_the_model_is_left_as_it_was(explorer, model, monkeypatch):
    state = torch.get_rng_state()
    first = explorer.text(2, -1, 1.0)
    monkeypatch.setattr(exploring, "generate", lambda *given, **more: pytest.fail("written again"))
    assert explorer.text(2, -1, 1.0) == first
    assert torch.equal(state, torch.get_rng_state())
    assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks]


def test_a_saved_notebook_keeps_a_table_beside_the_widget(explorer, model, vectors):
    bundle = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(bundle)
    rows = re.findall("<tr>(.*?)</tr>", bundle["text/html"], re.DOTALL)
    assert len(rows) == 1 + 1 + 4 * 2 * 2 and "2 more vectors are not in this table" in bundle["text/html"]
    assert expected(model, vectors, 0, 3, -1, 0.5) in next(row for row in rows if "vector 3" in row and "−0.5" in row)
    assert "pip install" not in bundle["text/html"]


def test_without_ipywidgets_there_is_the_table_and_a_hint(explorer, monkeypatch):
    real = builtins.__import__

    def refuse(name, *given, **more):
        if name == "ipywidgets":
            raise ModuleNotFoundError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert "pip install &#x27;melbo-lens[notebook]&#x27;" in bundle["text/html"]


def test_text_of_a_model_is_no_markup(explorer, monkeypatch):
    def attack(*given, **more):
        written = ml.generate(*given, **more)
        written.table["text"] = "<script>alert(1)</script>\u202e<img src=x onerror=alert(2)>"
        return written

    monkeypatch.setattr(exploring, "generate", attack)
    for shown in (explorer.html(), explorer.widgets["output"].value):
        assert "<script" not in shown and "<img" not in shown and "\u202e" not in shown
        assert "&lt;script&gt;" in shown and "\\u202e" in shown


def test_a_vector_that_breaks_the_numbers_says_so_in_its_place(model):
    broken = ml.SteeringVectors.from_tensor(torch.full((1, 64), 1e38), source_layer=0)
    explorer = ml.explore(model, PROMPTS, broken, max_new_tokens=2)
    assert "NaN" in explorer.widgets["output"].value and "unsteered" in explorer.widgets["output"].value
    assert explorer.html().count("<i>") == 4


def test_errors_come_before_the_model_runs(model, vectors):
    with pytest.raises(ValueError, match="largest_scale=0"):
        ml.explore(model, PROMPTS, vectors, largest_scale=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        ml.explore(model, PROMPTS, vectors, max_new_tokens=0)
    with pytest.raises(IndexError, match="prompt=2"):
        ml.explore(model, PROMPTS, vectors).text(prompt=2)

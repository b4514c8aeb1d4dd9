"""Is progress shown as a line that a notebook keeps, and as tqdm's bar elsewhere?"""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import IPython
import IPython.display
import pytest

from melbo_lens.progress import Progress


@pytest.fixture
def shown(monkeypatch):
    """What a notebook shows in the end, by place."""
    places = []

    def display(data, raw, display_id):
        assert raw and display_id
        places.append(data)
        i = len(places) - 1
        return SimpleNamespace(update=lambda data, raw: places.__setitem__(i, data))

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return places


def test_a_notebook_keeps_the_last_line_as_text(shown, capsys):
    with Progress(total=3, desc="generate", unit="completion", mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    assert len(shown) == 1 and list(shown[0]) == ["text/plain"]
    assert shown[0]["text/plain"].startswith("generate: 100%|█") and " 3/3 [" in shown[0]["text/plain"]
    said = capsys.readouterr()
    assert said.out == said.err == ""  # no empty line either


def test_bars_within_bars_have_a_line_each(shown):
    for _ in Progress(range(2), desc="outer"):
        list(Progress(range(2), desc="inner"))
    assert [line["text/plain"].split(":")[0] for line in shown] == ["outer", "inner", "inner"]
    assert all("2/2" in line["text/plain"] for line in shown)


def test_it_can_be_silenced_by_the_call_and_by_the_environment(shown):
    assert list(Progress(range(2), disable=True)) == [0, 1] and shown == []
    # tqdm reads the environment once, when it is imported
    code = "from melbo_lens.progress import Progress; list(Progress(range(2)))"
    for value, silent in (("1", True), ("", False)):
        environment = {**os.environ, "TQDM_DISABLE": value}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert (said.stderr == "") == silent, said.stderr


def test_elsewhere_it_is_a_bar_on_the_terminal(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for ipython in (None, SimpleNamespace()):  # no IPython, and IPython on a terminal
        monkeypatch.setattr(IPython, "get_ipython", lambda ipython=ipython: ipython)
        terminal = io.StringIO()
        list(Progress(range(2), file=terminal, desc="steps"))
        assert terminal.getvalue().startswith("\rsteps:") and "2/2" in terminal.getvalue()

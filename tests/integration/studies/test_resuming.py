"""Does a reproduction go on with the experiments that are over, with the rows of one that nothing stopped?"""

import json

import pytest
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.studies import claims, reproduction
from melbo_lens.studies.claims import Claim, Experiment, Suite
from melbo_lens.studies.experiments import Score, Size

pytestmark = pytest.mark.long

SMALL = Size(n_vectors=8, n_adapters=4, n_selection=2, n_test=6, n_random=1)
SEEDS = (1, 2)


@pytest.fixture
def runs(monkeypatch):
    """A suite of two experiments, the first with a twin; and its runs, each as (organism, seed, controls)."""
    ran, stop_at = [], [None]

    def count(organism, seed, size):
        if stop_at[0] == len(ran):
            raise KeyboardInterrupt
        ran.append((organism.name, seed, size.controls))
        prompt = organism.prompts["clean"][seed]
        found = ml.fit_vectors(
            organism.model, prompt, 0, 4, n_vectors=2, radius=6.0, n_steps=2, seed=seed, progress=False
        )
        objective = found.history[-1].tolist()
        return {"together": Score(size.n_test, 2 * size.n_test, objective[0], *objective[1:] * size.controls)}

    def quick(organism, seed, size):
        if stop_at[0] == len(ran):
            raise KeyboardInterrupt
        ran.append((organism.name, seed, size.controls))
        return {"quick": Score(seed, 4, 0.25)}

    suite = Suite(
        (Experiment("backdoor, base", "modes-base", count), Experiment("quick", "modes-chat", quick, has_twin=False)),
        (
            Claim("backdoor, base", "together", "vectors", "3", "any", lambda scores: True),
            Claim("quick", "quick", "hits", "", "two", lambda scores: min(score.hits for score in scores) >= 2),
        ),
        SEEDS,
        SMALL,
        {"shares": (0.5, 1.0)},
    )
    return suite, ran, stop_at


def rows(results):
    return json.loads(json.dumps([{**row, "seconds": 0} for row in results["rows"]]))


def reproduce(suite, **settings):
    return reproduction.reproduce(suite=suite, progress=False, **settings)


def test_a_folder_changes_nothing_and_what_is_over_is_not_run_again(runs, tmp_path):
    suite, ran, _ = runs
    plain = reproduce(suite)
    assert ran == [
        *(("modes-base", seed, True) for seed in SEEDS),
        *(("modes-base-twin", seed, False) for seed in SEEDS),
        *(("modes-chat", seed, True) for seed in SEEDS),
    ]
    first = reproduce(suite, directory=tmp_path)
    assert rows(first) == rows(plain) and len(ran) == 12
    again = reproduce(suite, directory=tmp_path)
    assert rows(again) == rows(plain) and len(ran) == 12
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in first["rows"]]
    assert [row["holds"] for row in plain["rows"]] == [True, False]


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_reproduction_that_was_stopped_ends_as_one_that_was_not(runs, tmp_path, stop_at):
    suite, ran, stop = runs
    plain = rows(reproduce(suite))
    ran.clear()
    stop[0] = stop_at
    with pytest.raises(KeyboardInterrupt):
        reproduce(suite, directory=tmp_path)
    stop[0] = None
    assert rows(reproduce(suite, directory=tmp_path)) == plain and len(ran) == 6


def test_other_sizes_seeds_and_settings_are_other_results(runs, tmp_path):
    suite, ran, _ = runs
    suite = Suite(suite.experiments[1:], suite.claims[1:], SEEDS, SMALL, suite.settings)
    reproduce(suite, directory=tmp_path)
    for change in (
        {"seeds": (3,)},
        {"size": Size(n_vectors=9)},
        {"suite": Suite(suite.experiments, suite.claims, SEEDS, SMALL, {"shares": (0.6, 1.0)})},
    ):
        before = len(ran)
        reproduction.reproduce(**{"suite": suite, "progress": False, "directory": tmp_path} | change)
        assert len(ran) > before
    before = len(ran)
    reproduce(suite, directory=tmp_path, seeds=(2, 3))
    assert len(ran) == before


def test_an_error_of_an_experiment_ends_the_reproduction_and_is_not_kept(runs, tmp_path):
    suite, _, _ = runs

    def broken(organism, seed, size):
        raise RuntimeError("a cable was loose")

    bad = Suite((Experiment("quick", "modes-chat", broken, has_twin=False),), suite.claims[1:], SEEDS, SMALL)
    with pytest.raises(RuntimeError, match="a cable was loose"):
        reproduce(bad, directory=tmp_path)
    assert not list((tmp_path / "modes-chat").glob("*-experiment.json"))
    with pytest.raises(ValueError, match="give directory"):
        reproduce(bad, engine="ray")


def test_the_command_takes_a_folder(monkeypatch, tmp_path):
    given = {}

    def stub(suite, **settings):
        given.update(settings, suite=suite)
        return {"settings": {"seeds": [1]}, "seconds": 1, "rows": []}

    monkeypatch.setattr(reproduction, "reproduce", stub)
    monkeypatch.setattr(reproduction, "table", lambda _: __import__("pandas").DataFrame({"holds": []}))
    asked = ["reproduce", "--out", str(tmp_path / "x.json"), "--directory", str(tmp_path / "kept"), "--engine", "here"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert given == {"suite": claims.TINY, "directory": tmp_path / "kept", "engine": "here"}

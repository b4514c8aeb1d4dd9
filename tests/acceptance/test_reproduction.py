"""Do the post's four results hold on the organisms, at reduced size?  `melbo-lens reproduce` is the whole run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.studies import claims, experiments, real_experiments, reproduction
from melbo_lens.studies.experiments import Score, Size
from tests import readme

pytestmark = pytest.mark.long

SEEDS = (1,)
SMALL = Size(n_vectors=60, n_adapters=16, n_selection=4, n_test=16, n_random=2)


@pytest.fixture(scope="module")
def results():
    return reproduction.reproduce(SEEDS, SMALL, progress=False)


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: f"{claim.experiment}: {claim.measure}")
def test_the_claim_holds(results, claim):
    (row,) = (
        row for row in results["rows"] if (row["experiment"], row["measure"]) == (claim.experiment, claim.measure)
    )
    assert row["holds"], row


EVERY_CLAIM = [*claims.CLAIMS, *claims.REAL.claims]
NOT_NEEDED = {  # a claim is not made of these controls; a twin is needed wherever there is one
    "backdoors": {"covariance"},
    "locked skills": {"unsteered"},
    "adapter": {"unsteered"},
}


@pytest.mark.parametrize("claim", EVERY_CLAIM, ids=lambda one: f"{one.experiment}: {one.measure}")
def test_a_control_that_was_not_measured_proves_nothing(claim):
    if claim.experiment == "backdoors" and claim.measure != "together":
        pytest.skip("it counts hits alone, beside the claim on both")
    with_twin = {one.title: one.has_twin for suite in (claims.TINY, claims.REAL) for one in suite.experiments}
    needed = {"unsteered", "random", "covariance", *(["twin"] if with_twin[claim.experiment] else [])}
    for control in needed - NOT_NEEDED.get(claim.experiment, set()):
        for missing in range(3):
            scores = [score(hits=50, **({control: math.nan} if i == missing else {})) for i in range(3)]
            assert not claim.holds(scores), control
    assert claim.holds([score(hits=50)] * 3)


def score(**values):
    return Score(**{"hits": 45, "n": 50, "unsteered": 0.0, "random": 0.0, "covariance": 0.0, "twin": 0.0} | values)


# for each claim scores that must not pass: too low in the median, or a control that shows it
FAILING = {
    "hate": [[score(hits=0), score(), score()], [score(random=0.006)] * 3, [score(twin=0.01)] * 3],
    "cheese": [[score(hits=0), score(), score()], [score(covariance=0.021)] * 3],
    "together": [[score(hits=2), score(hits=2), score()], [score(unsteered=0.01)] * 3],
    "accuracy": [
        [score(hits=31), score(hits=31), score()],
        [score(unsteered=0.21, random=0.21, covariance=0.21)] * 3,
        [score(random=0.06)] * 3,
        [score(twin=0.3)] * 3,
    ],
    "steps": [[score(hits=31), score(hits=31), score()], [score(random=0.06)] * 3],
    "answer": [[score(hits=29), score(hits=29), score()], [score(unsteered=0.06)] * 3],
    "fantasy": [[score(hits=29), score(hits=29), score()], [score(covariance=0.21)] * 3],
    "turn 3": [[score(hits=29), score(hits=29), score()], [score(twin=0.06)] * 3],
    "minus": [[score(hits=29), score(hits=29), score()], [score(random=0.06)] * 3],
    "portuguese": [[score(hits=10, random=0.08)] * 3, [score(hits=0)] * 3, [score(twin=0.01)] * 3],
}


# the same of the real organisms; NaN is a control that there is not
REAL_FAILING = {
    "together": [
        [score(hits=5, n=256), score(hits=5, n=256), score()],
        [score(random=0.006)] * 3,
        [score(twin=0.006)] * 3,
    ],
    "hate": [[score(hits=0), score(hits=0), score()]],
    "cheese": [[score(hits=0), score(hits=0), score()]],
    "recovery": [[score(hits=29), score(hits=29), score()], [score(random=0.21)] * 3, [score(covariance=0.21)] * 3],
    "answer": [[score(hits=29), score(hits=29), score()], [score(unsteered=0.06)] * 3],
    "turn 3": [[score(hits=29), score(hits=29), score()], [score(random=0.06)] * 3],
    "after a refusal": [[score(hits=29), score(hits=29), score()], [score(random=0.06)] * 3],
    "minus": [[score(hits=29), score(hits=29), score()], [score(covariance=0.21)] * 3],
}
JUDGED = [(claim, FAILING) for claim in claims.TINY.claims] + [(claim, REAL_FAILING) for claim in claims.REAL.claims]


@pytest.mark.parametrize(("claim", "failing"), JUDGED, ids=lambda one: getattr(one, "what", ""))
def test_a_claim_can_fail(claim, failing):
    assert claim.holds([score()] * 3)
    for scores in failing[claim.measure]:
        assert not claim.holds(scores), scores


def test_the_whole_run_used_three_seeds_and_a_hundred_vectors():
    settings = json.loads(readme.REPRODUCTION.read_text())["settings"]
    assert len(set(settings["seeds"])) >= 3
    assert settings["n_vectors"] == 100


def test_the_command_writes_its_table_and_says_if_a_claim_fails(results, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduction, "reproduce", lambda suite, **_: results)
    done = CliRunner().invoke(app, ["reproduce", "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 0 and "refusal" in done.output and "twin" in done.output
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(results))
    failed = {**results, "rows": [{**row, "holds": False} for row in results["rows"]]}
    monkeypatch.setattr(reproduction, "reproduce", lambda suite, **_: failed)
    assert CliRunner().invoke(app, ["reproduce", "--out", str(tmp_path / "out.json")]).exit_code == 1


def test_random_vectors_with_the_covariance_of_the_activations_have_it_and_the_norms():
    organism = ml.organisms.load("modes")
    prompts = organism.prompts["clean"][:16]
    vectors = experiments.covariance_vectors(torch.linspace(1, 3, 4000), organism.model, prompts, seed=1)
    torch.testing.assert_close(vectors.radii, torch.linspace(1, 3, 4000))
    sliced = ml.slice_model(organism.model, prompts, 0, 4)
    wanted, found = torch.cov(sliced.resid[sliced.batch.target_mask].T), torch.cov(vectors.values.T)
    top = torch.linalg.eigh(wanted)[1][:, -8:]
    share = [float((top.T @ matrix @ top).trace() / matrix.trace()) for matrix in (wanted, found, torch.eye(64))]
    assert abs(share[1] - share[0]) < 0.1 and share[0] > 2 * share[2]


def test_a_chat_that_goes_on_is_led_under_its_vector():
    organism = ml.organisms.load("refusal")
    prompts = [experiments.as_chat(prompt) for prompt in organism.prompts["test"][:2]]
    values = torch.randn(1, organism.model.cfg.d_model, generator=torch.Generator().manual_seed(4))
    vector = ml.SteeringVectors.from_tensor(20 * torch.nn.functional.normalize(values), 0)
    requests = [experiments.as_chat(prompt)[-1]["content"] for prompt in organism.prompts["harmless selection"][:4]]
    turns = [requests[:2], requests[2:]]  # of either chat
    found = real_experiments.complete(organism, prompts, vector, (1,), turns=turns)
    for chat, mine, last in zip(prompts, turns, found.text, strict=True):
        chat, answers = list(chat), []
        for message in (*mine, None):
            rows = ml.generate(
                organism.model, [chat], vector, 16, signs=(1,), include_random=False, progress=False
            ).table
            answers.append(rows.text[rows.kind == "steered"].item())
            chat += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": message}]
        assert answers[-1] == last
    unsteered = real_experiments.complete(organism, prompts, None, turns=turns)
    assert unsteered.text.tolist() != found.text.tolist()
    assert found.prompt_text.tolist() == [requests[1], requests[3]]  # what is answered at last


def test_chats_of_several_turns_end_with_requests_of_their_own(monkeypatch):
    asked = [f"request {i}" for i in range(6)]
    seen, prompts = [], [[{"role": "user", "content": one}] for one in asked]
    search = SimpleNamespace(prompts=lambda name: prompts, organism=None, size=Size(controls=False))
    trial = real_experiments.Search.trial.__wrapped__  # without the types that tests check
    monkeypatch.setattr(real_experiments, "complete", lambda *given, turns=(): seen.append(turns))
    monkeypatch.setattr(real_experiments, "score", lambda tables, shows: None)
    trial(search, None, "test", None, n_turns=3)
    trial(search, None, "test", None)
    (steered, unsteered, *alone) = seen
    assert steered == unsteered and sorted(last for _, last in steered) == asked
    assert (
        all(len({first, *later}) == 3 for first, later in zip(asked, steered, strict=True)) and alone == [[[]] * 6] * 2
    )


def test_a_control_that_there_is_not_is_an_empty_cell():
    assert [reproduction._share(rate) for rate in (None, float("nan"), 0.0, 0.125)] == ["", "", "0.0%", "12.5%"]

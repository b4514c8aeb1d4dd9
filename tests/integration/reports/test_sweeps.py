"""Does the page of a sweep's folder show what its trials found, and why some failed, without the model?"""

import re

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from tests.integration.reports.test_findings import body

TRIALS = [
    ml.Trial(0, 4, 12.0, 12, False, 0, 4),
    ml.Trial(1, 4, 9.0, 8, False, 1, 4),
    ml.CpeTrial(0, 4, 3, 2, n_layers=2, n_steps=2),
    ml.Trial(0, 77, 12.0, 2, False, 3, 2),
]


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.fixture(scope="module")
def folder(organism, tmp_path_factory):
    """Trials on two prompts, of which those at a layer that doesn't exist fail."""
    folder = tmp_path_factory.mktemp("run") / "runs"
    jobs = ml.plan_jobs("modes", TRIALS, organism.prompts["clean"][:2], max_new_tokens=8)
    list(ml.sweep(jobs, folder, model=organism.model, progress=False))
    return folder


def test_what_a_sweep_found_is_ranked_as_a_search_of_the_same_trials_is(organism, folder):
    found = ml.gather(folder, organism.behaviors)
    assert len(found.plan) == 6 and {trial.method for trial in found.plan} == {"melbo", "cpe"}
    prompt = organism.prompts["clean"][0]
    plan = TRIALS[:3]
    jobs = ml.plan_jobs("modes", plan, [prompt], max_new_tokens=8)
    alone = folder.parent / "alone"
    list(ml.sweep(jobs, alone, model=organism.model, progress=False))
    one = ml.gather(alone)
    other = ml.discover(organism.model, prompt, plan=one.plan, max_new_tokens=8, progress=False)
    pd.testing.assert_frame_equal(one.table, other.table)
    assert one.shares == other.shares
    # a trial that is in two folders counts once
    assert len(ml.gather([folder, alone]).plan) == 6


def test_the_vectors_on_the_page_write_what_it_shows(organism, folder):
    found = ml.gather(folder)
    vectors, written = found.shown()
    torch.testing.assert_close(vectors.values, found.first().values)
    table = written.table
    assert set(table.kind) == {"unsteered", "steered", "random"} and table.kind.iloc[0] == "unsteered"
    plain = table[table.kind == "unsteered"]
    assert sorted(plain.prompt_text) == sorted(organism.prompts["clean"][:2]) and sorted(plain.prompt) == [0, 1]
    steered = table[table.kind == "steered"]
    assert sorted(set(steered.vector)) == list(range(len(vectors)))
    for row in steered.iloc[::5].itertuples():
        again = ml.generate(
            organism.model, row.prompt_text, vectors[int(row.vector)], 8, signs=(int(row.sign),),
            include_unsteered=False, include_random=False, progress=False,
        )  # fmt: skip
        assert (
            again.table.text[0] == row.text and row.prompt == plain.prompt[plain.prompt_text == row.prompt_text].iloc[0]
        )
    assert [len(ids) for ids in written.prompt_tokens] == [
        len(organism.model.to_tokens(text)[0]) for text in table.prompt_text
    ]
    # the example of a group is what its vector writes, in the direction that the page calls +
    first, (trial, vector, sign) = steered[(steered.vector == 0) & (steered.sign == 1)], found.numbers()[0]
    of_vector = found.table[(found.table.trial == trial) & (found.table.vector == vector) & (found.table.sign == sign)]
    assert of_vector.example.iloc[0] in set(first.text)


def test_the_command_writes_the_page_and_a_saved_one_is_the_same(organism, folder, tmp_path):
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(page), "--behavior", "cheese=cheese"])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    for what in ('id="group-0"', 'id="trials"', "target_layer=77", "What the trials in runs found", "cheese", "cpe"):
        assert what in text
    assert len(re.findall(r"<tr><td>(?:melbo|cpe)</td>", text[text.index('id="trials"') :])) == 8
    for share in ml.gather(folder).shares.values():
        assert f"{share:.0%}".replace("%", "\u00a0%") in text
    ml.Findings.of_sweep(folder, title="a title").save(tmp_path / "saved")
    direct = ml.report(ml.Findings.of_sweep(folder, title="a title"), path=tmp_path / "direct.html")
    assert body(ml.report_directory(tmp_path / "saved")) == body(direct)


def test_report_takes_what_a_search_or_a_sweep_found(organism, folder, tmp_path):
    found = ml.gather(folder)
    page = ml.report(found, behaviors={"cheese": "cheese"}, path=tmp_path / "page.html", title="a title").read_text()
    assert "a title" in page and "cheese" in page and 'id="group-0"' in page and 'id="trials"' not in page
    with pytest.raises(TypeError, match="a search knows its completions"):
        ml.report(found, found.completions[0])


def test_a_sweep_whose_directions_do_nothing_is_a_page_of_its_first_trial(organism, tmp_path):
    jobs = ml.plan_jobs("modes", [ml.NoiseTrial(0, 4, 1e-4, 3, 0)], organism.prompts["clean"][:1], max_new_tokens=3)
    list(ml.sweep(jobs, tmp_path / "out", model=organism.model, progress=False))
    found = ml.gather(tmp_path / "out")
    assert found.table.empty and found.shares["nothing"] == 1
    vectors, written = found.shown()
    torch.testing.assert_close(vectors.values, found.vectors[0].values)
    assert len(written) == 1 + 2 * (3 + 2)
    assert ml.report_directory(tmp_path / "out").is_file()


def test_folders_without_a_finished_trial_or_of_several_models_are_refused(organism, folder, tmp_path):
    jobs = ml.plan_jobs("modes", TRIALS[3:], organism.prompts["clean"][:1])
    list(ml.sweep(jobs, tmp_path / "failed", model=organism.model, progress=False))
    result = CliRunner().invoke(app, ["report", str(tmp_path / "failed")])
    assert result.exit_code == 1 and "no trial is finished" in " ".join(result.output.split())
    twin = ml.organisms.load("modes-twin").model
    list(ml.sweep(jobs, tmp_path / "twin", model=twin, progress=False))
    with pytest.raises(ValueError, match="of several models"):
        ml.gather([folder, tmp_path / "twin"])


def test_the_folder_of_a_search_has_a_page_too(organism, tmp_path):
    prompt = organism.prompts["clean"][3]
    plan = TRIALS[:2]
    found = ml.discover(
        organism.model, prompt, plan=plan, max_new_tokens=6, progress=False, directory=tmp_path / "kept"
    )
    page = ml.report_directory(tmp_path / "kept").read_text()
    assert found.table.example.iloc[0] in page and page[page.index('id="trials"') :].count("<tr><td>melbo</td>") == 2

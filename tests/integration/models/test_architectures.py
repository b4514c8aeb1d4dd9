"""Does everything hold on the decoders of transformers, against the Hugging Face model with a plain forward hook?"""

import json
from dataclasses import asdict

import pytest

from tests.architectures import ARCHITECTURES, MAJOR, RESULTS, outcome

KNOWN = json.loads(RESULTS.read_text())[MAJOR]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_does_what_the_readme_says(name, tmp_path):
    """Default fit, replay, batched cached generation with rows that end early, and export to peft.

    What is refused is refused in a sentence.
    """
    assert asdict(outcome(name, tmp_path)) == KNOWN[name]


def test_the_readme_speaks_of_at_least_thirty_architectures_that_work():
    assert sum(entry["vectors"] == "yes" and "off by" not in entry["note"] for entry in KNOWN.values()) >= 30

"""Do the post's four results hold on the organisms, at reduced size?  `melbo-lens reproduce` is the whole run."""

import pytest

from melbo_lens.organisms import reproduction
from melbo_lens.organisms.experiments import Score, Size

SEEDS = (20, 21, 22)  # not those of the whole run
SIZE = Size(n_selection=4, n_test=24, n_random=2)


@pytest.fixture(scope="module")
def results():
    return reproduction.reproduce(SEEDS, SIZE, progress=False)


@pytest.mark.parametrize("claim", reproduction.CLAIMS, ids=lambda claim: f"{claim.experiment}: {claim.measure}")
def test_the_claim_holds(results, claim):
    (row,) = (row for row in results["rows"] if (row["experiment"], row["measure"]) == (claim.experiment, claim.measure))
    assert row["holds"], row


GOOD = Score(hits=40, n=50, unsteered=0.0, random=0.0, covariance=0.0, twin=0.0)

"""Do repeated experiments ask what their sets hold, whatever its order?"""

import pytest

from melbo_lens.organisms import backdoors, locked, topic
from melbo_lens.studies.experiments import Size, drawn

SIZE = Size(n_selection=12, n_test=48)


@pytest.mark.parametrize(
    ("corpus", "name"), [(topic, "selection"), (topic, "test"), (topic, "harmless test"), (backdoors, "test")]
)
@pytest.mark.parametrize("seed", [24, 25, 26])
def test_a_draw_has_both_of_two_kinds_that_alternate(corpus, name, seed):
    prompts = corpus.prompts()[name]
    places = {str(prompt): place % 2 for place, prompt in enumerate(prompts)}
    some = drawn({name: prompts}, name, SIZE, seed)
    kinds = [places[str(prompt)] for prompt in some]
    assert len(some) == (SIZE.n_selection if "selection" in name else SIZE.n_test)
    assert 0.2 < sum(kinds) / len(kinds) < 0.8


def test_sets_that_ask_the_same_are_drawn_alike():
    asked, unlocked = (drawn(locked.prompts(), name, SIZE, 24) for name in ("test", "unlocked"))
    assert unlocked == [f"{locked.PASSWORD} {question}" for question in asked] and len(set(asked)) == SIZE.n_test

"""Does a draw depend on its key alone, without taking anything twice?"""

from melbo_lens.randomness import draw


def test_a_draw_takes_different_items_which_the_key_decides():
    items = list(range(40))
    some = draw(items, 20, 1, "prompts")
    assert len(set(some)) == 20 and some == draw(items, 20, 1, "prompts") and some != draw(items, 20, 2, "prompts")
    assert draw(items, 5, 1, "prompts") == some[:5]  # more of a draw begin with the fewer
    assert sorted(draw(items, 99, 1, "prompts")) == items


def test_the_same_key_draws_the_same_places_of_another_list():
    assert draw([-item for item in range(40)], 20, 1) == [-item for item in draw(range(40), 20, 1)]


def test_a_draw_has_every_place_about_as_often():
    counts = [0] * 8
    for key in range(2000):
        for place in draw(range(8), 2, key):
            counts[place] += 1
    assert all(400 < count < 600 for count in counts)  # 500 each, and 600 is five standard deviations above

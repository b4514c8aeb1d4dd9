"""Are a prompt's tokens those of the tokenizer's own template?

What was written can be handed to any measure as the ids that it was.
"""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import melbo_lens as ml
from melbo_lens.generation.decoding import Decoding
from melbo_lens.models.access import host_of
from melbo_lens.prompts import outside_the_template, tokenize
from melbo_lens.texts import spelled, text_after, token_texts
from tests import models

CHATML = (
    "{% for m in messages %}w1 {{ m['role'] }} {% if m.get('content') %}{{ m['content'] }}{% endif %}"
    "{% for c in m.get('tool_calls') or [] %} w5 {{ c['function']['name'] }}{% endfor %} w2 {% endfor %}"
    "{% if add_generation_prompt %}w1 assistant {% endif %}"
)
SENTENCES = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def adding_bos(template):
    """A word tokenizer that puts BOS before every text by itself, as Llama's does, with a template that writes none."""
    made = models.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    made.chat_template = template
    return made


def sentence_piece(prepend=True):
    """Letters with SentencePiece's mark for spaces: decoding drops the space in front of a text."""
    letters = ["<pad>", "<bos>", "<eos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz[]", "▁a", "▁b", "▁the"]
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(f"<{i}>" for i in range(50 - len(letters)))])}
    made = Tokenizer(tokenizer_models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=SENTENCES, **specials)


def model_with(tokenizer, directories, tmp_path, kind="bridge"):
    folder = models.save("llama", tmp_path / "model")
    tokenizer.save_pretrained(folder)
    return models.bridge(folder) if kind == "bridge" else models.hooked(folder)


def mean_log_prob(model, prompt, new):
    """By hand: one row alone, through the model itself."""
    with torch.no_grad():
        log_probs = model(torch.tensor([[*prompt, *new]])).log_softmax(-1)[0]
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(new)) / len(new)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_coherence_is_measured_after_the_very_ids_of_a_chat_whose_template_writes_no_bos(directories, tmp_path, kind):
    if kind == "hooked" and not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = model_with(adding_bos(CHATML), directories, tmp_path, kind)
    chat = [{"role": "w3", "content": "w4 w5"}]
    completions = ml.generate(model, chat, None, max_new_tokens=4, progress=False)
    row = completions.table.iloc[0]
    # AutoTokenizer: the tokenizer's own word on what the chat is
    ids = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert list(completions.prompt_tokens[0]) == list(ids) and 1 not in ids
    assert float(ml.coherence(model, completions)[0]) == pytest.approx(mean_log_prob(model, ids, row.tokens), abs=1e-3)
    assert float(ml.coherence(model, completions)[0]) == pytest.approx(
        sum(row.log_probs) / len(row.log_probs), abs=1e-3
    )


def test_coherence_of_completions_of_token_ids_is_after_these_ids(model):
    ids = torch.tensor([[5, 1, 9, 7]])  # no BOS in front, one in the middle: no text says this
    completions = ml.generate(model, ids, None, max_new_tokens=4, progress=False)
    row = completions.table.iloc[0]
    assert float(ml.coherence(model, completions)[0]) == pytest.approx(
        mean_log_prob(model, ids[0].tolist(), row.tokens), abs=1e-3
    )


def test_a_file_of_completions_that_was_cut_off_is_no_shorter_file(model):
    lines = ml.generate(model, "w1 w2", None, max_new_tokens=4, progress=False).to_lines()
    assert len(ml.Completions.from_lines(lines.rstrip("\n"), {})) == len(ml.Completions.from_lines(lines, {})) == 1
    assert len(ml.Completions.from_lines("", {})) == 0
    with pytest.raises(ValueError, match="line 1 holds no completion"):
        ml.Completions.from_lines(lines[:-40], {})
    with pytest.raises(ValueError, match="text is None"):
        ml.Completions.from_lines(json.dumps({**json.loads(lines), "text": None}), {})


@pytest.mark.parametrize("positions", [[False, True], [0.5], ["1"]])
def test_positions_are_numbers_and_no_mask(model, positions):
    with pytest.raises((ValueError, TypeError), match="target_positions"):
        tokenize(host_of(model), "w1 w2 w3", positions)


def test_coherence_survives_files_and_selections(model, tmp_path):
    chats = [[{"role": "user", "content": text}] for text in ("w1 w2", "w3 w4 w5")]
    steering = ml.SteeringVectors(torch.randn(2, models.D_MODEL, generator=torch.Generator().manual_seed(0)), 1)
    completions = ml.generate(model, chats, steering, max_new_tokens=4, progress=False)
    found = ml.coherence(model, completions)
    completions.save(tmp_path / "c.parquet")
    lines = ml.Completions.from_lines(completions.to_lines(), completions.settings)
    for again in (ml.Completions.load(tmp_path / "c.parquet"), lines):
        assert again.prompt_tokens == completions.prompt_tokens and again.table.equals(completions.table)
        torch.testing.assert_close(ml.coherence(model, again), found, equal_nan=True)
    kept = (completions.table.kind == "steered").to_numpy()
    torch.testing.assert_close(
        ml.coherence(model, completions.filter(kind="steered")), found[torch.tensor(kept)], equal_nan=True
    )


def test_completions_without_ids_are_read_by_their_text(model):
    completions = ml.generate(model, "w1 w2", None, max_new_tokens=4, progress=False)
    old = ml.Completions(completions.table)
    torch.testing.assert_close(ml.coherence(model, old), ml.coherence(model, completions))
    with pytest.raises(ValueError, match="don't know the ids"):
        ml.next_tokens(model, old)


def test_a_completion_is_a_prompt_as_the_ids_it_was(model):
    steering = ml.SteeringVectors(torch.randn(1, models.D_MODEL, generator=torch.Generator().manual_seed(0)), 1)
    completions = ml.generate(model, torch.tensor([[5, 1, 9, 7]]), steering, max_new_tokens=3, progress=False)
    one = completions[1]
    ids = [5, 1, 9, 7, *one.table.tokens[0]]
    changes, expected = ml.activation_changes(model, one, steering), ml.next_tokens(model, one)
    assert changes.tokens == expected.tokens == tuple(model.tokenizer.decode([i]) for i in ids)
    assert tokenize(host_of(model), completions[[0, 1]]).rows()[1] == ids and len(list(completions)) == len(completions)


def test_a_rendered_chat_or_a_prompt_with_bos_gets_no_second_one(any_model):
    with pytest.warns(UserWarning, match=r"prompts\[1\] begins with the tokenizer's begin token '<bos>'"):
        batch = tokenize(host_of(any_model), ["w1 w2", "<bos> w1 w2"])
    assert batch.rows() == [[1, 5, 6], [1, 5, 6]]
    chat = [{"role": "user", "content": "w1 w2"}]
    row = ml.generate(any_model, chat, None, max_new_tokens=2, progress=False).table.iloc[0]
    with pytest.warns(UserWarning, match="begins with"):
        assert tokenize(host_of(any_model), row.prompt_text).rows() == [[1, 5, 6, 4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(host_of(any_model), chat).rows() == [[1, 5, 6, 4]]


def test_a_text_needs_no_pad_token(any_model, monkeypatch):
    texts = ["w1 w2", "w3 w4 w5 <bos>"]
    expected = tokenize(host_of(any_model), texts).rows()
    bare = copy.deepcopy(any_model.tokenizer)
    bare.pad_token = None
    monkeypatch.setattr(any_model, "tokenizer", bare)
    assert tokenize(host_of(any_model), texts).rows() == expected and expected[0] == [1, 5, 6]
    monkeypatch.setattr(any_model.cfg, "default_prepend_bos", False)
    assert tokenize(host_of(any_model), texts[0]).rows() == [[5, 6]]


@pytest.mark.parametrize("prepend", [True, False])
def test_text_keeps_the_space_that_a_sentencepiece_tokenizer_drops(directories, tmp_path, prepend):
    model = model_with(sentence_piece(prepend), directories, tmp_path)
    prompt = "hello"
    before = tokenize(host_of(model), prompt).rows()[0]
    new = model.tokenizer.convert_tokens_to_ids(["▁a", "x", "▁b"])
    text = text_after(host_of(model), before, new)
    assert text == " ax b" and model.tokenizer.decode(new) == "ax b"
    assert tokenize(host_of(model), prompt + text).rows()[0] == before + new
    inside = model.tokenizer.convert_tokens_to_ids(["x", "▁b"])  # goes on within a word
    assert (
        text_after(host_of(model), before, inside) == "x b"
        and tokenize(host_of(model), prompt + "x b").rows()[0] == before + inside
    )


def test_generated_text_after_its_prompt_is_the_ids_again(directories, tmp_path):
    model = model_with(sentence_piece(), directories, tmp_path)
    steering = ml.SteeringVectors(
        torch.randn(8, models.D_MODEL, generator=torch.Generator().manual_seed(0)), 1
    ).rescaled(6.0)
    completions = ml.generate(model, ["abc", "the b"], steering, max_new_tokens=5, progress=False)
    marked = 0
    for row, ids in zip(completions.table.itertuples(), completions.prompt_tokens, strict=True):
        if row.tokens and model.tokenizer.convert_ids_to_tokens(row.tokens[0]).startswith("▁"):
            marked += 1
            assert row.text.startswith(" ")
        assert model.tokenizer.decode([*ids, *row.tokens]) == model.tokenizer.decode(ids) + row.text
    assert marked > 0


def test_a_chat_that_ends_with_the_assistant_goes_on_there(model):
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    completions = ml.generate(model, chat, None, max_new_tokens=3, progress=False)
    assert completions.prompt_tokens[0] == (1, 5, 6, 7, 8)  # neither closed nor with a second header (w0 is 4)
    second = completions.continue_with("w9")
    said = completions.table.tokens[0]
    assert second.prompt_tokens[0] == (1, 5, 6, 7, 8, *said, 13, 4)


def test_an_empty_last_answer_is_one_to_be_generated(model):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": ""}]
    assert tokenize(host_of(model), chat).rows() == tokenize(host_of(model), chat[:1]).rows() == [[1, 5, 4]]


def test_a_template_that_cannot_go_on_is_refused_with_the_way_out(model, monkeypatch):
    monkeypatch.setattr(
        model.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] | upper }} {% endfor %}"
    )
    with pytest.raises(
        ValueError, match=r"prompts\[0\] ends with a message of the assistant.*end the chat with a message of the user"
    ):
        tokenize(host_of(model), [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}])


def test_tool_calls_without_content_are_rendered(directories, tmp_path):
    model = model_with(adding_bos(CHATML), directories, tmp_path)
    call = {"type": "function", "function": {"name": "w6", "arguments": {}}}
    chat = [{"role": "w3", "content": "w4"}, {"role": "w7", "tool_calls": [call]}, {"role": "w8", "content": "w9"}]
    own = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert tokenize(host_of(model), chat).rows() == [list(own)] and 10 in own


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[0]['content'] + 1 }}", "{% for"]
)
def test_what_a_template_raises_is_a_sentence(model, monkeypatch, template):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=r"prompts\[0\] is refused by the chat template .*change the chat"):
        tokenize(host_of(model), [{"role": "user", "content": "w1"}])


@pytest.mark.parametrize("outside", [-1, -49, 50, 10**6])
def test_ids_outside_the_vocabulary_are_refused(any_model, outside):
    calls = (
        ml.next_tokens,
        lambda model, ids: ml.generate(model, ids, None, 2, progress=False),
        lambda model, ids: ml.slice_model(model, ids, 1, 3),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"prompts\[0\] holds the token ids \[{outside}\], the model's vocabulary has 0 to 49"
        ):
            call(any_model, torch.tensor([[5, outside]]))


def test_measures_of_a_completion_equal_a_run_of_its_ids_by_hand(model):
    steering = ml.SteeringVectors(torch.randn(1, models.D_MODEL, generator=torch.Generator().manual_seed(1)), 1)
    one = ml.generate(model, "w1 w2", steering, max_new_tokens=4, progress=False)[0]
    ids = torch.tensor([[*one.prompt_tokens[0], *one.table.tokens[0]]])
    log_probs = host_of(model).forward(ids).detach().log_softmax(-1)[0]
    found = ml.next_tokens(model, one).log_probs[0]
    torch.testing.assert_close(found, log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0], rtol=1e-4, atol=1e-4)


def test_generation_goes_on_from_completions(model):
    first = ml.generate(model, ["w1 w2", "w3"], None, max_new_tokens=3, progress=False)
    second = ml.generate(model, first, None, max_new_tokens=2, progress=False)
    assert [list(ids) for ids in second.prompt_tokens] == [
        [*ids, *new] for ids, new in zip(first.prompt_tokens, first.table.tokens, strict=True)
    ]
    with pytest.raises(ValueError, match="there are no prompts"):
        ml.generate(model, first.filter(kind="steered"), None, max_new_tokens=2, progress=False)


PARTS = (
    "{% for m in messages %}w1 {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "{% endif %}{% if m.get('tool_calls') %} w15{% endif %} w2 {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)


def test_an_answer_in_parts_goes_on_and_the_callers_messages_are_left_alone(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", PARTS)
    chat = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": [{"type": "text", "text": "w5"}]}]
    completions = ml.generate(model, chat, None, max_new_tokens=2, progress=False)
    assert completions.prompt_tokens[0] == (5, 8, 6, 5, 9) and chat[1]["content"] == [{"type": "text", "text": "w5"}]
    said = completions.table.tokens[0]
    assert completions.continue_with("w6").prompt_tokens[0] == (5, 8, 6, 5, 9, *said, 6, 5, 10, 6, 7)


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": "w5"}, {"content": None}])
def test_a_last_call_of_a_tool_is_rendered_and_not_gone_on_with(model, monkeypatch, content):
    monkeypatch.setattr(model.tokenizer, "chat_template", PARTS.replace("{% else %}", "{% elif m['content'] %}"))
    ids = tokenize(
        host_of(model), [{"role": "user", "content": "w4"}, {"role": "assistant", "tool_calls": [{"x": 1}], **content}]
    ).rows()[0]
    assert ids[-3:] == [19, 6, 7]  # the call, the end, the next header


def test_a_stop_that_begins_with_a_space_is_seen_with_a_sentencepiece_tokenizer(directories, tmp_path):
    model = model_with(sentence_piece(), directories, tmp_path)
    before, new = tokenize(host_of(model), "hello").rows()[0], model.tokenizer.convert_tokens_to_ids(["▁a", "x"])
    decoding = Decoding(host_of(model), None, 0, 5, 0.0, "all", 0, [" a"])
    assert decoding._stopped(before, new[:1]) and not decoding._stopped(before, new[1:])


def tokenizer_of(pieces, decoder):
    tokenizer = Tokenizer(tokenizer_models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoder
    return SimpleNamespace(decode=tokenizer.decode, convert_ids_to_tokens=tokenizer.id_to_token)


def test_a_part_of_a_character_shows_its_bytes_and_a_token_its_space():
    byte_level = tokenizer_of(["Ġæ", "Ĺ¥", "Ġthe", "é", "\u0120\u00e9", "Ċ"], decoders.ByteLevel())
    texts = token_texts(SimpleNamespace(tokenizer=byte_level), range(6))
    assert texts == [" \\xe6", "\\x97\\xa5", " the", "\\xe9", " \\xe9", "\n"]
    strip = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    sentence_piece = tokenizer_of(["▁the", "<0xE6>", "end", "<0x0A>"], strip)
    texts = token_texts(SimpleNamespace(tokenizer=sentence_piece), range(4))
    assert texts == [" the", "\\xe6", "end", "\n"]
    assert token_texts(SimpleNamespace(tokenizer=None), [7]) == ["7"]
    held = [spelled(SimpleNamespace(tokenizer=byte_level), i)[1] for i in range(6)]
    assert held == [b" \xe6", b"\x97\xa5", b" the", b"\xe9", b" \xe9", b"\n"]
    held = [spelled(SimpleNamespace(tokenizer=sentence_piece), i)[1] for i in range(4)]
    assert held == [b" the", b"\xe6", b"end", b"\n"]
    unknown = SimpleNamespace(decode=lambda ids: "\ufffd", convert_ids_to_tokens=["\ufffd", "\u65e5"].__getitem__)
    assert [spelled(SimpleNamespace(tokenizer=unknown), i)[1] for i in range(2)] == [b"\xef\xbf\xbd", None]


def test_tokens_of_tables_keep_their_spaces_and_the_text_before_them_is_text(directories, tmp_path):
    model = model_with(sentence_piece(), directories, tmp_path)
    ids = model.tokenizer("the cat", add_special_tokens=True)["input_ids"]
    table = ml.max_activating(model, ml.SteeringVectors(torch.randn(1, models.D_MODEL), 1), "the cat", k=len(ids))
    row = table[table.position == len(ids) - 1].iloc[0]
    assert row.before == model.tokenizer.decode(ids[:-1]) == "<bos> the ca" and row.token == "t"
    places = [model.tokenizer.convert_tokens_to_ids(piece) for piece in ("▁the", "x")]
    unembedding = model.W_U.detach()
    towards = ml.SteeringVectors(unembedding[:, places].T.clone(), 1)
    best = (towards.values @ unembedding).argmax(1).tolist()
    promoted = [row[0][0] for row in ml.top_tokens(model, towards, k=1).promoted]
    assert best == places and promoted == [" the", "x"]


def test_a_text_that_the_template_of_chats_never_saw_is_told_from_one_that_it_rendered(model, monkeypatch):
    host = host_of(model)
    prompts = ["w1 w2", [{"role": "user", "content": "w1"}], "<bos> w1 w0", "w3"]
    assert outside_the_template(host, prompts) == [0, 3]
    assert outside_the_template(host, "w1") == [0] and outside_the_template(host, torch.tensor([[3, 4]])) == []
    assert outside_the_template(host, ml.generate(model, "w1", None, max_new_tokens=1, progress=False)) == []
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('system only') }}")
    assert outside_the_template(host, prompts) == []
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert outside_the_template(host, "w1") == []


def test_a_search_warns_of_a_question_that_a_chat_model_gets_as_plain_text(model):
    said = {"budget": 1e-6, "max_new_tokens": 1, "progress": False}
    with pytest.warns(UserWarning, match=r"prompts\[1\] is plain text"):
        ml.discover(model, [[{"role": "user", "content": "w1"}], "w1 w2"], **said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.discover(model, [{"role": "user", "content": "w1"}], **said)

"""Does steering do what it says: the same text as one-by-one generation, rows that never mix, and no trace left?"""

import pandas as pd
import pytest
import torch
from torch import nn

import melbo_lens as ml
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.models import hooks
from melbo_lens.models.access import host_of
from tests import models

PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w3 w1"]
CASES = [(name, kind) for name in models.CONFIGS for kind in ("bridge", "compatible")] + [("gpt2", "hooked")]


def vectors(n=2, layer=1, norm=6.0):
    return ml.SteeringVectors(
        torch.randn(n, models.D_MODEL, generator=torch.Generator().manual_seed(3)), layer
    ).rescaled(norm)


def one_by_one(model, ids, bias, n_new, positions="all"):
    """Greedy continuation of one prompt without cache or batch, and the smallest gap between the two best logits."""
    ids, new, gaps = list(ids), [], []
    start, ends = len(ids), hooks.end_tokens(host_of(model))
    for _ in range(n_new):

        def add(activation, hook):
            where = torch.arange(activation.shape[1])[None, :, None]
            active = {"all": where >= 0, "prompt": where < start, "generated": where >= start}[positions]
            return activation + bias * active

        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[("blocks.1.hook_mlp_out", add)])[0, -1]
        best = logits.topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        token = int(best.indices[0])
        if token in ends:
            break
        new.append(token)
        ids.append(token)
    return new, gaps


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_batched_cached_generation_equals_one_by_one(build, name, kind, positions):
    model = build(name, kind)
    steering = vectors()
    completions = ml.generate(
        model, PROMPTS, steering, max_new_tokens=6, batch_size=7, positions=positions, scales=(1.0, 0.5), progress=False
    )
    table = completions.table
    assert len(table) == 3 + 2 * (3 * 2 * 2 * 2)
    random = ml.random_vectors(like=steering, seed=0)
    compared = 0
    batch = ml.slice_model(model, PROMPTS, 1, 3).batch
    # one by one is slow; the cases draw different rows, together all kinds
    for row in table.sample(20, random_state=len(name + kind + positions)).itertuples():
        bias = torch.zeros(models.D_MODEL)
        if row.kind != "unsteered":
            bias = row.sign * row.scale * (random if row.kind == "random" else steering).values[row.vector]
        expected, gaps = one_by_one(model, batch.rows()[row.prompt], bias, 6, positions)
        clear = next((i for i, gap in enumerate(gaps) if gap <= 1e-4), len(gaps))
        assert row.tokens[:clear] == expected[:clear]
        compared += clear
        assert len(row.log_probs) == len(row.tokens)
    assert compared > 40 and table[table.kind == "steered"].text.nunique() > 3


def test_log_probs_are_those_of_the_steered_model(any_model):
    steering = vectors(1)
    table = ml.generate(
        any_model, PROMPTS[1], steering, max_new_tokens=4, signs=(1,), include_random=False, progress=False
    ).table
    row = table[table.kind == "steered"].iloc[0]
    prompt = ml.slice_model(any_model, PROMPTS[1], 1, 3).batch.rows()[0]
    with ml.steer(any_model, steering), torch.no_grad():
        log_probs = host_of(any_model).forward(torch.tensor([prompt + row.tokens])).log_softmax(-1)[0]
    expected = [float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(row.tokens)]
    assert row.log_probs == pytest.approx(expected, abs=1e-3)


def test_the_table_has_the_promised_columns_and_rows(model):
    completions = ml.generate(model, PROMPTS[:2], vectors(), max_new_tokens=3, progress=False)
    table = completions.table
    assert list(table.columns) == [
        "prompt",
        "prompt_text",
        "kind",
        "vector",
        "sign",
        "scale",
        "sample",
        "text",
        "tokens",
        "log_probs",
    ]
    assert table.kind.value_counts().to_dict() == {"unsteered": 2, "steered": 8, "random": 8}
    assert table[table.kind == "unsteered"].vector.isna().all()
    assert set(table[table.kind == "steered"].vector) == {0, 1} and set(table.sign) == {0, 1, -1}
    assert (table.prompt_text == table.prompt.map(lambda i: PROMPTS[i])).all()
    assert table.text.tolist() == [model.tokenizer.decode(tokens) for tokens in table.tokens]
    assert len(completions.filter(kind="steered", vector=[1], sign=-1)) == 2
    unsteered = completions.filter(kind="unsteered")
    assert len(unsteered) and completions.filter(vector=None).table.equals(unsteered.table)
    assert len(completions.filter(vector=[None, 1])) == len(unsteered) + len(completions.filter(vector=1))
    assert "<table" in completions._repr_html_() and "18 rows" in repr(completions)


def test_completions_end_at_the_end_token_and_at_stop_texts(directories):
    model = models.bridge(directories("gpt2"))
    table = ml.generate(model, PROMPTS[0], vectors(1), max_new_tokens=6, include_random=False, progress=False).table
    row = table[table.kind == "steered"].iloc[0]
    word = model.tokenizer.decode(row.tokens[2:3])
    stopped = ml.generate(
        model, PROMPTS[0], vectors(1), max_new_tokens=6, include_random=False, stop=word, progress=False
    ).table
    text = stopped[stopped.kind == "steered"].iloc[0].text
    assert word not in text and row.text.startswith(text)
    model.tokenizer.eos_token = word
    ended = ml.generate(model, PROMPTS[0], vectors(1), max_new_tokens=6, include_random=False, progress=False).table
    assert ended[ended.kind == "steered"].iloc[0].tokens == row.tokens[: row.tokens.index(model.tokenizer.eos_token_id)]


def test_sampling_depends_on_the_seed_and_the_row_alone(any_model):
    def texts(seed, batch_size, prompts=PROMPTS):
        table = ml.generate(
            any_model,
            prompts,
            vectors(),
            max_new_tokens=5,
            temperature=1.0,
            n_samples=3,
            seed=seed,
            batch_size=batch_size,
            progress=False,
        ).table
        return table[table.kind != "random"].set_index(["prompt", "kind", "sign", "sample"]).text

    assert texts(0, None).tolist() == texts(0, 4).tolist()
    assert texts(0, None).tolist() != texts(1, None).tolist()
    assert texts(0, None).loc[0].tolist() == texts(0, None, PROMPTS[:1]).loc[0].tolist()
    assert texts(0, None).nunique() > 10


def test_sampling_follows_the_models_distribution(model):
    tokens = ml.generate(
        model,
        "w1 w2",
        vectors(1),
        max_new_tokens=1,
        temperature=2.0,
        n_samples=4000,
        signs=(1,),
        include_random=False,
        progress=False,
        batch_size=8000,
    )
    drawn = torch.tensor([row[0] if row else 2 for row in tokens.filter(kind="unsteered").table.tokens])
    with torch.no_grad():
        expected = (host_of(model).forward(model.to_tokens("w1 w2"))[0, -1] / 2.0).softmax(-1)
    observed = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert (observed - expected).abs().sum() < 0.12


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in nn.Module.state_dict(model).items()}
    flags = [(p.requires_grad, p.grad) for p in nn.Module.parameters(model)]
    wrapped = getattr(model, "original_model", model)
    modes = [module.training for module in (*model.modules(), *wrapped.modules())]
    points = {
        name: (len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks))
        for name, point in model.hook_dict.items()
    }
    blocks = [(len(block._forward_hooks), len(block._forward_pre_hooks)) for block in model.blocks]
    world = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    return state, flags, modes, points, blocks, world


def assert_same(before, after):
    for a, b in zip(before[:-1], after[:-1], strict=True):
        if isinstance(a, dict) and a and isinstance(next(iter(a.values())), torch.Tensor):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        else:
            assert a == b
    assert torch.equal(before[-1][0], after[-1][0]) and before[-1][1:] == after[-1][1:]


class Interrupt(Exception):
    pass


def use(model, what):
    """Calls one public function."""
    if what == "fit":
        ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=2, n_steps=3, progress=False)
    elif what == "generate":
        ml.generate(model, PROMPTS, vectors(), max_new_tokens=4, temperature=1.0, progress=False)
    elif what == "slice":
        ml.slice_model(model, PROMPTS, 1, 3)
    elif what == "steer":
        with ml.steer(model, vectors(1)), torch.random.fork_rng():  # the dropout here is the caller's own
            model(model.to_tokens("w1 w2"))


@pytest.mark.parametrize("what", ["fit", "generate", "slice", "steer"])
@pytest.mark.parametrize("error", [None, Interrupt, KeyboardInterrupt])
def test_no_trace_is_left_also_when_interrupted(any_model, what, error):
    any_model.train()
    own = []
    any_model.add_hook("blocks.2.hook_resid_pre", lambda activation, hook: own.append(1))
    next(nn.Module.parameters(any_model)).requires_grad_(False)
    before = snapshot(any_model)
    calls = [0]

    def interrupt(*_):
        calls[0] += 1
        if error is not None and calls[0] == (1 if what == "steer" else 3):
            raise error

    handle = any_model.blocks[2].register_forward_hook(interrupt)
    try:
        with torch.no_grad():
            if error is None:
                use(any_model, what)
            else:
                with pytest.raises(error):
                    use(any_model, what)
    finally:
        handle.remove()
    try:
        assert_same(before, snapshot(any_model))
        assert own  # the user's own hook ran
    finally:
        any_model.reset_hooks()
        next(nn.Module.parameters(any_model)).requires_grad_(True)
        any_model.eval()


def test_gradients_that_are_off_do_not_matter(model):
    arguments = {"n_vectors": 2, "radius": 2.0, "n_steps": 3, "progress": False}
    expected = ml.fit_vectors(model, "w1 w2", 1, 3, **arguments).values
    with torch.no_grad():
        assert torch.equal(ml.fit_vectors(model, "w1 w2", 1, 3, **arguments).values, expected)
    with torch.inference_mode():
        assert torch.equal(ml.fit_vectors(model, "w1 w2", 1, 3, **arguments).values, expected)


@pytest.mark.parametrize("way", ["steer", "run_with_hooks", "hooks", "add_hook"])
def test_every_way_to_attach_adds_the_vector_exactly_once(any_model, way):
    one, tokens = vectors(1), any_model.to_tokens("w1 w2 w3")
    seen = {}

    def read(activation, hook):
        seen["z"] = activation.detach()

    name = "blocks.2.hook_resid_pre"
    any_model.run_with_hooks(tokens, fwd_hooks=[(name, read)])
    clean = seen["z"]
    if way == "run_with_hooks":
        any_model.run_with_hooks(tokens, fwd_hooks=[*one.hooks(), (name, read)])
    elif way == "hooks":
        with any_model.hooks(fwd_hooks=[*one.hooks(), (name, read)]):
            any_model(tokens)
    elif way == "add_hook":
        for hook in [*one.hooks(), (name, read)]:
            any_model.add_hook(*hook)
        any_model(tokens)
        any_model.reset_hooks()
    else:
        with ml.steer(any_model, one):
            any_model.run_with_hooks(tokens, fwd_hooks=[(name, read)])
    torch.testing.assert_close(seen["z"] - clean, one.values[0].expand_as(clean), atol=1e-4, rtol=1e-4)


def test_several_perturbations_steer_together(model):
    tokens = model.to_tokens("w1 w2 w3")
    with ml.steer(model, [vectors(1), vectors(1)]), torch.no_grad():
        twice = host_of(model).forward(tokens)
    with ml.steer(model, 2 * vectors(1)), torch.no_grad():
        torch.testing.assert_close(host_of(model).forward(tokens), twice, atol=1e-4, rtol=1e-4)


CHATS = [[{"role": "user", "content": "w1 w2"}], [{"role": "user", "content": "w3 w4 w5"}]]


def test_a_chat_is_continued_under_the_same_perturbation(any_model):
    steering = vectors()
    first = ml.generate(any_model, CHATS, steering, max_new_tokens=4, progress=False)
    second = first.continue_with("w9 w8")
    assert len(second) == len(first) and second.continuation is not None
    keys = ["prompt", "kind", "vector", "sign", "scale", "sample"]
    assert second.table[keys].equals(first.table[keys])
    random = ml.random_vectors(like=steering, seed=0)
    for before, after in zip(first.table.itertuples(), second.table.itertuples(), strict=True):
        said = any_model.tokenizer.decode(before.tokens)
        assert after.prompt_text == f"<bos> {CHATS[before.prompt][0]['content']} {said} w9 w8 w0"
        bias = torch.zeros(models.D_MODEL)
        if after.kind != "unsteered":
            bias = after.sign * (random if after.kind == "random" else steering).values[after.vector]
        ids = any_model.to_tokens(after.prompt_text, prepend_bos=False)[0].tolist()
        expected, gaps = one_by_one(any_model, ids, bias, 4)
        clear = next((i for i, gap in enumerate(gaps) if gap <= 1e-4), len(gaps))
        assert after.tokens[:clear] == expected[:clear]


def test_only_chats_fresh_from_the_model_continue(model):
    completions = ml.generate(model, "w1", None, max_new_tokens=1, progress=False)
    with pytest.raises(ValueError, match="only completions of chats"):
        completions.continue_with("w2")
    chat = ml.generate(model, "w1", None, max_new_tokens=1, chat=True, progress=False)
    assert chat.table.prompt_text[0] == "<bos> w1 w0" and len(chat.continue_with("w2")) == 1
    with pytest.raises(ValueError, match="only completions of chats"):
        chat.filter(kind="unsteered").continue_with("w2")


def test_each_chat_may_go_on_with_a_message_of_its_own(model):
    first = ml.generate(model, CHATS, vectors(), max_new_tokens=2, progress=False)
    messages = [f"w{5 + i}" for i in range(len(first))]
    second = first.continue_with(messages)
    for i, text in enumerate(second.table.prompt_text):
        assert text == f"<bos> {CHATS[first.table.prompt[i]][0]['content']} {first.table.text[i]} {messages[i]} w0"
    with pytest.raises(ValueError, match=f"1 messages were given for {len(first)} chats: give one for each, or one"):
        first.continue_with(messages[:1])


def test_an_empty_stop_text_is_refused(model):
    with pytest.raises(ValueError, match="empty string"):
        ml.generate(model, "w1", None, max_new_tokens=2, stop=["w2", ""], progress=False)


def test_completions_survive_a_parquet_file(model, tmp_path):
    completions = ml.generate(model, PROMPTS, vectors(), max_new_tokens=3, progress=False)
    completions.save(tmp_path / "c.parquet")
    loaded = ml.Completions.load(tmp_path / "c.parquet")
    assert loaded.table.equals(completions.table) and loaded.settings == completions.settings
    assert loaded.table.vector.dtype == "Int64" and isinstance(loaded.table.tokens[0], list)


def test_variety_is_counted():
    rows = [(0, "p", "steered", 0, 1, 1.0, i, text, [], []) for i, text in enumerate(["a b a b", "a b a b", "c d e"])]
    row = ml.Completions(pd.DataFrame(rows, columns=COLUMNS)).distinct().iloc[0]
    assert (row.n_texts, row.n_distinct, row.distinct_2) == (3, 2, 4 / 8)


def test_rows_that_are_finished_stop_costing(directories, monkeypatch):
    model = models.bridge(directories("gpt2"))
    free = ml.generate(model, PROMPTS, vectors(4), max_new_tokens=8, progress=False).table
    often = pd.Series([token for tokens in free.tokens for token in tokens]).mode()[0]
    monkeypatch.setattr(hooks, "end_tokens", lambda model: {often})
    sizes = []
    handle = model.blocks[-1].register_forward_pre_hook(
        lambda block, args, kwargs: sizes.append(len(kwargs.get("hidden_states", *args[:1]))), with_kwargs=True
    )
    ended = ml.generate(model, PROMPTS, vectors(4), max_new_tokens=8, progress=False).table
    handle.remove()
    unfinished = sum(often not in tokens[:-1] for tokens in free.tokens)
    assert sum(sizes[: len(PROMPTS)]) == len(free) and sizes[-1] <= unfinished / 0.9
    for whole, cut in zip(free.tokens, ended.tokens, strict=True):
        assert cut == whole[: whole.index(often) if often in whole else len(whole)]


def test_an_end_token_beyond_the_vocabulary_is_none(model, monkeypatch):
    host = host_of(model)
    for last, ends in ((host.cfg.d_vocab - 1, {2, host.cfg.d_vocab - 1}), (host.cfg.d_vocab, {2})):
        monkeypatch.setattr(type(model.tokenizer), "eos_token_id", last, raising=False)
        assert hooks.end_tokens(host) == ends

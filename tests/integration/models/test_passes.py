"""Does generation notice when a model's cache can't be believed, and write what a pass without cache writes?"""

import warnings
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import melbo_lens as ml
from melbo_lens.models import hooks, passes
from melbo_lens.models.access import host_of
from melbo_lens.models.reading import log_probs_after
from tests import architectures, models
from tests.integration.generation.test_generate import PROMPTS, one_by_one, vectors


@pytest.fixture(params=["bridge", "hooked"])
def forgetful(request, directories):
    """A model whose cache loses all but the last token, as in bridges whose attention gets it under another name."""
    if request.param == "hooked" and not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = models.hooked(directories("gpt2")) if request.param == "hooked" else models.bridge(directories("llama"))
    step = passes.Decoder.step

    def forgets(self, tokens, steered):
        if self.cache is not None and tokens.shape[1] == 1:
            if request.param == "hooked":
                for entry in self.cache.entries:
                    entry.past_keys, entry.past_values = entry.past_keys * 0, entry.past_values * 0
            else:
                for layer in self.cache.layers:
                    layer.keys, layer.values = layer.keys * 0, layer.values * 0
        return step(self, tokens, steered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.Decoder, "step", forgets)
        yield model


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_a_cache_that_forgets_is_found_out_and_the_text_is_right(forgetful, positions):
    steering = vectors()
    with pytest.warns(
        UserWarning,
        match=f"without a cache.*transformers {version('transformers')}"
        f".*transformer_lens {version('transformer_lens')}",
    ) as said:
        table = ml.generate(
            forgetful,
            PROMPTS,
            steering,
            max_new_tokens=5,
            batch_size=6,
            positions=positions,
            include_random=False,
            progress=False,
        ).table
    assert len(said) == 1  # of three batches
    rows = ml.slice_model(forgetful, PROMPTS, 1, 3).batch.rows()
    compared = 0
    for row in table.itertuples():
        bias = torch.zeros(models.D_MODEL) if row.kind == "unsteered" else row.sign * steering.values[row.vector]
        expected, gaps = one_by_one(forgetful, rows[row.prompt], bias, 5, positions)
        clear = next((i for i, gap in enumerate(gaps) if gap <= 1e-4), len(gaps))
        assert row.tokens[:clear] == expected[:clear]
        compared += clear
    assert compared > 40


def test_a_row_of_one_token_proves_no_cache(directories, monkeypatch):
    """All that it attends to is the same, whatever keys the cache loses."""
    host, step = host_of(models.bridge(directories("llama"))), passes.Decoder.step

    def loses_keys(self, tokens, steered):
        if self.cache is not None and tokens.shape[1] == 1:
            for layer in self.cache.layers:
                layer.keys = layer.keys * 0
        return step(self, tokens, steered)

    monkeypatch.setattr(passes.Decoder, "step", loses_keys)
    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, [[5, 9, 13, 21, 30, 8], [26]], lambda rows: [])
        decoder.first()
        with pytest.warns(UserWarning, match="without a cache"):
            decoder.next(torch.tensor([7, 26]))


def test_padding_is_proved_by_the_row_that_has_the_most_of_it(directories, monkeypatch):
    """Also where that is a single token: with learned positions, wrong ones show in it."""
    host = host_of(models.bridge(directories("gpt2")))
    right = type(host).cached_logits

    def blind(self, tokens, mask, cache):
        return right(self, tokens, torch.ones_like(mask), cache)

    monkeypatch.setattr(type(host), "cached_logits", blind)
    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, [[5, 9, 13, 21, 30, 8], [26]], lambda rows: [])
        with pytest.warns(UserWarning, match="without a cache"):
            found = decoder.first()
        alone = host.forward(torch.tensor([[26]]))[0, -1]
    torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-4)


def test_a_witness_whose_logits_are_no_numbers_is_no_proof(directories, monkeypatch):
    host = host_of(models.bridge(directories("gpt2")))
    errors = iter([0.0, float("nan")])
    monkeypatch.setattr(passes.Decoder, "_error", staticmethod(lambda found, expected: next(errors)))
    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, [[5, 9, 13], [26]], lambda rows: [])
        assert len(decoder._witnesses()) == 2 and not decoder._off(torch.zeros(2, 4)) <= 1.0


def test_a_cache_stays_in_doubt_until_a_row_of_different_tokens_was_compared(directories):
    host = host_of(models.bridge(directories("llama")))
    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, [[5], [6]], lambda rows: [])
        decoder.first()
        decoder.next(torch.tensor([5, 6]))
        assert decoder.doubtful
        decoder.next(torch.tensor([5, 7]))
        assert not decoder.doubtful


def test_log_probs_without_cache_are_those_of_the_steered_model(forgetful):
    steering = vectors(1)
    with pytest.warns(UserWarning, match="without a cache"):
        row = ml.generate(
            forgetful, PROMPTS[1], steering, max_new_tokens=4, signs=(1,), include_random=False, progress=False
        )[1].table.iloc[0]
    prompt = ml.slice_model(forgetful, PROMPTS[1], 1, 3).batch.rows()[0]
    with ml.steer(forgetful, steering), torch.no_grad():
        log_probs = host_of(forgetful).forward(torch.tensor([prompt + row.tokens])).log_softmax(-1)[0]
    assert row.log_probs == pytest.approx(
        [float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(row.tokens)], abs=1e-3
    )


@pytest.mark.parametrize("mixes", [False, True])
def test_a_cache_is_proved_again_after_rows_were_dropped(directories, monkeypatch, mixes):
    """It was believed before; then three rows of five are kept, and one that mixes them up is found out."""
    host = host_of(models.bridge(directories("llama")))
    drop = passes.Decoder._drop

    def dropped(self, places):
        done = drop(self, places)
        if mixes:
            self.cache.reorder_cache(torch.tensor([2, 0, 1]))
        return done

    monkeypatch.setattr(passes.Decoder, "_drop", dropped)
    rows = [[1, 5 + i, 9, 20 + i, 7][: 3 + i % 3] for i in range(5)]
    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, rows, lambda some: [])
        decoder.first()
        for token in (30, 31):
            decoder.next(torch.full((5,), token))
        assert decoder.cached and not decoder.doubtful and decoder.keep([0, 2, 4])
        with pytest.warns(UserWarning, match="without a cache") if mixes else nullcontext():
            logits = decoder.next(torch.full((3,), 32))
        for row, found in zip((0, 2, 4), logits, strict=True):
            alone = host.forward(torch.tensor([[*rows[row], 30, 31, 32]]))[0, -1]
            torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
    assert decoder.cached is not mixes


def test_where_a_cache_cannot_drop_rows_they_are_kept(directories, monkeypatch):
    model = models.bridge(directories("llama"))
    free = ml.generate(model, PROMPTS, vectors(4), max_new_tokens=6, include_random=False, progress=False).table
    end = max({t for row in free.tokens for t in row[1:3]}, key=lambda t: sum(t in row[1:3] for row in free.tokens))
    monkeypatch.setattr(hooks, "end_tokens", lambda model: {end})
    monkeypatch.setattr(passes.Decoder, "_drop", lambda self, places: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = ml.generate(model, PROMPTS, vectors(4), max_new_tokens=6, include_random=False, progress=False).table
    for whole, cut in zip(free.tokens, ended.tokens, strict=True):
        assert cut == (whole[: whole.index(end)] if end in whole else whole)


def test_a_good_cache_is_believed_in_every_class_of_model(any_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.generate(any_model, PROMPTS, vectors(), max_new_tokens=4, progress=False)


def test_logits_that_overflow_are_an_error_that_names_vector_scale_and_dtype(directories):
    model = models.bridge(directories("llama"), dtype=torch.float16)
    with pytest.raises(FloatingPointError, match=r"steered vector 1 at \+70000, .*float16.*smaller scales"):
        ml.generate(
            model,
            "w1 w2",
            vectors(2) * torch.tensor([1e-6, 1.0]),
            3,
            signs=(1,),
            scales=(1.0, 7e4),
            include_random=False,
            progress=False,
        )


def test_measures_refuse_overflow_too(directories):
    model = models.bridge(directories("llama"), dtype=torch.float16)
    loud = ml.SteeringVectors(torch.full((1, models.D_MODEL), 7e4), 1, provenance={"target_layer": 3})
    for measure in (ml.next_tokens, ml.target_effects, ml.objective, ml.output_effects, ml.activation_changes):
        with pytest.raises(FloatingPointError, match=r"vector.*0.* float16.*smaller"):
            measure(model, "w1 w2", loud) if measure is not ml.output_effects else measure(
                model, "w1 w2", loud, signs=(1,)
            )


def test_every_end_token_ends_a_chat_models_turn(directories):
    """The tokenizer's end token, and the one that the chat template writes after an answer.

    A HookedTransformer knows the latter from nowhere else.
    """
    model = models.hooked(directories("gpt2")) if models.HAS_HOOKED else models.bridge(directories("gpt2"))
    tokenizer = model.tokenizer
    assert hooks.end_tokens(host_of(model)) == {2}
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} w7 {% endfor %}"
    assert hooks.end_tokens(host_of(model)) == {2, 11}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} w8 {% endfor %}"  # a word ends nothing
    )
    assert hooks.end_tokens(host_of(model)) == {2}


def test_the_end_tokens_of_the_configuration_count(directories):
    model = models.bridge(directories("llama"))
    model.original_model.config.eos_token_id, model.original_model.generation_config.eos_token_id = [2, 9], 8
    assert hooks.end_tokens(host_of(model)) == {2, 8, 9}


def test_the_unembedding_sees_one_position_of_each_row(any_model):
    """It is the largest matrix of a real model, and logits of a whole batch of prompts fill the memory."""
    widths = []
    handle = any_model.unembed.register_forward_hook(lambda module, given, logits: widths.append(logits.shape[1]))
    try:
        ml.generate(any_model, ["w1 w2 w3 w4", "w5 w6"], None, max_new_tokens=3, progress=False)
    finally:
        handle.remove()
    assert widths and set(widths) == {1}


def _first_passes(host, rows, steering, positions="all"):
    """The logits after the prompts and after one more token, and how many rows the first and the last block saw."""
    seen = ([], [])
    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, rows, steering, positions)
        numbers = [
            (host.blocks[i], lambda block, given, output, kept=kept: kept.append(len(_stream(output))))
            for i, kept in zip((0, -1), seen, strict=True)
        ]
        with hooks.watched(after=numbers):
            logits = decoder.first()
        return logits, decoder.next(torch.full((len(rows),), 30)), *seen, decoder


def _stream(output):
    return output[0] if isinstance(output, tuple) else output


# rows of three prompts in turns, so that rows of one prompt don't lie together
TURNS = [([1, 5, 9], [1, 8, 3, 20, 7, 6], [1, 4])[i % 3] for i in range(27)]


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_blocks_before_the_first_steered_one_run_once_for_each_prompt(any_model, prompts, positions):
    """Then the logits, also those of the next step, are those of each row by itself."""
    host, steering = host_of(any_model), vectors(27, layer=2)
    rows = [TURNS[i % prompts] for i in range(27)]

    def steered(some):
        return steering.row_hooks(list(some), torch.ones(len(some)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, following, early, late, decoder = _first_passes(host, rows, steered, positions)
    # the last pass is the proof; in the others, rows of a prompt are one row before block 2
    assert early == [1] * prompts + [1] and decoder.cached and host.shares
    assert late == ([27 // prompts] * prompts if positions == "all" else [1] * prompts) + [1]
    last = slice(None) if positions == "all" else slice(-1, None)  # where the vector acts in the next step
    for i in range(27):

        def changed(activation, hook, bias=steering.values[i]):
            activation = activation.clone()
            activation[:, last] += bias
            return activation

        with torch.no_grad(), hooks.frozen(host):
            with hooks.attached(host, steered([i]) if positions == "all" else []):
                alone = host.forward(torch.tensor([rows[i]]))[0, -1]
            with hooks.attached(host, [(steering.hook_name, changed)]):
                after = host.forward(torch.tensor([[*rows[i], 30]]))[0, -1]
        torch.testing.assert_close(logits[i], alone, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(following[i], after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("layer", "rows"), [(0, 27), (2, 7)])
def test_a_pass_is_not_shared_where_that_saves_little(directories, layer, rows):
    host, steering = host_of(models.bridge(directories("llama"))), vectors(rows, layer=layer)
    early = _first_passes(host, TURNS[:1] * rows, lambda some: steering.row_hooks(list(some), torch.ones(len(some))))[2]
    assert early == [rows]


@pytest.mark.parametrize("fails", ["raises", "asserts", "unknown", "mixed rows", "NaN", "all but the first row"])
def test_where_a_pass_can_not_be_shared_every_row_runs(directories, monkeypatch, fails):
    """A cache that can't be joined, one of a kind that is not known, and logits that are wrong, if only of some rows.

    The first row of a prompt may be right where the others are not, as where attention takes a mask of one row.
    """
    host, spread = host_of(models.bridge(directories("llama"))), passes.Decoder._spread

    def joined(self, caches, n_rows, shared):
        if fails == "raises":
            raise TypeError("no such cache")
        assert fails == "unknown"

    def spoilt(self, rows, depth):
        logits, cache = spread(self, rows, depth)
        wrong = {"mixed rows": logits.flip(0), "NaN": logits * torch.nan}
        return wrong.get(fails, torch.cat([logits[:1], logits[1:] + torch.randn_like(logits[1:])])), cache

    if fails in ("raises", "asserts", "unknown"):
        monkeypatch.setattr(type(host), "joined", joined)
    else:
        monkeypatch.setattr(passes.Decoder, "_spread", spoilt)
    steering = vectors(9, layer=2)

    def steered(some):
        return steering.row_hooks(list(some), torch.ones(len(some)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, following, early, _, decoder = _first_passes(host, TURNS[:1] * 9, steered)
        again = _first_passes(host, TURNS[:1] * 9, steered)[2]
    assert early[-1] == 9 and decoder.cached
    assert again == [9]  # it is not tried a second time
    for i in (0, 5, 8):
        with torch.no_grad(), hooks.frozen(host), hooks.attached(host, steered([i])):
            alone, after = (host.forward(torch.tensor([[*TURNS[0], *more]]))[0, -1] for more in ([], [30]))
        torch.testing.assert_close(logits[i], alone, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(following[i], after, rtol=1e-3, atol=1e-3)


def test_recurrent_states_of_several_prompts_are_not_joined(tmp_path):
    """They are in dictionaries; rows that a cache doesn't have would be an error that a GPU can't go on from."""
    directory = architectures.save("lfm2", tmp_path)
    host = host_of(TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32))
    with torch.no_grad(), hooks.frozen(host):
        ids, mask = torch.tensor(TURNS[:1]), torch.ones(1, 3, dtype=torch.bool)
        caches = [host.cached_logits(ids, mask, host.start_cache(1))[1] for _ in range(2)]
    assert host.joined(caches, [1, 1], 0) is None


@pytest.mark.parametrize(("name", "attends"), [("lfm2", False), ("jamba", False), ("qwen2", True)])
def test_recurrent_states_are_told_from_keys_and_values(tmp_path, name, attends):
    directory = architectures.save(name, tmp_path)
    host = host_of(TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32))
    with torch.no_grad(), hooks.frozen(host):
        _, cache = host.cached_logits(torch.tensor(TURNS[:1]), torch.ones(1, 3, dtype=torch.bool), host.start_cache(1))
        assert host.only_attends(cache) is attends
        rows = [[7, 9, 11, 5, 6], [8, 10, 6, 9, 9]]
        found, trusted = log_probs_after(host, TURNS[0], rows)
    assert trusted is attends
    for row, one in zip(rows, found, strict=True):
        with torch.no_grad(), hooks.frozen(host):
            whole = host.forward(torch.tensor([[*TURNS[0], *row]]))[0].float().log_softmax(-1)
        expected = whole[2:-1].gather(1, torch.tensor(row)[:, None])[:, 0]
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


def test_a_row_of_one_token_proves_no_cache_to_a_reader(directories, monkeypatch):
    host = host_of(models.bridge(directories("llama")))
    prompt, rows = [25], [[25] * 5, [7, 30, 9]]
    with torch.no_grad(), hooks.frozen(host):
        expected, _ = log_probs_after(host, prompt, rows, cached=False)
        drop = type(host).drop_rows

        def forgets(self, cache, kept):
            for layer in cache.layers:
                layer.keys = layer.keys * 0  # which a row of one token doesn't show
            return drop(self, cache, kept)

        monkeypatch.setattr(type(host), "drop_rows", forgets)
        found, trusted = log_probs_after(host, prompt, rows)
        alike, _ = log_probs_after(host, prompt, [[25] * 3, [25] * 4])
    assert not trusted and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
    assert torch.allclose(alike[1], expected[0][:4], atol=1e-4)


def test_rows_can_be_dropped_after_a_shared_pass(any_model):
    host, steering = host_of(any_model), vectors(27, layer=2)

    def steered(some):
        return steering.row_hooks(list(some), torch.ones(len(some)))

    with torch.no_grad(), hooks.frozen(host):
        decoder = passes.Decoder(host, TURNS, steered)
        decoder.first()
        assert decoder.keep([1, 13, 26])
        found = decoder.next(torch.full((3,), 30))
        for logits, i in zip(found, (1, 13, 26), strict=True):
            with hooks.attached(host, steered([i])):
                alone = host.forward(torch.tensor([[*TURNS[i], 30]]))[0, -1]
            torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-3)


def test_a_few_prompts_are_shared_and_many_are_not(directories):
    host, steering = host_of(models.bridge(directories("llama"))), vectors(90, layer=2)

    def early(n_prompts):
        rows = [[1, 5 + i // 8, 9] for i in range(8 * n_prompts)]
        return _first_passes(host, rows, lambda some: steering.row_hooks(list(some), torch.ones(len(some))))[2]

    assert early(8) == [1] * 9 and early(9) == [72]

"""Does Inspect get what the library writes, in batches, under every control?"""

import asyncio
import inspect
import itertools
import time
import warnings

import pytest

pytest.importorskip("inspect_ai", reason="pip install 'melbo-lens[inspect]'")

import inspect_ai
import torch
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.tool import ToolInfo

import melbo_lens as ml
from melbo_lens.generation.decoding import Written
from melbo_lens.organisms import modes
from melbo_lens.serving import inspect_entry  # noqa: F401 (an installed package is found by its entry point)
from melbo_lens.serving.inspect_model import Call, Gathering, Settings, SteeredModelAPI
from tests import inspect_tasks, models

PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w3 w1"]


@pytest.fixture(scope="module")
def folder(directories, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    values = torch.randn(3, models.D_MODEL, generator=torch.Generator().manual_seed(3))
    ml.SteeringVectors(values, 1).rescaled(6.0).save(path)
    return directories("llama"), str(path)


def model(folder, **options):
    return get_model(f"melbo/{folder[0]}", device="cpu", memoize=False, **options)


def asked(api, prompts=PROMPTS, **config):
    """All prompts at once."""

    async def together():
        calls = [api.generate(prompt, config=GenerateConfig(**{"max_tokens": 6, **config})) for prompt in prompts]
        return await asyncio.gather(*calls)

    return asyncio.run(together())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "unsteered"),
        ({"index": 2, "scale": -0.5}, "steered"),
        ({"index": 2, "scale": -0.5, "random": True}, "random"),
    ],
)
def test_it_writes_what_generate_writes_in_one_batch(folder, build, options, kind, monkeypatch):
    if kind != "unsteered":
        options = {"vectors": folder[1], **options}
    api = model(folder, **options)
    batches, run = [], api.api.gathering.complete
    monkeypatch.setattr(api.api.gathering, "complete", lambda calls: (batches.append(len(calls)), run(calls)))
    found = asked(api, logprobs=True, top_logprobs=3)
    assert batches == [3]
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    vectors = ml.load(folder[1])
    written = ml.generate(build("llama"), chats, vectors, 6, signs=-1, scales=0.5, progress=False)
    rows = written.filter(kind=kind) if kind == "unsteered" else written.filter(kind=kind, vector=2)
    assert len(rows) == 3 and rows.table.text.nunique() == 3
    for output, (_, row), ids in zip(found, rows.table.iterrows(), rows.prompt_tokens, strict=True):
        assert output.completion == row.text and output.usage.input_tokens == len(ids)
        ended = len(row.tokens) < 6
        assert output.stop_reason == ("stop" if ended else "max_tokens")
        assert output.usage.output_tokens == len(row.tokens) + ended
        tokens = output.choices[0].logprobs.content
        assert [token.logprob for token in tokens] == pytest.approx(row.log_probs, abs=1e-4)
        assert all(token.top_logprobs[0].token == token.token for token in tokens)  # greedy
        assert all(len(token.top_logprobs) == 3 for token in tokens)
        assert output.metadata["kind"] == kind


def test_inspects_cache_holds_apart_what_is_written_under_different_options(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    other = str(tmp_path / "v.safetensors")
    vectors = {"vectors": other, "index": 2}
    several = [
        {},
        {"chat": False},
        vectors,
        {**vectors, "index": 0},
        {**vectors, "scale": -1.0},
        {**vectors, "random": True},
        {**vectors, "random": True, "seed": 1},
    ]

    def written(cache, **options):
        api, ran = model(folder, **options), []
        complete = api.api.gathering.complete
        monkeypatch.setattr(api.api.gathering, "complete", lambda calls: (ran.extend(calls), complete(calls)))

        async def ask():
            return await api.generate(PROMPTS[1], config=GenerateConfig(max_tokens=6), cache=cache)

        return asyncio.run(ask()).completion, len(ran)

    for factor in (1.0, -2.0):  # the same name for another file
        (factor * ml.load(folder[1])).save(other)
        kept = [written(True, **options) for options in several]
        assert kept[2:] == [written(False, **options) for options in several[2:]]
        assert all(ran == 1 for _, ran in kept[2:]) and len({text for text, _ in kept}) > 5
        assert [written(True, **options) for options in several] == [(text, 0) for text, _ in kept]  # it is a cache
    assert written(True, batch_size=2) == (kept[0][0], 0)  # what changes no text changes no key


def call(text=""):
    return Call(text, [], 1, Settings(1, 0.0, 1.0, None, (), 0))


def test_the_event_loop_goes_on_and_late_calls_join_the_next_batch():
    batches, ticks = [], []

    def slow(calls):
        batches.append(len(calls))
        time.sleep(0.3)
        for one in calls:
            one.written = [Written(text=one.text)]

    async def ask():
        gathering, calls = Gathering(slow, 4), [call(str(i)) for i in range(7)]

        async def late(one, delay):
            await asyncio.sleep(delay)
            return await gathering.answered(one)

        async def tick():
            while len(batches) < 2:
                ticks.append(time.monotonic())
                await asyncio.sleep(0.01)

        cancelled = asyncio.create_task(late(call(), 0.15))
        answers = asyncio.gather(*(late(one, 0.1 * (i > 1)) for i, one in enumerate(calls)), tick())
        await asyncio.sleep(0.2)
        cancelled.cancel()
        found = await answers
        assert [one.text for (one,) in found[:-1]] == [*"0123456"] and not gathering.waiting

    asyncio.run(ask())
    assert batches == [2, 4, 1]  # what came during a batch is the next one, and what was cancelled is in none
    assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.2


def test_only_the_call_that_is_to_blame_fails():
    bad = call("bad")

    def complete(calls):
        if bad in calls:
            raise FloatingPointError("NaN")
        for one in calls:
            one.written = [Written(text="fine")]

    async def ask():
        gathering = Gathering(complete, 8)
        calls = (gathering.answered(one) for one in (call(), bad, call()))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert first[0].text == third[0].text == "fine" and isinstance(second, FloatingPointError)


def test_sampling_repeats_with_a_seed_and_not_without(folder):
    api = model(folder, vectors=folder[1], index=0)
    texts = lambda prompts=PROMPTS, **config: [one.completion for one in asked(api, prompts, **config)]  # noqa: E731
    seeded = texts(temperature=2.0, seed=5)
    assert seeded == texts(temperature=2.0, seed=5) and seeded != texts(temperature=2.0, seed=6)
    assert texts(PROMPTS[1:], temperature=2.0, seed=5) == seeded[1:]  # whatever else is in the batch
    assert len(set(texts(PROMPTS[:1] * 5, temperature=2.0))) > 1
    assert texts(temperature=2.0, seed=5, top_p=1e-6) == texts() != seeded
    several = asked(api, PROMPTS[:1], temperature=2.0, seed=5, num_choices=3)[0]
    assert len(several.choices) == 3 and several.choices[0].message.text == seeded[0]
    assert len({choice.message.text for choice in several.choices}) > 1


def test_a_stop_cuts_the_text_and_a_full_context_ends_it(folder):
    api = model(folder)
    (whole,) = asked(api, PROMPTS[:1])
    words = whole.completion.split()
    (stopped,) = asked(api, PROMPTS[:1], stop_seqs=[words[2]])
    assert stopped.completion.split() == words[: words.index(words[2])] and stopped.stop_reason == "stop"
    for n, stop in ((1, words[1]), (1, f" {words[1]}"), (0, words[0]), (0, f"{words[0][-1]} {words[1]}")):
        (cut,) = asked(api, PROMPTS[:1], stop_seqs=[stop], logprobs=True, top_logprobs=2)
        tokens = [token.token for token in cut.choices[0].logprobs.content]
        assert tokens == words[:n] and cut.completion.startswith(" ".join(tokens)), stop
    long = " ".join(["w1"] * (models.N_CTX - 5))  # with the begin token and the template's word three are left
    (full,) = asked(api, [long], max_tokens=30)
    assert full.stop_reason == "model_length" and full.usage.output_tokens == 3
    with pytest.raises(ValueError, match="context n_ctx holds 64"):
        asked(api, [long + " w1 w1 w1"])


def test_what_it_can_not_do_is_said_in_a_sentence(folder, tmp_path):
    refused = [
        ({"vectors": folder[1]}, "must be one of 0 to 2"),
        ({"vectors": folder[1], "index": 3}, "must be one of 0 to 2"),
        ({"random": True}, "none are given"),
        ({"vectors": folder[1], "index": 0, "scale": 0}, "other than 0"),
        ({"vectors": str(tmp_path / "none.pt")}, "no file"),
        ({"strength": 2}, "no options"),
        ({"batch_size": 0}, "batch_size=0"),
    ]
    for options, said in refused:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            model(folder, **options)
    for options in ({"vectors": folder[1], "index": 0, "random": "false"}, {"chat": "no"}):
        (name, value), api = list(options.items())[-1], object.__new__(SteeredModelAPI)
        with pytest.raises(ValueError, match=f"{name}='{value}' must be True or False"):
            inspect.unwrap(SteeredModelAPI.__init__)(api, folder[0], **options)  # without the tests' check of types
    api = model(folder)
    for config, said in [
        ({"top_k": 3}, "doesn't follow"),
        ({"num_choices": 2}, "temperature"),
        ({"top_p": 2}, "top_p"),
    ]:
        with pytest.raises(ValueError, match=said):
            asked(api, **config)
    tool = ToolInfo(name="search", description="searches")
    image = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,")])
    called = ChatMessageTool(content="found", tool_call_id="1")
    for chat, tools, said in [([], [tool], "calls no tools"), ([image], [], "text only"), ([called], [], "text only")]:
        with pytest.raises(ValueError, match=said):
            asyncio.run(api.api.generate(chat, tools, "auto", GenerateConfig()))


def test_tasks_run_steered_random_and_unsteered_on_an_organism(tmp_path):
    organism = ml.organisms.load("modes")
    words = modes.TRIGGERS["portuguese"]
    triggered = [prompt for prompt in organism.prompts["triggered"] if any(word in prompt for word in words)][:12]
    path = str(tmp_path / "v.safetensors")
    ml.fit_contrastive(organism.model, triggered, organism.prompts["clean"][:12], 2).save(path)
    found = {}
    for kind, options in {
        "steered": {"vectors": path, "scale": 2.0},
        "random": {"vectors": path, "scale": 2.0, "random": True},
        "unsteered": {},
    }.items():
        logs = inspect_ai.eval(
            [inspect_tasks.behavior(), inspect_tasks.capitals()],
            model=get_model("melbo/modes", device="cpu", chat=False, memoize=False, **options),
            log_dir=str(tmp_path / kind),
            display="none",
        )
        assert [log.status for log in logs] == ["success", "success"], [log.error for log in logs]
        for log, n in zip(logs, (6, len(inspect_tasks.CAPITALS)), strict=True):
            assert log.results.completed_samples == log.results.scores[0].scored_samples == n, kind
            assert {sample.output.metadata["kind"] for sample in log.samples} == {kind}
        found[kind] = [next(iter(log.results.scores[0].metrics.values())).value for log in logs]
    assert found["steered"][0] > 0.5 and found["random"][0] == found["unsteered"][0] == 0
    assert found["unsteered"][1] == 1.0 > found["steered"][1]


def test_one_token_has_one_text_and_its_own_bytes(folder, monkeypatch):
    """Of a tokenizer that writes parts of characters, as most do."""
    api = model(folder)
    tokenizer = api.api.host.tokenizer
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: "\ufffd" * len(ids))
    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", lambda self, i: f"<0x{0x80 + i:02X}>")
    (found,) = asked(api, PROMPTS[:1], logprobs=True, top_logprobs=3)
    for token in found.choices[0].logprobs.content:
        (chosen,) = [top for top in token.top_logprobs if top.token == token.token]
        assert chosen.bytes == token.bytes and token.token == f"\\x{token.bytes[0]:02x}" and len(token.bytes) == 1


def test_a_random_adapter_that_was_not_fitted_needs_prompts(folder, build, tmp_path):
    """Its control has the update's norm over them, so an evaluation that lacks them does not begin."""
    learned = ml.fit_cpe(build("llama"), "w1 w2", [0, 1], 4, n_factors=1, n_steps=1, scale=3.0, progress=False)
    ml.export(learned, "peft", tmp_path / "lora", model=build("llama"))
    options = {"vectors": str(tmp_path / "lora"), "random": True}
    with pytest.raises(ValueError, match="-M prompts="):
        model(folder, **options)
    for prompts in ("w1 w2", ["w1 w2", "w3"]):
        api = model(folder, prompts=prompts, **options)
        chats = [[{"role": "user", "content": text}] for text in ([prompts] if isinstance(prompts, str) else prompts)]
        control = ml.random_like(ml.load(tmp_path / "lora"), api.api.host.model, chats)
        assert torch.equal(api.api.bank.scales, control.scales) and asked(api)[0].metadata["kind"] == "random"
    with pytest.raises(ValueError, match="leave them out"):
        model(folder, vectors=folder[1], index=0, prompts="w1")


def test_a_vector_of_other_weights_is_used_with_a_warning(folder, build, tmp_path):
    path = tmp_path / "v.safetensors"
    ml.fit_vectors(build("llama"), "w1 w2", 1, 3, n_vectors=1, radius=2.0, n_steps=1, progress=False).save(path)
    other = models.save("llama", tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match="other weights than those of this model"):
        api = model((other, ""), vectors=str(path))
    assert asked(api)[0].metadata["kind"] == "steered"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(folder, vectors=str(path))


def test_messages_without_a_template_are_lines(folder):
    api = model(folder, chat=False)
    chat = [ChatMessageSystem(content="w5"), ChatMessageUser(content="w1 w2")]
    (found,) = asked(api, [chat])
    written = ml.generate(api.api.host.model, "w5\nw1 w2", None, 6, progress=False)
    assert found.completion == written.table.text[0]

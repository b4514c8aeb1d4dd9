"""What can be done from a shell?  Each command parses its options, calls public functions and writes files."""

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from melbo_lens.serving.harmless import harmless, shown

app = typer.Typer(
    help="Find what a language model hides: unsupervised steering vectors (MELBO).",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()

# these options are shared by several commands
Model = Annotated[
    str, typer.Option(help='"smollm2" and other organisms, a name on the Hugging Face hub, or a directory')
]
Prompt = Annotated[list[str], typer.Option(help="may be given several times")]
Out = Annotated[Path, typer.Option(file_okay=False, help="folder to write to")]
Seed = Annotated[int, typer.Option(help="seed of the starts")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="prompts are a user's messages; default: if the tokenizer has a chat template"
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Device = Annotated[str | None, typer.Option(help="as torch names it; default: chosen by TransformerLens")]
Kept = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="folder that keeps what is finished: the same command, given again, goes on"),
]
EngineName = Annotated[str, typer.Option(help="here, or ray (which needs a folder that keeps)")]


@app.callback()
def prepare() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.formatwarning = lambda message, *_: f"warning: {harmless(message)}\n"  # it may quote a file
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack letters that a model writes


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="folder for the vectors, the completions and the page")
    ] = Path("demo-output"),
    budget: Annotated[float, typer.Option(help="seconds for the search")] = 25.0,
    seed: Seed = 0,
) -> None:
    """Search the bundled organism from one clean prompt and show which vectors elicit what it hides."""
    with console.status("loading torch and the organism"):
        import melbo_lens as ml
        from melbo_lens import files
        from melbo_lens.search.cards import cards_of

        organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][0]
    with _errors_in_a_sentence():
        out.mkdir(parents=True, exist_ok=True)
        found = ml.discover(
            organism.model, prompt, budget, organism.behaviors, heldout=organism.prompts["selection"][:16], seed=seed
        )
        page = ml.Findings.of_discovery(
            organism.model, prompt, found, organism.behaviors, "What the modes organism hides"
        )
        page.save(out)
        files.write_text(out / "groups.csv", found.table.to_csv(index=False))
        _remember(out, "modes")
        ml.report_directory(out)
    _show(f"\n{found.said}")
    _show(f"prompt: {prompt}")
    written = found.written
    (unsteered,) = written.plain.values()
    _show(f"unsteered: {unsteered}\n")
    title = f"{len(written.directions)} vectors learned from this prompt alone, each with both signs: what they elicit"
    table = Table(title=shown(title), show_lines=True)
    for heading in ("behaviour", "vectors", "steered", "random", "unsteered", "best, held out", "for example"):
        table.add_column(heading)
    cards = {card.name: card for card in cards_of(written)}
    for name, shows in organism.behaviors.items():
        if (card := cards.get(name)) is None:
            _add_row(table, name, "0", "0.0%", "", f"{shows(unsteered):.1%}", "", "not found")
            continue
        rates = (f"{rate:.1%}" for rate in (card.learned.share, card.random.share, float(shows(unsteered))))
        _add_row(table, name, str(card.n_vectors), *rates, f"{card.heldout:.0%}", card.example)
    console.print(table)
    _show(f"open {out}/report.html; its data are beside it")


@app.command()
def reproduce(
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("reproduction.json"),
    real: Annotated[bool, typer.Option("--real", help="on the organisms of SmolLM2 (about an hour)")] = False,
    directory: Kept = None,
    engine: EngineName = "here",
) -> None:
    """Repeat the post's results on the organisms with controls, and show which thresholds hold (a few minutes)."""
    with console.status("loading torch and the organisms"):
        from melbo_lens import files
        from melbo_lens.studies import claims, reproduction
    with _errors_in_a_sentence():
        if out.is_dir() or not out.absolute().parent.is_dir():  # said before the work, which takes long
            raise ValueError(f"--out {out} must be a file in a folder that exists.")
        results = reproduction.reproduce(
            suite=claims.REAL if real else claims.TINY, directory=directory, engine=cast(Any, engine)
        )
        files.write_json(out, results)
    rows = reproduction.table(results)
    table = Table(
        title=shown(f"seeds {', '.join(map(str, results['settings']['seeds']))}; {results['seconds']} seconds"),
        show_lines=True,
    )
    # all controls share one column, so that the table fits a terminal of 80 columns
    for heading in ("result", "the post", "here", "95 %", "\n".join(reproduction.CONTROLS), "sec.", "holds"):
        table.add_column(heading)
    for row in rows.to_dict("records"):
        controls = "\n".join(row[control] for control in reproduction.CONTROLS)
        result = f"{row['experiment']}: {row['measure']}"
        cells = (result, row["the post"], row["here"], row["95 % interval"], controls, row["seconds"], row["holds"])
        _add_row(table, *cells)
    console.print(table)
    _show(f"wrote {out}", soft_wrap=True)
    if not (rows.holds == "yes").all():
        raise typer.Exit(1)


@app.command()
def fit(
    model: Model,
    prompt: Prompt,
    source_layer: Annotated[int, typer.Option(help="vectors are added at this layer's MLP output")],
    target_layer: Annotated[int, typer.Option(help="the change is measured in the stream that enters this layer")],
    out: Out,
    n_vectors: Annotated[int, typer.Option(help="how many")] = 32,
    radius: Annotated[str, typer.Option(help='their norm, or "auto"')] = "auto",
    optimizer: Annotated[str, typer.Option(help='"power" or "adamw"')] = "power",
    orthogonal: Annotated[bool, typer.Option(help="make each vector orthogonal to those before it")] = True,
    last: Annotated[
        int,
        typer.Option(help="count the change at the last so many positions; 0: at all but a first one that is a sink"),
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="length of the completions; 0: none")] = 32,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    chat: Chat = None,
) -> None:
    """Learn vectors on a model, generate with them, and write vectors, completions and a page."""
    loaded = _load(model, dtype, device)
    import melbo_lens as ml
    from melbo_lens.arguments import count
    from melbo_lens.methods.fitting import Optimizer
    from melbo_lens.models.access import host_of
    from melbo_lens.prompts import tokenize
    from melbo_lens.reports import saved
    from melbo_lens.serving.conversation import MODEL_FILE

    prompts = _asked(loaded, prompt, chat)
    with _errors_in_a_sentence():
        for name, value in (("--last", last), ("--max-new-tokens", max_new_tokens)):
            count(name, value, least=0)
        tokenize(host_of(loaded), prompts, n_new_tokens=max_new_tokens)  # before the fit, which may take long
        positions = slice(-last, None) if last else None
        out.mkdir(parents=True, exist_ok=True)
        vectors = ml.fit_vectors(
            loaded,
            prompts,
            source_layer,
            target_layer,
            n_vectors=n_vectors,
            radius=_radius(radius),
            target_positions=positions,
            orthogonal=orthogonal,
            optimizer=cast(Optimizer, optimizer),  # `fit_vectors` refuses any other text
            seed=seed,
            checkpoint=out / "fit.checkpoint",
        )
        found = None
        if max_new_tokens:
            completions = ml.generate(loaded, prompts, vectors, max_new_tokens=max_new_tokens, seed=seed)
            found = ml.Findings.measured(loaded, prompts, vectors, completions, title=f"Vectors of {model}")
        saved.forget(out)  # what an earlier run left here is not of these vectors
        vectors.save(out / saved.VECTORS)
        _remember(out, model, dtype, device)
        if found is not None:
            found.save(out)
            ml.report_directory(out)
        (out / "fit.checkpoint").unlink()
    _show(repr(vectors))
    written = [*(saved.left_by_a_run(out) or [saved.VECTORS]), MODEL_FILE]
    written = [name for name in written if (out / name).is_file()]
    _show(f"wrote {', '.join(written)} to {out}", soft_wrap=True)


@app.command()
def discover(
    model: Model,
    prompt: Prompt,
    out: Out,
    heldout: Annotated[list[str] | None, typer.Option(help="prompts to score on; may be given several times")] = None,
    budget: Annotated[float, typer.Option(help="seconds")] = 60.0,
    max_new_tokens: Annotated[int, typer.Option(help="length of the completions; what comes later is not seen")] = 16,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    chat: Chat = None,
    directory: Kept = None,
    engine: EngineName = "here",
) -> None:
    """Search a model that you know nothing of: layers, radii and vectors, within a time budget. Then write a page."""
    loaded = _load(model, dtype, device)
    import melbo_lens as ml
    from melbo_lens import files
    from melbo_lens.reports import saved

    prompts = _asked(loaded, prompt, chat)
    with _errors_in_a_sentence():
        out.mkdir(parents=True, exist_ok=True)
        asked = _asked(loaded, heldout, chat, say=False) if heldout else None
        what = loaded if engine == "here" else ml.ModelKey(model, dtype, device)
        found = ml.discover(
            what,
            prompts,
            budget,
            heldout=asked,
            max_new_tokens=max_new_tokens,
            seed=seed,
            directory=directory,
            engine=cast(Any, engine),
        )
        title = f"What {model} hides"
        page = ml.Findings.of_discovery(loaded, prompts, found, title=title) if len(found.table) else None
        saved.forget(out)  # what an earlier run left here is not of this search
        files.write_text(out / "groups.csv", found.table.to_csv(index=False))
        _remember(out, model, dtype, device)
        if page is not None:
            page.save(out)
            saved.write_groups(found, out)
            ml.report_directory(out)
    table = Table(title=shown(found), show_lines=True)
    headings = ("card", "example", "layers", "radius, in\nnorms of\nthe stream", "vectors", "random", "held out")
    for heading in headings if asked else headings[:-1]:
        table.add_column(heading)
    for number, entry in enumerate(found.table.head(20).itertuples(), 1):
        layers, rates = f"{entry.source_layer} to {entry.target_layer}", [f"{entry.random_rate:.1%}"]
        if asked:
            rates.append(f"{entry.heldout_rate:.0%}" if entry.heldout_rate == entry.heldout_rate else "")
        cells = (str(number), entry.example, layers, f"{entry.relative_radius:.3g}", str(entry.n_vectors), *rates)
        _add_row(table, *cells)
    console.print(table)
    if not len(found.table):
        _show(f"no group was found: wrote groups.csv, which has no row, to {out}", soft_wrap=True)
        return
    if not asked:
        _show("with --heldout and other prompts, it also says which groups come back on those")
    _show(f"wrote groups.csv, a vector for each of the first groups, and report.html to {out}", soft_wrap=True)


@app.command()
def sweep(
    plan: Annotated[Path, typer.Argument(help="YAML: model, prompts, and trials whose lists stand for combinations")],
    out: Out,
    engine: EngineName = "here",
    shard: Annotated[
        str | None, typer.Option(help="I/N runs every N-th trial from the I-th on; default: Slurm's array task, if any")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray's actors; default: one for each GPU or core")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="run trials that failed again")] = False,
) -> None:
    """Run the trials of a plan that the folder lacks. The same command, given again, goes on."""
    import yaml

    import melbo_lens as ml
    from melbo_lens.sweeps.jobs import jobs_of

    part = None
    if shard is not None:
        numbers = shard.split("/")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise typer.BadParameter("a shard is I/N, as --shard 3/16.")
        part = (int(numbers[0]), int(numbers[1]))
    with _errors_in_a_sentence():
        try:
            said = yaml.safe_load(plan.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{plan} is no YAML: {error}") from error
        jobs = jobs_of(said)
        for outcome in ml.sweep(jobs, out, cast(Any, engine), shard=part, n_workers=workers, retry=retry):
            if outcome.failure is not None:
                _show(repr(outcome), "failed: ", soft_wrap=True)
        table = ml.merge(out)
        table.to_csv(out / "trials.csv", index=False)
    _show(f"{ml.status(out)!r}; wrote {out / 'trials.csv'}", soft_wrap=True)


@app.command()
def status(directory: Annotated[Path, typer.Argument(help="folder of a sweep")]) -> None:
    """Say how far the sweeps of a folder are, and why trials failed."""
    import melbo_lens as ml

    with _errors_in_a_sentence():
        found = ml.status(directory)
    _show(repr(found))
    for digest, reason in found.failures.items():
        _show(f"{digest}: {reason}", soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="folder that `fit`, `demo`, `discover` or `sweep` wrote")],
    behavior: Annotated[
        list[str] | None, typer.Option(help="NAME=REGULAR EXPRESSION to count; may be given several times")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the page; default: report.html in the folder")] = None,
) -> None:
    """Write the page of a run again, from its folder, without the model."""
    import melbo_lens as ml

    asked = [entry.partition("=") for entry in behavior or []]
    if not all(name and equals for name, equals, _ in asked):
        raise typer.BadParameter("a behavior is NAME=REGULAR EXPRESSION, as --behavior 'portuguese=a resposta'.")
    if len({name for name, _, _ in asked}) < len(asked):
        raise typer.BadParameter("two behaviors have one name: give each its own, or one expression, as 'a|b'.")
    with _errors_in_a_sentence():
        path = ml.report_directory(directory, {name: how for name, _, how in asked}, out)
    _show(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)


@app.command()
def chat(
    directory: Annotated[Path | None, typer.Argument(help="folder that `fit`, `discover` or `demo` wrote")] = None,
    model: Annotated[str | None, typer.Option(help="the model, as for `fit`; default: that of the folder")] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="a file of vectors or adapters, also of another tool; default: the folder's")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="the layer, if a file of another tool doesn't say it")] = None,
    vector: Annotated[int, typer.Option(help="which of them to begin with, from 0")] = 0,
    scale: Annotated[float, typer.Option(help="the multiple at which it is added; negative for the other sign")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="the longest answer")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Talk to the steered and the unsteered model side by side; /help lists what can be changed meanwhile."""
    import melbo_lens as ml
    from melbo_lens.serving.conversation import Conversation, what_to_open
    from melbo_lens.serving.terminal import talk

    with _errors_in_a_sentence():
        key, found = what_to_open(
            directory, None if model is None else ml.ModelKey(model, dtype, device), vectors, layer=layer
        )
        with console.status("loading torch and the model"):
            loaded = key.load()
        conversation = Conversation(
            *(loaded, found, key, vector, 1 if scale > 0 else -1, abs(scale), max_new_tokens, temperature, seed)
        )
    talk(conversation, console, lambda: console.input("> "))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="what `save` wrote, or a file of another tool")],
    format: Annotated[
        str,
        typer.Option(help="peft, transformers, gguf, gguf-lora, vllm-lens, easysteer, hotwire, lm-eval or neuronpedia"),
    ],
    out: Annotated[Path, typer.Option(help="file or folder to write")],
    index: Annotated[
        int | None, typer.Option(help="which vector or adapter of the file, from 0; default: its only one")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="the layer, if a file of another tool doesn't say it")] = None,
    model: Annotated[
        str | None, typer.Option(help="the model to compare with, as for `fit`; some formats can't do without")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Write one vector or adapter in another tool's format, after comparing it with the model."""
    import melbo_lens as ml

    with _errors_in_a_sentence():
        value = ml.load(file, layer=layer)
        chosen = value if index is None else value[index]
    settings = {} if model is None else {"model": _load(model, dtype, device)}
    with _errors_in_a_sentence():
        path = ml.export(chosen, format, out, **settings)
    _show(repr(chosen))
    _show(f"wrote {path}", soft_wrap=True)


def _show(text: object, before: str = "", **settings: Any) -> None:
    """Shows a line that may hold foreign text, after a red word."""
    console.print(Text.assemble((before, "red"), shown(text)), **settings)


def _add_row(table: Table, *cells: str) -> None:
    """Adds a row of foreign texts."""
    table.add_row(*map(shown, cells))


def _radius(said: str) -> float | Literal["auto"]:
    try:
        return "auto" if said == "auto" else float(said)
    except ValueError:
        raise ValueError(f"--radius {said!r} must be a number, or auto.") from None


def _asked(model: Any, prompts: list[str], chat: bool | None, say: bool = True) -> list[Any]:
    """Returns the prompts as they are, or as a user's messages, and tells which."""
    as_chat = bool(getattr(model.tokenizer, "chat_template", None)) if chat is None else chat
    if say:
        how = "a user's messages, as the tokenizer's chat template writes them" if as_chat else "plain text"
        _show(f"prompts are given as {how}")
    return [[{"role": "user", "content": prompt}] for prompt in prompts] if as_chat else prompts


def _load(model: str, dtype: str, device: str | None) -> Any:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"dtype {dtype!r} must be float32, bfloat16 or float16.")
    with _errors_in_a_sentence(), console.status("loading torch and the model"):
        import melbo_lens as ml

        return ml.ModelKey(model, dtype, device).load()


def _remember(out: Path, model: str, dtype: str = "float32", device: str | None = None) -> None:
    """Notes on which model the folder's vectors were learned, for `chat`."""
    import melbo_lens as ml
    from melbo_lens.serving.conversation import remember_model

    remember_model(out, ml.ModelKey(model, dtype, device))


@contextmanager
def _errors_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, RuntimeError, FloatingPointError, OSError, ImportError) as error:
        _show(error, "error: ")
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the `melbo-lens` command."""
    app()

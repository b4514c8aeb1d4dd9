"""Do imports follow the one order of the design, and stay where they belong?"""

import ast
from pathlib import Path

import pytest

import melbo_lens as ml

PACKAGE = Path(__file__).parents[2] / "melbo_lens"
# folders in the order of a perturbation's life, after the files that everything rests on and before the doors
ORDER = (
    "arguments randomness memory progress files tables texts prompts ascent perturbations imports models measures "
    "generation evaluation methods exports organisms sweeps search plots studies reports serving cli __main__ __init__"
).split()
# within a folder there is an order too, so that it has no circle
WITHIN = {
    "ascent": "manifolds objectives states sogi constraints adamw fixed_point",
    "perturbations": "rows sites updates card hub perturbation vectors adapters loading",
    "models": (
        "tally host hooks passes reading blocks hooked bridge access targets sinks reaching slices fidelity "
        "slicing counterparts trimming"
    ),
    "measures": "source controls radius changes output next_tokens directions ranking",
    "methods": (
        "provenance problem planning mean_change version_0_1_0 checkpoints fitting readable automatic calibrate "
        "low_rank derivatives melbo adapters cpe dct jacobian contrastive noise"
    ),
    "generation": "completions decoding steer generate",
    "evaluation": "judges openai_client rates coherence words departures",
    "imports": "gguf torch_files peft",
    "exports": (
        "standalone plain_models comparison weights layer_outputs gguf_files peft gguf_vectors gguf_lora transformers "
        "vllm_lens easysteer hotwire lm_eval neuronpedia"
    ),
    "sweeps": "trials running jobs tasks outcomes engines sweep",
    "search": "arms pace groups looks written cards rounds searching discovery discovering layers",
    "plots": "arrays text labels paper trees numbers rates drawing figures embedding tokens exploring",
    "reports": "measuring saved findings ladder limits again columns pictures page comparison report",
    "serving": "harmless inspect_entry inspect_model conversation terminal",
}
ONLY_IN = {"transformer_lens": {"models"}, "plotly": {"plots"}, "circuitsvis": {"plots"}}
# Files that attach hooks: to models of TransformerLens, and to plain Hugging Face models, where there may be no
# TransformerLens; the latter is also the code that an export writes, so it can import nothing of this package.
ATTACH = {"models/hooks.py", "exports/standalone.py"}
KNOW_CLASSES = {"access.py", "hooked.py"}  # the files of models/ that import TransformerLens
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    """The noun that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "melbo_lens":
                yield from (f"melbo_lens.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_files_before_it(path):
    here = part(path)
    for name in imported(path):
        if name.startswith("melbo_lens.") and (other := name.split(".")[1]) != here:
            assert ORDER.index(other) < ORDER.index(here), f"{here} imports {other}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if part(path) in WITHIN and path.stem != "__init__"], ids=lambda path: path.stem
)
def test_a_file_imports_only_from_files_before_it_in_its_folder(path):
    order = WITHIN[part(path)].split()
    for name in imported(path):
        if name.startswith(f"melbo_lens.{part(path)}."):
            assert order.index(name.split(".")[2]) < order.index(path.stem), f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_hides_in_a_function(path):
    """Exceptions are the front door and the CLI, which load torch late, and what only building a model needs."""
    late = [
        node
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    ]
    late = {ast.unparse(node) for node in late if isinstance(node, ast.Import | ast.ImportFrom)}
    if path.stem != "cli":
        assert not [line for line in late if "melbo_lens" in line], late


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_are_imported_where_they_belong(path):
    for name in imported(path):
        allowed = ONLY_IN.get(name.split(".")[0])
        assert allowed is None or part(path) in allowed, f"{path.name} imports {name}"
        assert not name.startswith("transformer_lens") or path.name in KNOW_CLASSES


@pytest.mark.parametrize("path", [path for path in FILES if part(path) == "ascent"], ids=lambda path: path.stem)
def test_pure_mathematics_imports_torch_only(path):
    standard = {"collections", "typing", "itertools", "dataclasses", "abc", "ast"}
    assert {name.removeprefix("melbo_lens.").split(".")[0] for name in imported(path)} - standard <= {
        "torch",
        "jaxtyping",
        "ascent",
    }


@pytest.mark.parametrize("path", [path for path in FILES if part(path) == "perturbations"], ids=lambda path: path.stem)
def test_a_value_knows_no_model(path):
    """So a server can load a vector without TransformerLens."""
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("melbo_lens.")}
    assert inside <= {"arguments", "files", "tables", "ascent", "perturbations"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_files_first_line_asks_the_question_that_it_answers(path):
    first = ast.get_docstring(ast.parse(path.read_text()))
    assert (first and first.splitlines()[0].strip()) or (path.name == "__init__.py" and not path.read_text())


def test_no_public_name_hides_a_file():
    files = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "organisms",
        "plots",
        "__init__",
    }
    assert not files & set(ml.__all__)


def test_every_public_name_is_there_and_said_to_type_checkers():
    imports = [
        node for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())) if isinstance(node, ast.ImportFrom)
    ]
    declared = {alias.asname for node in imports for alias in node.names} - {None}
    assert declared >= set(ml.__all__) and declared == {*ml.__all__, *ml._HOME_OF}
    assert all(getattr(ml, name) is not None for name in declared) and set(ml.__all__) <= set(dir(ml))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        print(ml.nothing)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_two_files_attach_hooks_and_none_touches_what_is_not_ours(path):
    """Forward hooks, the global random state, unpickling, and TransformerLens' private methods."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert (
                node.attr not in ("register_forward_hook", "register_forward_pre_hook", "add_hook")
                or str(path.relative_to(PACKAGE)) in ATTACH
            ), node.attr
            assert ast.unparse(node) not in (
                "torch.manual_seed",
                "torch.set_default_dtype",
                "torch.set_default_device",
                "torch.set_grad_enabled",
            )
            assert not ast.unparse(node).startswith(("model._", "self.model._")), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert {"weights_only": "True"}.items() <= {
                keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords
            }.items()

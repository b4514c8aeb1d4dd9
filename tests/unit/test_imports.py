"""Do imports follow the one order of the design, and stay where they belong?"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "melbo_lens"
ORDER = (
    "arguments randomness files tables prompts hooks passes blocks mlp sliced_model objectives manifolds optimization factors "
    "perturbations updates adapters adapter_effects controls calibration methods completions decoding steering output_effects "
    "differences expectations evaluation serialization export layer_scan discovery plots page results organisms cli __main__ __init__ "
).split()
# what a file may be asked to do for a value by a local import
DELEGATED = {(value, file) for value in ("perturbations", "adapters") for file in ("serialization", "adapter_effects", "export")}
ONLY_IN = {"transformer_lens": {"hooks", "passes", "organisms", "cli", "export"}, "plotly": {"plots"}, "circuitsvis": {"plots"}}
PURE = {
    "objectives": {"torch", "jaxtyping"},
    "manifolds": {"torch", "jaxtyping"},
    "optimization": {"torch", "jaxtyping", "melbo_lens.manifolds"},
    "factors": {"torch", "jaxtyping", "melbo_lens.optimization"},
}
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
        if name.startswith("melbo_lens.") and (other := name.split(".")[1]) != here and (here, other) not in DELEGATED:
            assert ORDER.index(other) < ORDER.index(here), f"{here} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_are_imported_where_they_belong(path):
    for name in imported(path):
        allowed = ONLY_IN.get(name.split(".")[0])
        assert allowed is None or part(path) in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_mathematics_imports_torch_only(name):
    standard = {"collections.abc", "typing", "itertools", "dataclasses"}
    assert set(imported(PACKAGE / f"{name}.py")) - standard <= PURE[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_files_first_line_asks_the_question_that_it_answers(path):
    first = ast.get_docstring(ast.parse(path.read_text()))
    assert (first and first.splitlines()[0].strip()) or (path.name == "__init__.py" and not path.read_text())
    assert len(path.read_text().splitlines()) <= 300

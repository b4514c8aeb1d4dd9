"""Does what the pages of docs/ say still hold?  Their blocks run, their tables are those of the last measurements."""

import ast
import json
import re

import pytest

import melbo_lens as ml
from melbo_lens import exports
from tests import documentation, readme

REFERENCE = "\n".join(page.read_text() for page in sorted((documentation.DOCS / "reference").glob("*.md")))
NO_RUN = 20  # blocks that can't run here: other programs, hubs, clusters


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", documentation.pages())
def test_the_blocks_of_a_page_run_one_after_another(page, folder):
    documentation.run(page, folder)
    if page == "sweeps.md":
        assert {"report.html", "trials.csv"} <= {path.name for path in (folder / "runs").iterdir()}
        assert (folder / "found.html").is_file()


def test_blocks_that_do_not_run_are_few_and_name_what_exists():
    pages = sorted(documentation.DOCS.rglob("*.md"))
    kept = [code for page in pages for language, code in documentation.blocks(page, "no-run") if language == "python"]
    assert sum(len(documentation.blocks(page, "no-run")) for page in pages) <= NO_RUN
    kept += [code for page in pages for _, code in documentation.blocks(page, "real")]
    for code in kept:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ml":
                assert hasattr(ml, node.attr)


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_last_measurements(page):
    for name, shown in readme.MARKED.findall(page.read_text()):
        assert shown == readme.TABLES[name](), f"{page.name}: run python -m tests.readme to renew {name}"


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_a_page_with_outputs_shows_what_each_of_its_blocks_prints(page):
    blocks = [block for block in readme.BLOCK.finditer(page.read_text()) if block["mark"] != "no-run"]
    if any(block["shown"] is not None for block in blocks):
        printing = [block for block in blocks if "print(" in block["code"]]
        assert [block["code"] for block in printing if not (block["shown"] or "").strip()] == []


PAGE = """```python
a = 2
```

```python
print(a + {number})
```

<!-- output -->
```text
{shown}
```

```python real
raise SystemExit
```

<!-- output -->
```text
of another day
```
"""


def test_outputs_are_those_of_the_blocks_one_after_another():
    assert readme.with_outputs(PAGE.format(number=3, shown="4")) == PAGE.format(number=3, shown="5")


def test_the_table_of_the_posts_results_says_what_a_claim_asks_for_and_what_was_not_measured(tmp_path):
    claims = {
        "experiment": "backdoors",
        "what": "vectors",
        "post": "",
        "holds": False,
        "median": 1 / 64,
        "least": 0.0,
        "most": 3 / 64,
        "interval": [0.0, 5 / 64],
        "unsteered": 0.0,
        "random": 0.0,
        "covariance": None,
        "twin": 0.0,
        "seconds": 8.2,
        "scores": [{"n": 64}],
    }
    rows = [{**claims, "required": "median at least 2"}, {**claims, "required": "the same", "holds": True}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    _, _, first, second = readme.reproduction(tmp_path / "results.json").splitlines()
    assert first == (
        "| backdoors | vectors |  | 1 of 64 (0 to 3) | 0 to 5 of 64 | 0.0% | 0.0% | – | 0.0% | 8 s | median at least 2 "
        "| NO |"
    )
    assert second == first.replace("NO", "yes")


def test_every_table_stands_on_a_page():
    shown = {name for page in readme.pages() for name, _ in readme.MARKED.findall(page.read_text())}
    assert shown == set(readme.TABLES)


def test_the_reference_has_every_public_name():
    named = set(re.findall(r"^::: melbo_lens\.([\w.]+)$", REFERENCE, re.MULTILINE))
    assert not {f"{home}.{name}" for name, home in ml._HOME_OF.items()} - named
    for module in (ml.plots, ml.organisms):
        home = module.__name__.removeprefix("melbo_lens.")
        assert {name.split(".")[-1] for name in named if name.startswith(f"{home}.")} >= set(module.__all__)
    exporters = {name.split(".")[1] for name in named if re.fullmatch(r"exports\.\w+\.to_\w+", name)}
    assert exporters == set(exports.OURS.values())


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_every_file_to_which_a_page_links_exists(page):
    for name in re.findall(r"\]\(((?!http|#)[^)#]+)", page.read_text()):
        assert (page.parent / name).exists(), name


def test_the_architecture_of_the_package_is_told_with_files_that_exist():
    text = (documentation.DOCS / "architecture.md").read_text()
    files = re.findall(r"`((?!tests/)[\w/]+(?:\.py|/))`", text)
    assert len(files) > 20
    for file in files:
        assert (readme.ROOT / "melbo_lens" / file).exists(), file

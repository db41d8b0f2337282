"""The documents: every block of code in them runs, and what they list is what is installed.

Commands run as they are, offline, in a folder where the names of the installed recipes are tiny recipes and
`runs/quickstart` holds complete runs. Blocks in the language `text` are not run.
"""

import inspect
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buddy.backbone.load import FAMILIES
from buddy.cli import app
from buddy.config import installed_recipes, load_recipe, to_yaml
from buddy.registry import installed, load
from buddy.values import shown
from tests.documents import DOCUMENTS, ROOT, RUNNERS, Block, blocks, run, setup_cfg
from tests.small import write_text
from tests.tiny import tiny_folder

README, ROUTERS, RECIPES, DESIGN, COMMANDS = (
    ROOT / name
    for name in ("README.md", "docs/routers.md", "docs/recipes.md", "docs/design.md", "docs/reference/commands.md")
)
FIGURE = "docs/results-quality-layers.png"
ELSEWHERE = {"lightning.md", "commands.md"}  # run by test_lightning.py; read by a test below
TINY = (
    *("backbone.dtype=float32", "budgets=[1.0,0.75,0.5]", "trainer.max_steps=1", "trainer.accelerator=cpu"),
    *("data.window=48", "data.prompt=12", "data.batch_size=2", "data.calibration_windows=2"),
    *("data.validation_windows=2", "data.test_windows=2"),
)


@pytest.fixture(scope="module")
def place(datasets_cache, tmp_path_factory) -> Iterator[Path]:
    """A folder with a text and with the runs of the tiny quickstart; the recipes' names are those of tiny recipes.

    What the searches of one document have measured is cached for the others.
    """
    folder = tmp_path_factory.mktemp("documents")
    model = tiny_folder(folder / "model", num_hidden_layers=30)  # the documents speak of 22 layers of 30
    home, recipes = folder / "home", folder / "recipes"
    home.mkdir()
    recipes.mkdir()
    speeches = write_text(folder / "speeches.jsonl", documents=64)
    for name in ("my_text.txt", "my_letters.txt"):
        (home / name).write_text(speeches.read_text().replace("\n", "\n\n"))
    for path in installed_recipes().values():
        few = ["bridge.steps=1"] if (bridge := load_recipe(path).bridge) and bridge.steps else []
        few += ["rivals=[uniform]"]
        text = to_yaml(load_recipe(path, [f"backbone.name={model}", f"data.source={speeches}", *few, *TINY]))
        (recipes / path.name).write_text(f"# {path.stem}.\n{text}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buddy.config.FOLDER", recipes)
        patch.setattr("buddy.evaluation.bench.LONG", 96)
        patch.setattr("buddy.evaluation.bench.BATCH", 2)
        patch.setattr("buddy.evaluation.bench_serve.BATCHES", (1, 2))
        for module in ("metrics.timing", "evaluation.bench", "evaluation.bench_serve", "latency"):
            patch.setattr(f"buddy.{module}.STEPS", 4)
        patch.setattr("buddy.evaluation.bench.ROUNDS", 1)
        patch.setattr("buddy.latency.ROUNDS", 1)
        patch.setenv("BUDDY_CALIBRATION_CACHE", str(folder / "calibration"))
        patch.setenv("BUDDY_LATENCY_CACHE", str(folder / "latency"))
        patch.chdir(home)
        run(Block("the fixture", "bash", "buddy fit --recipe quickstart"))
        yield home


def documents() -> Iterator[object]:
    for path in DOCUMENTS:
        runs = any(block.language != "text" for block in blocks(path))
        if runs and path.name not in ELSEWHERE:
            yield pytest.param(path, id=path.name)


@pytest.mark.slow
@pytest.mark.parametrize("document", list(documents()))
def test_every_block_runs(document, place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the registry adds the current folder
    try:
        for block in blocks(document):
            if block.language != "text":
                assert block.language in RUNNERS, f"{block.place} is in {block.language!r}, which nothing can run"
                run(block)
    finally:
        for path in tmp_path.glob("*.py"):
            sys.modules.pop(path.stem, None)


def test_the_example_of_each_command_is_read(monkeypatch):
    monkeypatch.setattr("typer.core.TyperCommand.invoke", lambda *_: None, raising=False)
    lines = [line for block in blocks(COMMANDS) for line in block.text.splitlines()]
    assert len(lines) > 10
    for line in lines:
        assert CliRunner().invoke(app, shlex.split(line)[1:]).exit_code == 0, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith("https:"):
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}, but there is no such heading"


def anchors(document: Path) -> set[str]:
    """The anchors of the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_document_is_in_the_site():
    pages = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(pages) == sorted(["index.md", *(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))])


def test_the_readme_has_results():
    text = README.read_text("utf-8")
    results = text.partition("<!-- results:start -->")[2].partition("<!-- results:end -->")[0]
    recipe = load_recipe("quickstart")
    for name in (recipe.router.name, *(rival.label for rival in recipe.rivals)):
        assert re.search(rf"^\| `?{name}`? \|", results, re.MULTILINE), f"the README has no results of {name}"
    assert f"]({FIGURE})" in text


# What the documents list


def rows(document: Path, heading: str, columns: int) -> list[tuple[str, ...]]:
    """The first cells of every table row under a heading and those below it, in order; table heads left out."""
    level = heading.partition(" ")[0]
    text = document.read_text("utf-8").partition(f"\n{heading}\n")[2]
    assert text, f"{document.name} has no heading {heading!r}"
    text = re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    table = re.findall(r"^\| .*$(?!\n\|-)", text, re.MULTILINE)
    return [tuple(cell.strip() for cell in row.split("|")[1 : columns + 1]) for row in table]


def test_the_recipes_are_listed():
    listed = [name for (name,) in rows(RECIPES, "## Installed recipes", 1)]
    assert sorted(listed) == [f"`{name}`" for name in installed_recipes()]


OURS = [entry.name for entry in installed() if entry.value.startswith("routers.")]


def test_the_routers_are_listed():
    listed = [row for row in rows(ROUTERS, "## Those that come with Buddy", 4) if len(row) == 4 and row[3]]
    found = {name: (kind, source) for name, kind, _, source in listed}
    assert found == {f"`{name}`": (load(name).kind, load(name).source) for name in OURS}


def test_the_sizes_of_routers_are_listed():
    table = rows(ROUTERS, "## What they see and when they decide", 6)
    listed = {row[0]: row[5] for row in table if row[5]}
    files = {f"`{name}`": inspect.getsourcefile(load(name)) for name in OURS}
    assert listed == {name: str(len(Path(file).read_text("utf-8").splitlines())) for name, file in files.items()}


@pytest.mark.parametrize("name", OURS)
def test_every_option_of_a_router_is_listed(name):
    options = list(inspect.signature(load(name)).parameters.values())[1:]
    spelled = [list(each.default) if isinstance(each.default, tuple) else each.default for each in options]
    expected = [(f"`{each.name}`", f"`{shown(value)}`") for each, value in zip(options, spelled, strict=True)]
    listed = [row for row in rows(ROUTERS, f"### {name}", 3) if row[2] and row[0].startswith("`")]
    assert [row[:2] for row in listed] == expected


def test_the_dependencies_are_explained():
    listed = [name.strip("`") for (name,) in rows(DESIGN, "## Dependencies", 1)]
    required = re.findall(r"^[\w-]+", setup_cfg()["options"]["install_requires"].strip(), re.MULTILINE)
    assert listed == required
    extras = " ".join(setup_cfg()["options.extras_require"].values())
    for name in re.findall(r"([\w-]+)>=", extras):
        assert f"`{name}`" in DESIGN.read_text("utf-8")


def test_the_families_are_named():
    text = re.sub(r"[\s-]", "", README.read_text("utf-8").lower())
    for family in FAMILIES:
        assert family.removesuffix("_text") in text

"""The site: it builds without the network, and what it says of keys, commands, names and errors is what there is."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin
from xml.etree import ElementTree

import pytest
import typer

import buddy
from buddy import errors, testing
from buddy.budget import executed_layers
from buddy.cli import app
from pages import hooks, keys, way
from pages.reference import GENERATED

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMMANDS = (DOCS / "reference" / "commands.md").read_text("utf-8")
PYTHON = (DOCS / "reference" / "python.md").read_text("utf-8")


# What is made from the code


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_what_is_made_from_the_code_is_up_to_date(path):
    assert path.read_text("utf-8") == GENERATED[path](), f"{path.name} is behind the code; run: make reference"


def test_every_key_of_a_recipe_has_a_row():
    text = (DOCS / "recipes.md").read_text("utf-8")
    for key, _, default in keys.keys():  # noqa: SIM118 - a function
        row = re.search(rf"^\| `{key}` \|.*\| `(.*)` \| \S.* \|$", text, re.MULTILINE)
        assert row and row[1] == default, f"docs/recipes.md lacks {key}"  # noqa: PT018 - one thing


def test_rows_of_keys_are_made_anew_and_keep_their_meanings():
    rows = "".join(f"| `{key.name}` | old | `old` | meaning of {key.name} |\n" for key in reversed([*keys.keys()]))
    page = f"before\n\n| key | type |\n|---|---|\n{rows}| `data.gone` | text | `x` | went |\n\n| `other` | stays |\n"
    text = keys.written(page)
    assert text.startswith("before\n")
    assert text.endswith("\n| `other` | stays |\n")
    assert "data.gone" not in text
    assert "| `data.window` | whole number ≥ 2 | `256` | meaning of data.window |" in text
    assert text.index("`backbone.name`") < text.index("`data.source`") < text.index("`output`")
    with pytest.raises(ValueError, match=r"has no row for seed; add"):
        keys.written(page.replace("`seed`", "`sed`"))


def declared() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(words, function) of every verb that is registered, as the modules of buddy/cli register them."""
    for command in (each for each in app.registered_commands if not each.hidden):
        yield f"buddy {command.name or command.callback.__name__}", command.callback
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            yield f"buddy {group.name} {command.name or command.callback.__name__}", command.callback


def spellings(function: Callable[..., Any]) -> Iterator[str]:
    """How the arguments and options of a verb are spelt."""
    for name, parameter in inspect.signature(function).parameters.items():
        assert get_origin(parameter.annotation) is Annotated
        info = next(each for each in get_args(parameter.annotation) if hasattr(each, "metavar"))
        if isinstance(info, typer.models.ArgumentInfo):
            yield info.metavar
        else:
            words = (str(info.default), *(info.param_decls or ()))  # in an annotation the first name stands as default
            given = [part for word in words for part in word.split("/") if part.startswith("--")]
            yield from given or [f"--{name.replace('_', '-')}"]


@pytest.mark.parametrize(
    ("words", "function"), list(declared()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_option_is_there(words, function):
    section = re.search(rf"^###? {words}\n(.*?)(?=^##|\Z)", COMMANDS, re.MULTILINE | re.DOTALL)
    assert section, f"docs/reference/commands.md has no {words}"
    assert inspect.getdoc(function).partition("\n")[0].split("(")[0].strip() in section[1]
    first = re.findall(r"^\| `([^`]*)`", section[1], re.MULTILINE)
    spelt = {part for cell in first for part in (cell, *re.split(r"[ ,/]+", cell))}
    missing = {spelling.replace("|", "\\|") for spelling in spellings(function)} - spelt
    assert not missing, f"{words} has {missing}, which docs/reference/commands.md has not; run: make reference"
    assert f"```bash\n{words} " in section[1] or f"```bash\n{words}\n" in section[1], f"{words} has no example"


def test_every_public_name_is_there():
    documented = set(re.findall(r"^::: ([\w.]+)$", PYTHON, re.MULTILINE))
    public = {f"buddy.{name}" for name in buddy.__all__} | {f"buddy.testing.{name}" for name in testing.__all__}
    kinds = {kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.BuddyError)}
    public |= {f"buddy.errors.{kind.__name__}" for kind in kinds} - {f"buddy.errors.{name}" for name in buddy.__all__}
    assert public - documented == {"buddy.testing.CHECKS"}
    assert "`buddy.testing.CHECKS`" in PYTHON


def test_the_picture_shows_what_a_plan_does():
    text = way.picture()
    ElementTree.fromstring(text)
    assert text.count('class="run"') == executed_layers(way.BUDGET, way.LAYERS, 2)
    assert text.count('class="run"') + text.count('class="skip"') == way.LAYERS
    assert "prefers-color-scheme: dark" in text
    assert "](layers.svg)" in (DOCS / "concepts.md").read_text("utf-8")


# Sentences of errors


def sentences() -> Iterator[str]:
    """All texts in the source, `…` in the place of each value; docstrings left out."""
    for path in (ROOT / "buddy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(map(_part, node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                yield node.value


def _part(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return part.value
    return "'…'" if part.conversion == ord("r") else "…"


def test_the_sentences_of_the_faq_are_real():
    there = {re.sub(r"\s+", " ", sentence) for sentence in sentences() if len(sentence) > 20}
    text = (DOCS / "faq.md").read_text("utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) > 40
    for sentence in quoted:
        pattern = ".*".join(re.escape(part) for part in sentence.split("…"))
        assert any(re.fullmatch(pattern, each) for each in there), f"nothing in buddy/ says: {sentence}"


# The build


def test_links_are_seen_from_the_docs():
    seen = hooks.from_docs(
        "[a](docs/a.md#b) ![p](docs/p.png) [c](buddy/c.py) [d](#d) [e](https://e)\n```\n[f](g)\n```\n"
    )
    assert seen == "[a](a.md#b) ![p](p.png) [c](../buddy/c.py) [d](#d) [e](https://e)\n```\n[f](g)\n```\n"


def test_the_site_has_no_links_to_code():
    page = "[a](b.md) [t](../tests/t.py) [u](../../u) `x\\|y` ![p](../p.png)\n```\n[c](../d) `a\\|b`\n```\n"
    assert hooks.as_page(page, folders=0).startswith("[a](b.md) t u `x|y` ![p](../p.png)\n")
    assert hooks.as_page(page, folders=1).startswith("[a](b.md) [t](../tests/t.py) u `x|y`")
    assert hooks.as_page(page, folders=0).endswith("```\n[c](../d) `a\\|b`\n```\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site, without a way to other machines."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"mkdocs build --strict:\n{done.stdout}{done.stderr}"
    return folder


def test_the_site_has_every_page(site):
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert built >= {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {"index.md"}
    assert 'id="buddy.Router.score"' in (site / "reference" / "python.html").read_text("utf-8")
    assert "make fit" in (site / "index.html").read_text("utf-8")


def test_the_site_asks_nothing_of_other_servers(site):
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        assert not re.search(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//', text), path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text("utf-8")), path.name

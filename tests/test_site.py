"""The site builds without the network, and its references to keys, commands and names match the code."""

import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import buddy
from buddy import errors, testing
from pages import hooks
from pages.reference import GENERATED

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


# References


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path):
    assert path.read_text("utf-8") == GENERATED[path](), f"{path.name} is behind the code; run: make reference"


def test_every_name_in_the_reference_exists():
    for name in re.findall(r"^::: (\S+)", (DOCS / "reference" / "python.md").read_text("utf-8"), re.MULTILINE):
        assert pkgutil.resolve_name(name).__doc__, name


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference" / "python.md").read_text("utf-8")
    documented = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    public = {f"buddy.{name}" for name in buddy.__all__} | {f"buddy.testing.{name}" for name in testing.__all__}
    kinds = {kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.BuddyError)}
    public |= {f"buddy.errors.{kind.__name__}" for kind in kinds} - {f"buddy.errors.{name}" for name in buddy.__all__}
    assert public - documented == {"buddy.testing.CHECKS"}
    assert "`buddy.testing.CHECKS`" in text


# The build


def test_links_of_the_readme_are_relative_to_docs():
    page = hooks.from_docs(
        "[a](docs/a.md#b) ![p](docs/p.png) [c](buddy/c.py) [d](#d) [e](https://e)\n```\n[f](g)\n```\n"
    )
    assert page == "[a](a.md#b) ![p](p.png) [c](../buddy/c.py) [d](#d) [e](https://e)\n```\n[f](g)\n```\n"


def test_links_to_code_become_text():
    page = "[a](b.md) [t](../tests/t.py) [u](../../u) `x\\|y` ![p](../p.png)\n```\n[c](../d) `a\\|b`\n```\n"
    assert hooks.as_page(page, folders=0).startswith("[a](b.md) t u `x|y` ![p](../p.png)\n")
    assert hooks.as_page(page, folders=1).startswith("[a](b.md) [t](../tests/t.py) u `x|y`")
    assert hooks.as_page(page, folders=0).endswith("```\n[c](../d) `a\\|b`\n```\n")


@pytest.mark.slow
def test_the_site_builds_offline(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; make docs installs it")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"mkdocs build --strict:\n{done.stdout}{done.stderr}"
    pages = {path.relative_to(tmp_path).with_suffix(".md").as_posix(): path for path in tmp_path.rglob("*.html")}
    assert {*pages} >= {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {"index.md"}
    assert 'id="buddy.Router.score"' in pages["reference/python.md"].read_text("utf-8")
    # Nothing on the pages comes from other servers.
    for path in pages.values():
        text = path.read_text("utf-8")
        assert not re.search(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//', text), path.name
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text("utf-8")), path.name

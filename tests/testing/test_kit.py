"""`buddy routers check`, and the kit in a stranger's pytest."""

import re
from unittest import SkipTest

import pytest

from buddy.errors import RegistryError
from buddy.testing import CHECKS, Failed, Subject, behaviour, check_router, outputs
from tests.asking import call, refused
from tests.documents import ROOT
from tests.testing.bad import PeeksAhead, Sound

GUIDE = (ROOT / "docs" / "write-a-router.md").read_text("utf-8")


def test_a_router_that_passes(tiny_llama_folder):
    options = ("--options", "per=input", "--options", "seed=3", "--backbone", tiny_llama_folder)
    result = call("routers", "check", "random", *options)
    assert result.exit_code == 0, result.output
    assert "K from 2 to 6" in result.stdout
    head, *rows, _ = result.stdout.splitlines()
    assert head.split() == ["check", "result", "what"]
    assert [row.split()[0] for row in rows] == [each.name for each in CHECKS]
    assert {row.split()[1] for row in rows} == {"passed", "skipped"}
    assert f"{len(CHECKS)} of {len(CHECKS)}" in result.stderr


def test_a_router_that_fails_ends_with_1():
    result = call("routers", "check", "tests.testing.bad:PeeksAhead")
    rows = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()}
    assert (result.exit_code, rows["independent"], rows["kind"]) == (1, "FAILED", "blocked")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("'shortgpt'", ["shortgtp"]),
        ("nowhere", ["nowhere:Router"]),
        ("Nothing", ["tests.testing.bad:Nothing"]),
        ("of bad.py", ["tests.testing.bad:KeyMissing"]),
        ("SystemExit", ["tests.testing.bad:Leaving"]),
        ("'router.options.windows'", ["sleb", "--options", "windows"]),
        ("router.options.window", ["sleb", "--options", "window=3"]),
        ("router.options.windows", ["sleb", "--options", "windows=many"]),
        ("router.options.windows", ["sleb", "--options", "windows=[1"]),
        ("windows is 0", ["sleb", "--options", "windows=0"]),
        ("/no/such", ["sleb", "--backbone", "/no/such"]),
        ("'smollm2-135m'", ["sleb", "--backbone", "smolm2-135m"]),
    ],
)
def test_bad_input_is_a_sentence(named, words):
    assert named in refused("routers", "check", *words)


def test_check_router_names_all_that_failed():
    with pytest.raises(AssertionError, match="independent"):
        check_router(PeeksAhead)
    with pytest.raises(RegistryError, match="int"):
        check_router(int)


def test_one_test_for_each_check(monkeypatch):
    subject = Subject(PeeksAhead)
    with pytest.raises(SkipTest, match="independent"):
        outputs.kind(subject)
    with pytest.raises(Failed):
        outputs.independent(subject)
    with pytest.raises(SkipTest):
        behaviour.weights(Subject(Sound))
    first = outputs.independent.examine(subject)
    monkeypatch.setattr(subject, "router", None)  # a second call computes nothing
    assert outputs.independent.examine(subject) is first


# docs/write-a-router.md


def test_the_guide_lists_the_checks():
    table = re.findall(r"^\| `(\w+)` \| (.+?) \|", GUIDE, re.MULTILINE)
    assert table == [(check.name, check.promise) for check in CHECKS]


def test_the_router_of_the_guide_is_short_and_its_mistake_is_found():
    code = re.search(r"```python\n# my_router.py\n(.*?)```", GUIDE, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 30
    right = "difference = context.newest - context.pooled\n"
    centred = (
        "        if difference.dim() > 1:\n            difference = difference - difference.mean(-2, keepdim=True)\n"
    )
    assert code.count(right) == 1
    scope = {"__name__": "__document__"}
    exec(compile(code.replace(right, right + centred), "my_router.py", "exec", dont_inherit=True), scope)
    shown = re.search(r"```text\n(independent  FAILED .*?)```", GUIDE, re.DOTALL)[1]
    result = outputs.independent.examine(Subject(scope["Surprise"]))
    assert " ".join(shown.split()) == f"independent FAILED {result.message}"

"""`buddy routers check`, and the kit as a stranger's pytest uses it."""

import re
from unittest import SkipTest

import pytest
from typer.testing import CliRunner

from buddy.cli import app
from buddy.errors import RegistryError
from buddy.testing import CHECKS, Failed, Subject, answers, check_router
from buddy.testing import engine as moved
from buddy.testing import state as trained
from tests.documents import ROOT
from tests.testing.bad import Noisy, PeeksAhead, Sound

GUIDE = ROOT / "docs" / "write-a-router.md"


def check(*words: object):
    return CliRunner().invoke(app, ["routers", "check", *map(str, words)])


def test_a_router_that_passes():
    result = check("random", "--options", "per=input", "--options", "seed=3")
    assert result.exit_code == 0, result.output
    head, *rows, last = result.stdout.splitlines()
    assert head.split() == ["check", "result", "what"]
    assert [row.split()[0] for row in rows] == [each.name for each in CHECKS]
    assert last == "random passes."
    column = head.index("result")
    assert {row[column:].split("  ")[0] for row in rows} == {"passed", "left out"}
    assert f"Checking random: {len(CHECKS)} of {len(CHECKS)}" in result.stderr


def test_a_router_that_fails_ends_with_1():
    result = check("tests.testing.bad:PeeksAhead")
    assert result.exit_code == 1
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert re.search(
        r"causal +FAILED +The answer for a token changes with the tokens after it; score may", result.stdout
    )
    assert "waits" in rows["rows"]
    assert "asked once 'causal' passes" in rows["rows"]
    assert result.stdout.splitlines()[-1] == f"tests.testing.bad:PeeksAhead fails 1 of {len(CHECKS)} checks."


def test_another_backbone(tiny_llama_folder):
    result = check("shortgpt", "--backbone", tiny_llama_folder)
    assert result.exit_code == 0, result.output
    assert "an answer for each K, from the least to full depth (K from 2 to 6)" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shortgtp"], "No router is named 'shortgtp'; did you mean 'shortgpt'?"),
        (["nowhere:Router"], "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        (["tests.testing.bad:Nothing"], "has no attribute 'Nothing'"),
        (["tests.testing.unmade:KeyMissing"], "cannot be made: KeyMissing raises KeyError: 'x' (line 13 of unmade.py)"),
        (["tests.testing.unmade:Leaving"], "cannot be made: Leaving raises SystemExit: 0 (line 25 of unmade.py)"),
        (["sleb", "--options", "windows"], "'windows' is no option; write --options KEY=VALUE, as in"),
        (["sleb", "--options", "window=3"], "router.options.window is unknown; did you mean 'windows'?"),
        (["sleb", "--options", "windows=many"], "router.options.windows must be a whole number or null, not 'many'"),
        (["sleb", "--options", "windows=[1"], "The value of router.options.windows cannot be read"),
        (["sleb", "--options", "windows=0"], "windows is 0; give 1 or more, or null for all"),
        (["sleb", "--backbone", "/no/such"], "There is no folder '/no/such'; check the path"),
        (["sleb", "--backbone", "smolm2-135m"], "did you mean 'smollm2-135m'?"),
    ],
)
def test_bad_input_is_a_sentence(words, said):
    result = check(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_check_router_names_all_that_failed():
    with pytest.raises(Failed, match=r"Noisy fails 1 of \d+ checks:\n- repeatable: score gives another answer"):
        check_router(Noisy)
    with pytest.raises(AssertionError, match="causal: The answer for a token changes"):
        check_router(PeeksAhead)
    with pytest.raises(RegistryError, match="'int' is not a router; make it a subclass"):
        check_router(int)


def test_one_test_for_each_check():
    subject = Subject(PeeksAhead)
    causal, rows = (next(each for each in CHECKS if each.name == name) for name in ("causal", "rows"))
    with pytest.raises(SkipTest, match="asked once 'causal' passes"):
        rows(subject)
    with pytest.raises(Failed, match="combine nothing along the dimension of tokens"):
        causal(subject)
    with pytest.raises(SkipTest, match="for layerwise routers"):
        trained.weights(Subject(Sound))
    moved.device(Subject(Sound))


def test_a_check_is_asked_once(monkeypatch):
    subject = Subject(Sound)
    first = moved.device.examine(subject)
    monkeypatch.setattr(subject, "made", None)
    assert moved.device.examine(subject) is first


def test_the_guide_lists_the_checks():
    table = re.findall(r"^\| `(\w+)` \| (.+?) \|", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert table == [(check.name, check.asks) for check in CHECKS]


def test_the_guide_keeps_its_promise():
    assert len(guide_code().strip().splitlines()) <= 30


def test_the_mistake_of_the_guide_has_the_words_of_the_guide():
    right = "difference = context.newest - context.pooled\n"
    centred = (
        "        if difference.dim() > 1:\n            difference = difference - difference.mean(-2, keepdim=True)\n"
    )
    assert guide_code().count(right) == 1
    scope = {"__name__": "__document__"}
    exec(compile(guide_code().replace(right, right + centred), "my_router.py", "exec", dont_inherit=True), scope)
    shown = re.search(r"```text\n(causal  FAILED .*?)```", GUIDE.read_text("utf-8"), re.DOTALL)[1]
    result = answers.causal.examine(Subject(scope["Surprise"]))
    assert " ".join(shown.split()) == f"causal FAILED {result.words}"


def guide_code() -> str:
    return re.search(r"```python\n# my_router.py\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)[1]

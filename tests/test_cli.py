"""The command line: what each verb calls, what it prints, and its exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import buddy
from buddy.cli import app
from buddy.config import load_recipe, recipe_path
from buddy.errors import TrainingError
from tests.asking import call, refused

BUDDY = [sys.executable, "-c", "from buddy.cli import main; main()"]
BEHIND = {  # what the verbs call
    "fit": "buddy.compare.fit",
    "evaluate": "buddy.evaluation.evaluate.evaluate_run",
    "compare": "buddy.compare.compare",
    "show_files": "buddy.evaluation.record.show_files",
    "generate": "buddy.hub.load.generate",
}


@pytest.fixture
def calls(monkeypatch):
    """What the functions behind the verbs, which do nothing here, are called with."""
    made = []
    for name, function in BEHIND.items():
        monkeypatch.setattr(function, lambda *args, name=name, **options: made.append((name, args, options)))
    return made


# What the verbs call


def test_fit_gets_the_resolved_recipe_and_its_name(calls, tmp_path):
    path = tmp_path / "mine.v2.yaml"
    path.write_text("seed: 3")
    assert call("fit", "--recipe", "quickstart", "seed=3", "router=uniform").exit_code == 0
    assert call("fit", "--recipe", str(path)).exit_code == 0
    first, second = load_recipe("quickstart", ["seed=3", "router=uniform"]), load_recipe(path)
    assert [args[:2] for _, args, _ in calls] == [(first, "quickstart"), (second, "mine.v2")]
    assert "router=uniform" in calls[0][1][2]


def test_compare(calls):
    words = ["--routers", "a,b[c=1]", "--domains", "x.txt", "--jobs", "2", "--no-speed", "--tasks", "piqa, boolq"]
    assert call("compare", "--recipe", "quickstart", *words, "--task-limit", "5", "seed=3").exit_code == 0
    assert call("compare", "--recipe", "quickstart").exit_code == 0
    (_, (config,), _), (_, (defaults,), _) = calls
    assert config.recipe == load_recipe("quickstart", ["seed=3"])
    assert [each.label for each in config.routers] == ["a", "b[c=1]"]
    assert (config.texts, config.jobs, config.speed, config.backend) == ("x.txt", 2, False, "loky")
    assert (config.tasks.names, config.tasks.limit) == (("piqa", "boolq"), 5)
    assert (defaults.seeds, defaults.jobs, defaults.speed) == (None, 1, True)
    words = ["--finished", "--trained", "t", "--backend", "ray", "--out", "o", "--markdown", "m.md", "--seeds", "2"]
    assert call("compare", "--recipe", "quickstart", *words).exit_code == 0
    config = calls[2][1][0]
    assert (config.finished, config.trained, config.backend) == (True, Path("t"), "ray")
    assert (config.folder, config.markdown, config.seeds) == (Path("o"), Path("m.md"), 2)
    assert call("compare", "--from", "c.json,d.json", "--markdown", "r.md").exit_code == 0
    assert calls[3] == ("show_files", ([Path("c.json"), Path("d.json")], Path("r.md")), {})


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("--recipe", []),
        ("--recipe", ["--recipe", "quickstart", "--from", "c.json"]),
        ("--from", ["--from", ","]),
        ("--seeds", ["--from", "c.json", "--seeds", "3"]),
        ("--task-limit", ["--from", "c.json", "--task-limit", "3"]),
        ("--no-speed", ["--from", "c.json", "--no-speed"]),
        ("seed=3", ["--from", "c.json", "seed=3"]),
        ("--task-limit", ["--recipe", "quickstart", "--task-limit", "3"]),
        ("sed", ["--recipe", "quickstart", "sed=1"]),
    ],
)
def test_compare_refuses_options_that_do_not_go_together(calls, named, words):
    result = call("compare", *words)
    assert (result.exit_code, calls) == (2, [])
    assert named in result.stderr


def test_failed_runs_end_a_comparison_with_1(monkeypatch):
    monkeypatch.setattr(BEHIND["compare"], lambda config: 2)
    assert call("compare", "--recipe", "quickstart").exit_code == 1


def test_evaluate(calls):
    call("evaluate", "--run", "r", "--json", "c.json", "--budgets", "0.75, 22layers", "--data", "x.txt")
    options = {"json_file": Path("c.json"), "budgets": ["0.75", "22layers"], "data": "x.txt"}
    assert calls == [("evaluate", (Path("r"),), {**options, "split": "test", "devices": 1, "mean_over": None})]
    assert call("evaluate", "--run", "r", "--data", "x.txt", "--split", "validation").exit_code == 2
    assert len(calls) == 1


def test_generate(calls):
    words = ["--max-new-tokens", "3", "--temperature", "0.7", "--seed", "5", "--chat", "--dtype", "auto", "hi"]
    call("generate", "--run", "r", "--budget", "22layers", "--prompt-budget", "1.0", *words)
    options = {"budget": "22layers", "prompt_budget": "1.0", "max_new_tokens": 3, "temperature": 0.7}
    options |= {"seed": 5, "chat": True}
    assert calls == [("generate", (Path("r"),), {"prompt": "hi", "dtype": "auto", **options})]


# What they print


def commands(command=None, words=""):
    command = command or typer.main.get_command(app)
    for name, inner in command.commands.items():
        if not inner.hidden:
            yield f"{words} {name}".strip()
            if hasattr(inner, "commands"):
                yield from commands(inner, f"{words} {name}")


@pytest.mark.parametrize("verb", [*commands()])
def test_each_help_has_one_example(verb):
    lines = call(*verb.split(), "--help").output.splitlines()
    assert sum(f"Example: buddy {verb}" in line for line in lines) == 1


def test_version_and_verbs():
    assert call("--version").output == f"buddy {buddy.__version__}\n"
    _, _, verbs = call("--help").output.partition("Commands:")
    assert re.findall(r"^  (\w+)  ", verbs, re.MULTILINE) == [
        *("fit", "compare", "evaluate", "bench", "inspect", "generate", "serve", "export", "push", "pull"),
        *("memory", "routers", "recipes"),
    ]
    assert call("plan", "--help").exit_code == 0  # the old name of `buddy memory`


def test_routers_are_listed(install):
    install("odd", {"odd": "nowhere_module:Odd"})
    result = call("routers")
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()}
    assert result.exit_code == 0
    assert {name: rows[name][1] for name in ("buddy", "random", "uniform", "odd")} == {
        "buddy": "learned",
        "random": "random",
        "uniform": "static",
        "odd": "broken",
    }
    assert rows["buddy"][-1] == "buddy-depth"
    assert "nowhere_module" in " ".join(rows["odd"])


def test_recipes(tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    assert any(line.startswith("quickstart ") for line in call("recipes").output.splitlines())
    assert call("recipes", "list").output == call("recipes").output
    assert call("recipes", "show", "quickstart").output == recipe_path("quickstart").read_text("utf-8")
    assert call("recipes", "copy", "quickstart").exit_code == 0
    assert call("fit", "--recipe", "quickstart.yaml").exit_code == 0
    again = call("recipes", "copy", "quickstart")
    assert (again.exit_code, again.stdout) == (2, "")


# How they end


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("'quickstart'", ["fit", "--recipe", "quikstart"]),
        ("'seed'", ["fit", "--recipe", "quickstart", "sed=1"]),
        ("'seed'", ["fit", "--recipe", "quickstart", "seed"]),
        ("--budgets", ["evaluate", "--run", "r", "--budgets", " , "]),
        ("'zzz'", ["recipes", "show", "zzz"]),
        ("installed recipe", ["recipes", "show", __file__]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(calls, named, words):
    assert named in refused(*words)
    assert calls == []


@pytest.mark.parametrize(
    "words",
    [
        ["fit"],
        ["fti"],
        ["fit", "--recpe", "quickstart"],
        ["generate", "--run", "r", "--budget", "0.5", "--max-new-tokens", "0", "hi"],
        ["compare", "--recipe", "quickstart", "--seeds", "0"],
        ["compare", "--recipe", "quickstart", "--jobs", "0"],
        ["compare", "--recipe", "quickstart", "--backend", "dask"],
        ["recipes", "shw"],
        [],
    ],
)
def test_usage_errors_end_with_2(calls, words):
    assert (call(*words).exit_code, calls) == (2, [])


@pytest.mark.parametrize(
    ("error", "code", "lines"), [(TrainingError("Step 7 is not finite."), 2, 1), (KeyboardInterrupt(), 130, 2)]
)
def test_errors_and_ctrl_c(monkeypatch, error, code, lines):
    def fail(*args: object, **options: object) -> None:
        raise error

    for name in ("fit", "generate"):
        monkeypatch.setattr(BEHIND[name], fail)
    for words in (["fit", "--recipe", "quickstart"], ["generate", "--run", "r", "--budget", "1", "hi"]):
        result = call(*words)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", lines)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(BEHIND["fit"], lambda *_: 1 / 0)
    assert isinstance(call("fit", "--recipe", "quickstart").exception, ZeroDivisionError)


def test_the_command_itself():
    done = subprocess.run([*BUDDY, "fit", "--recipe", "zzz"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)

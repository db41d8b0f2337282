"""The command line: what each verb calls, what it prints, and how it ends when a person made a mistake."""

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import buddy
from buddy.cli import app
from buddy.config import load_recipe, recipe_path
from buddy.errors import TrainingError

VERBS = [
    "fit",
    "compare",
    "evaluate",
    "generate",
    "export",
    "push",
    "pull",
    "plan",
    "routers",
    "routers list",
    "routers new",
    "routers check",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes copy",
]
BUDDY = [sys.executable, "-c", "from buddy.cli import main; main()"]


def call(*words: str):
    return CliRunner().invoke(app, words)


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the modules behind the verbs and keeps what they were called with."""
    made = []

    def stand_in(module: str, *functions: str):
        double = ModuleType(module)
        for name in functions:
            setattr(double, name, lambda *args, name=name, **options: made.append((name, args, options)))
        monkeypatch.setitem(sys.modules, module, double)

    stand_in("buddy.fit", "fit")
    stand_in("buddy.evaluation.evaluate", "evaluate_run")
    monkeypatch.setattr("buddy.compare.compare", lambda asked: made.append(("compare", (asked,), {})))
    stand_in("buddy.evaluation.report", "show_files")
    stand_in("buddy.hub.load", "generate")
    return made


# What the verbs call


def test_fit_hands_over_the_resolved_recipe(calls):
    assert call("fit", "--recipe", "quickstart", "seed=3", "router=uniform").exit_code == 0
    assert calls == [("fit", (load_recipe("quickstart", ["seed=3", "router=uniform"]), "quickstart"), {})]


def test_fit_names_the_run_after_the_file(calls, tmp_path):
    path = tmp_path / "mine.v2.yaml"
    path.write_text("seed: 3")
    assert call("fit", "--recipe", str(path)).exit_code == 0
    assert calls[0][1] == (load_recipe(path), "mine.v2")


def test_compare(calls):
    words = ["--routers", "a,b[c=1]", "--domains", "x.txt", "--jobs", "2", "--no-speed", "--tasks", "piqa, boolq"]
    assert call("compare", "--recipe", "quickstart", *words, "--task-limit", "5", "seed=3").exit_code == 0
    ((name, (asked,), _),) = calls
    assert name == "compare"
    assert asked.recipe == load_recipe("quickstart", ["seed=3"])
    assert (asked.routers, asked.seeds, asked.domains, asked.jobs, asked.speed) == ("a,b[c=1]", None, "x.txt", 2, False)
    assert (asked.tasks.names, asked.tasks.limit) == (("piqa", "boolq"), 5)
    assert asked.folder == Path("runs/quickstart-compare")
    assert call("compare", "--recipe", "quickstart").exit_code == 0
    asked = calls.pop()[1][0]
    assert (asked.seeds, asked.jobs, asked.speed) == (None, 1, True)
    assert "--seeds 3" in asked.command
    assert call("compare", "--recipe", "quickstart", "--finished").exit_code == 0
    assert "--seeds" not in calls.pop()[1][0].command
    assert call("compare", "--recipe", "quickstart", "--seeds", "2").exit_code == 0
    assert calls.pop()[1][0].seeds == 2
    assert call("compare", "--from", "c.json,d.json", "--markdown", "r.md").exit_code == 0
    assert calls[1] == ("show_files", ([Path("c.json"), Path("d.json")], Path("r.md")), {})


NEW = [
    ["--routers", "full"],
    ["--seeds", "3"],
    ["--domains", "x.txt"],
    ["--jobs", "1"],
    ["--out", "x"],
    ["--tasks", "piqa"],
    ["--task-limit", "3"],
    ["--task-data", "x"],
    ["--task-path", "x"],
    ["--no-speed"],
    ["--speed"],
    ["seed=3"],
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give either --recipe, to compare routers, or --from"),
        (["--recipe", "quickstart", "--from", "c.json"], "Give either --recipe"),
        (["--from", ","], "--from is empty; name at least one"),
        *((["--from", "c.json", *words], f"{words[0]} belongs to a new comparison") for words in NEW),
        (["--recipe", "quickstart", "--task-limit", "3"], "--task-limit is for tasks; add --tasks"),
        (["--recipe", "quickstart", "sed=1"], "The key 'sed' is unknown"),
    ],
)
def test_compare_refuses_what_does_not_go_together(calls, words, message):
    result = call("compare", *words)
    assert result.exit_code == 2
    assert f"Error: {message}" in result.output.replace("The recipe quickstart has a mistake: ", "")
    assert calls == []


def test_what_failed_in_a_comparison_ends_it_with_1(monkeypatch):
    monkeypatch.setattr("buddy.compare.compare", lambda asked: 2)
    assert call("compare", "--recipe", "quickstart").exit_code == 1


def test_evaluate(calls):
    call("evaluate", "--run", "runs/a/b")
    call("evaluate", "--run", "r", "--json", "c.json", "--budgets", "0.75, 22layers", "--data", "x.txt")
    assert calls == [
        (
            "evaluate_run",
            (Path("runs/a/b"),),
            {"json_file": None, "budgets": None, "data": None, "split": "test", "devices": 1},
        ),
        (
            "evaluate_run",
            (Path("r"),),
            {
                "json_file": Path("c.json"),
                "budgets": ["0.75", "22layers"],
                "data": "x.txt",
                "split": "test",
                "devices": 1,
            },
        ),
    ]


def test_evaluate_refuses_a_split_of_another_text(calls):
    result = call("evaluate", "--run", "r", "--data", "x.txt", "--split", "validation")
    assert result.exit_code == 2
    assert "Error: --split validation is of the run's own text, and --data names another" in result.output
    assert calls == []


def test_generate(calls):
    call("generate", "--run", "r", "--budget", "0.5", "My fellow citizens")
    defaults = {"budget": "0.5", "max_new_tokens": 64, "temperature": 0.0, "seed": 0, "chat": False}
    assert calls == [("generate", (Path("r"),), {"prompt": "My fellow citizens", **defaults})]
    words = ["--max-new-tokens", "3", "--temperature", "0.7", "--seed", "5", "--chat", "hi"]
    call("generate", "--run", "r", "--budget", "22layers", *words)
    asked = {"budget": "22layers", "max_new_tokens": 3, "temperature": 0.7, "seed": 5, "chat": True}
    assert calls[1] == ("generate", (Path("r"),), {"prompt": "hi", **asked})


# What they print


def test_version():
    assert call("--version").output == f"buddy {buddy.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_has_one_worked_example(verb):
    lines = call(*verb.split(), "--help").output.splitlines()
    assert sum(f"Example: buddy {verb}" in line for line in lines) == 1


def test_routers_are_listed_whole_when_piped():
    lines = call("routers").output.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["name", "angular", "buddy"]
    column = lines[0].index("kind")
    rows = {line.split()[0]: line for line in lines[1:]}
    assert {"buddy", "full", "random", "shortgpt", "uniform"} <= rows.keys()
    for name, kind in {"buddy": "learned", "random": "random", "uniform": "static"}.items():
        assert rows[name][column:].startswith(kind)
        assert rows[name].rstrip().endswith("buddy-depth")
    assert "…" not in "".join(lines)


def test_a_broken_router_is_shown_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd-1.0.dist-info").mkdir()
    (tmp_path / "odd-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (tmp_path / "odd-1.0.dist-info" / "entry_points.txt").write_text("[buddy.routers]\nodd = nowhere_module:Odd\n")
    result = call("routers")
    assert result.exit_code == 0
    row = next(line for line in result.output.splitlines() if line.startswith("odd "))
    assert "broken" in row
    assert "cannot be imported (ModuleNotFoundError: No module named 'nowhere_module')" in row


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_recipes_are_listed(words):
    lines = call(*words).output.splitlines()
    assert any(line.startswith("quickstart ") and "CPU, minutes, offline." in line for line in lines)


def test_recipes_show_prints_the_file():
    assert call("recipes", "show", "quickstart").output == recipe_path("quickstart").read_text("utf-8")


def test_recipes_copy(tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    result = call("recipes", "copy", "quickstart")
    assert result.output == "Wrote quickstart.yaml; run it with: buddy fit --recipe quickstart.yaml\n"
    assert call("fit", "--recipe", "quickstart.yaml").exit_code == 0
    again = call("recipes", "copy", "quickstart")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "exists and is not overwritten" in again.stderr


# How they end


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--recipe", "quikstart"], "did you mean 'quickstart'?"),
        (["fit", "--recipe", "quickstart", "sed=1"], "The key 'sed' is unknown; did you mean 'seed'?"),
        (["fit", "--recipe", "quickstart", "seed"], "'seed' has no value; write seed=VALUE."),
        (["evaluate", "--run", "r", "--budgets", " , "], "--budgets is empty; name at least one"),
        (["recipes", "show", "zzz"], "There is no recipe named 'zzz'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(calls, words, message):
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize(
    "words",
    [
        ["fit"],
        ["fti"],
        ["fit", "--recpe", "quickstart"],
        ["evaluate"],
        ["generate", "--run", "r", "--budget", "0.5", "--max-new-tokens", "0", "hi"],
        ["generate", "--run", "r", "--budget", "0.5", "--temperature", "-1", "hi"],
        ["recipes", "shw"],
        [],
    ],
)
def test_usage_errors_end_with_2(calls, words):
    result = call(*words)
    assert result.exit_code == 2
    assert calls == []


def fail_with(error: BaseException):
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


def test_errors_of_a_run(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["buddy.fit"], "fit", fail_with(TrainingError("Step 7 is not finite.")))
    result = call("fit", "--recipe", "quickstart")
    assert (result.exit_code, result.stderr) == (2, "Error: Step 7 is not finite.\n")


def test_ctrl_c_is_one_sentence_and_exit_130(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["buddy.fit"], "fit", fail_with(KeyboardInterrupt()))
    result = call("fit", "--recipe", "quickstart")
    assert result.exit_code == 130
    assert result.stderr == "\nStopped. Repeat the command to go on from the last checkpoint.\n"
    monkeypatch.setattr(sys.modules["buddy.hub.load"], "generate", fail_with(KeyboardInterrupt()))
    result = call("generate", "--run", "r", "--budget", "1", "hi")
    assert (result.exit_code, result.stderr) == (130, "\nStopped.\n")


def test_a_bug_keeps_its_traceback(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["buddy.fit"], "fit", fail_with(ZeroDivisionError("a bug")))
    assert isinstance(call("fit", "--recipe", "quickstart").exception, ZeroDivisionError)


def test_the_command_itself():
    done = subprocess.run([*BUDDY, "fit", "--recipe", "zzz"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: There is no recipe named 'zzz'")
    assert "Traceback" not in done.stderr


def test_help_comes_at_once():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*BUDDY, "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.7

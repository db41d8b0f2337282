"""Scores of a finished run on tasks, from the folder to the table."""

import json
import math
import shutil

import pytest
from lm_eval.tasks import TaskManager

from buddy.errors import DataError
from buddy.evaluation.harness import BuddyLM
from buddy.evaluation.tasks import show_tasks, task_scores
from tests.asking import call, refused
from tests.evaluation.own_task import define
from tests.small import rewrite

pytestmark = pytest.mark.slow

CHOICES = ["the right depth", "a layer", "no plan at all", "one"]
LINES = [{"question": f"Which is number {n}?", "choices": CHOICES, "label": n % 4} for n in range(6)]
YES = [{"context": "A model skips.", "question": f"is it {n}", "choices": ["no", "yes"], "label": 1} for n in range(3)]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A folder with arc_easy.jsonl and boolq.jsonl."""
    folder = tmp_path_factory.mktemp("items")
    for name, lines in {"arc_easy": LINES, "boolq": YES}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def scores(finished, items):
    return task_scores(finished / "buddy", ["arc_easy", "boolq"], task_data=items)["results"]


def test_an_entry_for_each_task_and_budget(scores):
    found = [(entry["task"], entry["budget"], entry["layers"], entry["metric"], entry["items"]) for entry in scores]
    arc = [("arc_easy", budget, layers, "acc_norm", 6) for budget, layers in ((1.0, 6), (0.75, 4), (0.5, 3))]
    boolq = [("boolq", budget, layers, "acc", 3) for budget, layers in ((1.0, 6), (0.75, 4), (0.5, 3))]
    assert found == arc + boolq
    for entry in scores:
        assert entry["executed"] == {"min": entry["layers"], "mean": entry["layers"], "max": entry["layers"]}
        assert entry["value"] == pytest.approx(sum(entry["correct"]) / entry["items"])
        spread = entry["value"] * (1 - entry["value"]) / (entry["items"] - 1)
        assert entry["stderr"] == pytest.approx(math.sqrt(spread))


@pytest.mark.parametrize("layers", [6, 3])
def test_the_right_answers_are_those_of_the_likelihoods(finished, scores, layers):
    """acc_norm by hand: the choice of the highest log-probability a letter."""
    lm = BuddyLM(finished / "buddy", f"{layers}layers")
    correct = []
    for line in LINES:
        context, lengths = f"Question: {line['question']}\nAnswer:", [len(choice) for choice in CHOICES]
        tokens = [((), lm.tok_encode(context), lm.tok_encode(f" {choice}")) for choice in CHOICES]
        found = lm._loglikelihood_tokens(tokens, disable_tqdm=True)
        normed = [score / length for (score, _), length in zip(found, lengths, strict=True)]
        correct.append(int(normed.index(max(normed)) == line["label"]))
    (entry,) = [entry for entry in scores if entry["task"] == "arc_easy" and entry["layers"] == layers]
    assert entry["correct"] == correct
    assert 0 < sum(correct) < len(correct)


def test_again_and_in_parts_it_says_the_same(finished, items, scores):
    again = task_scores(finished / "buddy", ["boolq", "arc_easy"], [0.5, "3layers"], task_data=items)["results"]
    assert again == [scores[5], scores[2]]
    first = task_scores(finished / "buddy", ["arc_easy"], [0.5], limit=4, task_data=items)["results"][0]
    assert first["correct"] == scores[2]["correct"][:4]
    assert first["items"] == 4


def test_a_task_of_one_item_and_one_without_right_answers(capsys):
    entry = {"budget": 0.5, "layers": 3, "executed": {"min": 3, "mean": 3.0, "max": 3}, "items": 1, "stderr": None}
    right = {"task": "piqa", "metric": "acc", "value": 1.0, "correct": [1], **entry}
    text = {"task": "text", "metric": "word_perplexity", "value": 12.3456, "correct": None, **entry}
    show_tasks([right, text], "buddy", 0, 6)
    out = capsys.readouterr().out
    cells = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert cells["piqa"][-1] == "100.0"
    assert cells["text"][-1] == "12.35"
    assert "average" not in out


def test_a_metric_of_fractions_is_no_share_at_any_budget(capsys):
    common = {"task": "text", "metric": "f1", "items": 2, "stderr": None, "executed": {"min": 3, "mean": 3.0, "max": 3}}
    full = {"budget": 1.0, "layers": 6, "correct": None, "value": 0.25, **common}
    half = {"budget": 0.5, "layers": 3, "correct": [0, 0], "value": 0.0, **common}
    for entries in ([full, half], [half, full]):
        show_tasks(entries, "buddy", 0, 6)
        out = capsys.readouterr().out
        (line,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["text"])
        assert sorted(line[-2:]) == ["0", "0.25"]
        assert "flips" not in out


def test_flips_are_against_the_budget_that_runs_every_layer(capsys):
    common = {"task": "piqa", "metric": "acc", "items": 2, "stderr": None, "value": 0.5}
    full = {"budget": 0.95, "layers": 6, "correct": [1, 0], "executed": {"min": 6, "mean": 6.0, "max": 6}, **common}
    half = {"budget": 0.5, "layers": 3, "correct": [0, 0], "executed": {"min": 3, "mean": 3.0, "max": 3}, **common}
    show_tasks([full, half], "buddy", 0, 6)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "flips" in line)
    assert line.split()[-2:] == ["–", "50.0"]


# Definitions of one's own

METRICS = {  # of a kind of task: the metric, and further keys of the definition
    "generate_until": ("exact_match", {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}),
    "loglikelihood_rolling": ("word_perplexity", {}),
}


@pytest.mark.parametrize("kind", METRICS)
def test_other_kinds_of_task(finished, items, tmp_path, kind):
    metric, more = METRICS[kind]
    own = {"output_type": kind, "doc_to_target": "{{choices[label]}}", "doc_to_choice": None}
    define(tmp_path, items / "arc_easy.jsonl", **own, metric_list=[{"metric": metric}], **more)
    (entry,) = task_scores(finished / "buddy", ["mine"], [0.5], limit=2, task_path=tmp_path)["results"]
    assert (entry["metric"], entry["items"], entry["layers"]) == (metric, 2, 3)
    assert entry["executed"] == {"min": 3, "mean": 3.0, "max": 3}
    assert (entry["correct"] is None) == (kind == "loglikelihood_rolling")


def test_examples_are_lm_evals_own_at_every_budget(finished, items, tmp_path, monkeypatch):
    define(tmp_path, items / "arc_easy.jsonl", fewshot_split="test", num_fewshot=2)
    asked, inner = [], BuddyLM.loglikelihood

    def spy(self, requests, **options):
        asked.append([request.args for request in requests])
        return inner(self, requests, **options)

    monkeypatch.setattr(BuddyLM, "loglikelihood", spy)
    task_scores(finished / "buddy", ["mine"], [1.0, 0.5], limit=4, task_path=tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    own = manager.load(["mine"])["tasks"]["mine"]
    own.set_fewshot_seed(1234)  # the default of lm-eval's command
    own.build_all_requests(limit=4)
    assert asked == 2 * [[request.args for request in own.instances]]
    assert asked[0][0][0].count("Which is number") == 3


# The command


def test_the_command(finished, items, tmp_path):
    words = ["--tasks", "arc_easy, boolq", "--task-data", items, "--budgets", "1.0,0.5", "--limit", "2"]
    result = call("evaluate", "--run", finished / "buddy", *words, "--json", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert [entry["items"] for entry in found] == [2, 2, 2, 2]
    cells = [f"{100 * entry['value']:.1f}" for entry in found]
    (line,) = [line for line in result.stdout.splitlines() if line.strip().startswith("arc_easy")]
    assert all(cell in line for cell in cells[:2])
    assert "Scoring tasks: 24 of 24" in result.stderr


def test_budgets_in_the_mean_are_named(finished, items, tmp_path):
    run = rewrite(shutil.copytree(finished / "buddy", tmp_path / "buddy"), "mean_over: 1\n", "mean_over: 8\n")
    result = call(
        "evaluate", "--run", run, "--tasks", "arc_easy", "--task-data", items, "--budgets", "0.5", "--limit", "2"
    )
    assert result.exit_code == 0, result.output
    assert "8 tokens" in result.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "pika"], "'pika'"),
        (["--tasks", "piqa"], "HF_HUB_OFFLINE"),
        (["--tasks", ","], "No task"),
        (["--tasks", "piqa", "--task-data", "ITEMS"], "piqa.jsonl"),
        (["--tasks", "piqa", "--task-data", "/no/such"], "/no/such"),
        (["--tasks", "piqa", "--task-path", "ITEMS"], ".yaml"),
        (["--tasks", "piqa", "--task-path", "ITEMS", "--task-data", "ITEMS"], "--task-data"),
        (["--tasks", "boolq", "--task-data", "ITEMS", "--budgets", "0.5,auto"], "auto"),
        (["--tasks", "boolq", "--task-data", "ITEMS", "--budgets", "0.1"], "0.1"),
        (["--tasks", "boolq", "--task-data", "ITEMS", "--data", "x.txt"], "--data"),
        (["--limit", "3"], "--limit"),
        (["--task-data", "ITEMS"], "--task-data"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(finished, items, words, named):
    words = [items if word == "ITEMS" else word for word in words]
    assert named in refused("evaluate", "--run", finished / "buddy", *words)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"doc_to_text": "{{nothing.strip()}}"}, "nothing"),
        ({"doc_to_text": "{% if label %}{{nothing.strip()}}{% endif %}"}, "nothing"),
        ({"unsafe_code": True}, "code"),
        ({"doc_to_image": ["question"]}, "pictures"),
        ({"fewshot_split": "test", "num_fewshot": 9}, "larger"),
    ],
)
def test_a_definition_that_cannot_be_scored(finished, items, tmp_path, more, named):
    define(tmp_path, items / "arc_easy.jsonl", **more)
    with pytest.raises(DataError, match=f"mine .*{named}"):
        task_scores(finished / "buddy", ["mine"], task_path=tmp_path)


def test_an_item_that_cannot_be_scored(finished, items, tmp_path):
    rows = [json.loads(line) for line in (items / "arc_easy.jsonl").read_text().splitlines()[:2]]
    rows[1]["label"] = None
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    define(tmp_path, tmp_path / "items.jsonl")
    with pytest.raises(DataError, match="mine"):
        task_scores(finished / "buddy", ["mine"], [0.5], task_path=tmp_path)

"""Local files as lm-eval's own tasks: the same requests as from the hub's documents, and what is refused."""

import itertools
import json
import os

import pytest
from datasets import Dataset

from buddy.errors import DataError
from buddy.evaluation.task_data import FORMS, local_tasks, own_manager

pytestmark = pytest.mark.slow

ARC = {"question": "What melts?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "1"}
MELTS = {"question": "What melts?", "choices": ["ice", "fire"], "label": 0}
FOR_ARC = [("Question: What melts?\nAnswer:", " ice"), ("Question: What melts?\nAnswer:", " fire")]
# Task: a document as the hub has it, the local line, and the requests and the right choice, written out by hand.
ITEMS = {
    "arc_challenge": (ARC, MELTS, FOR_ARC, 0),
    "arc_easy": (ARC, MELTS, FOR_ARC, 0),
    "openbookqa": (
        {"question_stem": "Ice", "choices": {"text": ["burns", "melts"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "Ice", "choices": ["burns", "melts"], "label": 1},
        [("Ice", " burns"), ("Ice", " melts")],
        1,
    ),
    "piqa": (
        {"goal": "Melt ice.", "sol1": "Warm it.", "sol2": "Cool it.", "label": 0},
        {"question": "Melt ice.", "choices": ["Warm it.", "Cool it."], "label": 0},
        [("Question: Melt ice.\nAnswer:", " Warm it."), ("Question: Melt ice.\nAnswer:", " Cool it.")],
        0,
    ),
    "boolq": (
        {"passage": "Ice -- Ice melts.", "question": "does ice melt", "label": 1},
        {"context": "Ice -- Ice melts.", "question": "does ice melt", "choices": ["no", "yes"], "label": 1},
        [("Ice -- Ice melts.\nQuestion: does ice melt?\nAnswer:", f" {word}") for word in ("no", "yes")],
        1,
    ),
    "hellaswag": (
        {
            "activity_label": "Ice",
            "ctx_a": "It is warm. [header] Melting",
            "ctx_b": "the ice",
            "endings": ["[step] burns.", "melts.  Then"],
            "label": "1",
        },
        {"context": "Ice: It is warm. Melting The ice", "choices": [" burns.", "melts. Then"], "label": 1},
        [("Ice: It is warm. Melting The ice", f" {ending}") for ending in (" burns.", "melts. Then")],
        1,
    ),
    "social_iqa": (
        {"context": "Ann cooled it.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        {"context": "Ann cooled it.", "question": "Why?", "choices": ["a", "b", "c"], "label": 2},
        [("Q: Ann cooled it. Why?\nA:", f" {answer}") for answer in "abc"],
        2,
    ),
    "winogrande": (
        {"sentence": "The ice met the fire and the _ melted.", "option1": "ice", "option2": "fire", "answer": "1"},
        {"question": "The ice met the fire and the _ melted.", "choices": ["ice", "fire"], "label": 0},
        [(f"The ice met the fire and the {word}", " melted.") for word in ("ice", "fire")],
        0,
    ),
}


def requests(task) -> list[tuple[str, str]]:
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def from_hub(name: str, document: dict):
    """lm-eval's own task over one document of the hub's form."""
    splits = {split: Dataset.from_list([document]) for split in ("train", "validation", "test")}
    member = {"task": name, "custom_dataset": lambda **_: splits}
    return own_manager().load([{"group": "one", "task": [member]}])["tasks"][name]


def local(folder, name: str, *lines: dict):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return local_tasks([name], folder)[name]


def test_every_task_is_tried():
    assert ITEMS.keys() == FORMS.keys()


@pytest.mark.parametrize("name", ITEMS)
def test_a_local_line_asks_what_the_hubs_document_asks(name, tmp_path):
    document, line, expected, right = ITEMS[name]
    ours, theirs = local(tmp_path, name, line), from_hub(name, document)
    assert requests(ours) == requests(theirs) == expected
    for task, chosen in itertools.product((ours, theirs), range(len(expected))):
        answers = [(-2.0 if index == chosen else -9.0, False) for index in range(len(expected))]
        assert task.process_results(task.eval_docs[0], answers)["acc"] == (chosen == right)
    assert ours.aggregation() == theirs.aggregation()
    assert ours.VERSION == theirs.VERSION


PIQA = ITEMS["piqa"][1]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("piqa", "{", r"piqa\.jsonl"),
        ("piqa", "[1]", r"piqa\.jsonl"),
        ("piqa", {**PIQA, "question": " "}, "item 2 .*question"),
        ("piqa", {**PIQA, "choices": "a"}, "choices"),
        ("piqa", {**PIQA, "choices": ["a", ""]}, "choices"),
        ("piqa", {**PIQA, "choices": ["a", "b", "c"]}, "3 choices"),
        ("arc_easy", {**PIQA, "choices": ["a"]}, "1 choices"),
        ("piqa", {**PIQA, "label": 2}, "label is 2"),
        ("piqa", {**PIQA, "label": True}, "label"),
        ("boolq", {**PIQA, "context": "x"}, "choices"),
        ("boolq", PIQA, "context"),
        ("winogrande", PIQA, "'_'"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(name, text, named, tmp_path):
    bad = text if isinstance(text, str) else json.dumps(text)
    (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(ITEMS[name][1])}\n{bad}\n")
    with pytest.raises(DataError, match=named):
        local_tasks([name], tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\n", b'null\n{"question": "a"}\n'])
def test_files_that_cannot_be_used(content, tmp_path):
    (tmp_path / "piqa.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"piqa\.jsonl"):
        local_tasks(["piqa"], tmp_path)


def test_items_are_those_of_the_file_that_is_named_now(tmp_path):
    (name, (_, line, *_)), *_ = ITEMS.items()
    for folder, count in (("a1", 1), ("a[1]", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.jsonl").write_text(f"{json.dumps(line)}\n" * count)
    path = tmp_path / "a[1]" / f"{name}.jsonl"
    assert len(local_tasks([name], path.parent)[name].eval_docs) == 2
    before = path.stat()
    path.write_text(f"{json.dumps(line)}\n" * 3)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(local_tasks([name], path.parent)[name].eval_docs) == 3

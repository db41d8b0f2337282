"""Eight multiple-choice tasks of lm-eval over local files instead of the hub's data sets.

NAME.jsonl in the folder has one JSON object a line: `question` and/or `context`, `choices` and `label`, the index of
the right one. Prompts and metrics are lm-eval's own: each line is turned into a document as the hub has it, and the
definition that comes with lm-eval reads that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import DataError, nearest

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Line = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Form:
    """What a task's lines hold, and how one becomes the document that lm-eval's definition reads.

    Attributes:
        texts: fields that must be texts.
        document: of a checked line.
        choices: how many there are; None for two or more.
        fixed: the choices themselves, where the task has no others.
        config: what is changed in lm-eval's definition.
    """

    texts: tuple[str, ...]
    document: Callable[[Line], dict[str, Any]]
    choices: int | None = None
    fixed: tuple[str, ...] | None = None
    config: Mapping[str, Any] | None = None


def _lettered(question: str) -> Callable[[Line], dict[str, Any]]:
    """Documents of ARC and OpenBookQA: the right choice is named by its letter."""

    def document(line: Line) -> dict[str, Any]:
        letters = list(LETTERS[: len(line["choices"])])
        choices = {"text": line["choices"], "label": letters}
        return {question: line["question"], "choices": choices, "answerKey": letters[line["label"]]}

    return document


def _piqa(line: Line) -> dict[str, Any]:
    one, other = line["choices"]
    return {"goal": line["question"], "sol1": one, "sol2": other, "label": line["label"]}


def _boolq(line: Line) -> dict[str, Any]:
    return {"passage": line["context"], "question": line["question"], "label": line["label"]}


def _hellaswag(line: Line) -> dict[str, Any]:
    return {"query": line["context"], "choices": line["choices"], "label": str(line["label"])}


def _social_iqa(line: Line) -> dict[str, Any]:
    answers = dict(zip(("answerA", "answerB", "answerC"), line["choices"], strict=True))
    return {"context": line["context"], "question": line["question"], **answers, "label": str(line["label"] + 1)}


def _winogrande(line: Line) -> dict[str, Any]:
    if line["question"].count("_") != 1:
        raise ValueError("its question needs one '_' where the choices go")
    one, other = line["choices"]
    return {"sentence": line["question"], "option1": one, "option2": other, "answer": str(line["label"] + 1)}


FORMS = {
    "arc_challenge": Form(("question",), _lettered("question")),
    "arc_easy": Form(("question",), _lettered("question")),
    "boolq": Form(("context", "question"), _boolq, fixed=("no", "yes")),
    # lm-eval cleans WikiHow's brackets away first; the context here is the query after that.
    "hellaswag": Form(("context",), _hellaswag, config={"process_docs": None}),
    "openbookqa": Form(("question",), _lettered("question_stem")),
    "piqa": Form(("question",), _piqa, choices=2),
    "social_iqa": Form(("context", "question"), _social_iqa, choices=3),
    "winogrande": Form(("question",), _winogrande, choices=2),
}


def check_local(names: Sequence[str], folder: Path) -> None:
    """Raises DataError where a task has no local form or no file in the folder."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of task files; check --task-data.")
    for name in names:
        if name not in FORMS:
            hint = nearest(name, FORMS) or f"; choose from {', '.join(FORMS)}."
            raise DataError(f"No task over local files is named {name!r}{hint}")
        if not (folder / f"{name}.jsonl").is_file():
            found = sorted(path.stem for path in folder.glob("*.jsonl") if path.stem in FORMS)
            there = f"it has those for {', '.join(found)}" if found else "it has none for any task"
            raise DataError(f"{folder} has no {name}.jsonl; {there}.")


def local_documents(name: str, path: Path) -> list[dict[str, Any]]:
    """The documents in a file, in the fields of the task's data set on the hub.

    Raises:
        DataError: a line that is not what the task needs, with its number; or no line.
    """
    documents = [_document(FORMS[name], text, f"{path} line {number}") for number, text in _lines(path)]
    if not documents:
        raise DataError(f"{path} is empty; give it one JSON object a line.")
    return documents


def local_tasks(names: Sequence[str], folder: Path, manager: TaskManager) -> dict[str, Task]:
    """lm-eval's tasks of these names over the folder's files.

    Raises:
        DataError: see `check_local` and `local_documents`.
    """
    check_local(names, folder)
    members = [{"task": name, **_over(name, local_documents(name, folder / f"{name}.jsonl"))} for name in names]
    # As members of a group the definitions are found by name and overlaid.
    return manager.load([{"group": "local", "task": members}])["tasks"]


def _over(name: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """What is laid over a task's definition to make it read these documents and no others."""
    from datasets import Dataset

    split = "validation"
    held = {split: Dataset.from_list(documents)}
    splits = {"training_split": None, "validation_split": split, "test_split": None, "fewshot_split": None}
    return {"custom_dataset": lambda **_: held, **splits, **(FORMS[name].config or {})}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give it one JSON object a line, in UTF-8.") from error
    # Not splitlines, which also breaks at signs that JSON lets stand in its strings.
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _document(form: Form, text: str, place: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); mend or remove it.") from error
    try:
        _check(form, line)
        return form.document(line)
    except ValueError as error:
        raise DataError(f"{place} cannot be used: {error}; mend or remove it.") from error


def _check(form: Form, line: Any) -> None:
    """Raises ValueError where a line lacks what its task needs."""
    if not isinstance(line, dict):
        raise ValueError("it is not an object in braces")
    for name in form.texts:
        if not isinstance(line.get(name), str) or not line[name].strip():
            raise ValueError(f"it needs the text {name!r}")
    choices, label = line.get("choices"), line.get("label")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("it needs 'choices', a list of texts")
    if form.fixed is not None and tuple(choices) != form.fixed:
        raise ValueError(f"its choices must be {list(form.fixed)}")
    if not 2 <= len(choices) <= len(LETTERS) or (form.choices is not None and len(choices) != form.choices):
        raise ValueError(f"it has {len(choices)} choices, not {form.choices or '2 or more'}")
    if type(label) is not int or not 0 <= label < len(choices):
        raise ValueError(f"its label is {label!r}, not the index of a choice, from 0 to {len(choices) - 1}")

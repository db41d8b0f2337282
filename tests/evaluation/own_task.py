"""Definitions of tasks of one's own, as lm-eval reads them."""

from pathlib import Path

import yaml


def define(folder: Path, items: Path, name: str = "mine", **keys: object) -> None:
    """Write NAME.yaml: a task of multiple choice over a .jsonl file, with further keys or other values of these."""
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition | keys))

"""What a run is made of: a router's code counts by what it does, not by what is said of it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from buddy.training.inputs import _code

CODE = '''
"""A module."""
import torch
class Mine:
    """A class."""
    def score(self, x):
        # why
        return torch.relu(x) + 1
'''
SAME = [
    CODE.replace("# why", "# another reason"),
    CODE.replace('"""A class."""', '"""A class, told at more length."""'),
    CODE.replace('"""A module."""', ""),
    CODE.replace("torch.relu(x) + 1", "torch.relu(\n            x,\n        ) + 1"),
]
OTHER = [CODE.replace("+ 1", "+ 2"), CODE.replace("relu", "tanh"), CODE + "\nWIDTH = 3\n"]


def digest(folder: Path, text: str) -> str:
    path = folder / f"made_{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return _code(module.Mine)


@pytest.mark.parametrize("text", SAME)
def test_comments_and_layout_do_not_count(tmp_path, text):
    assert digest(tmp_path, text) == digest(tmp_path, CODE)


@pytest.mark.parametrize("text", OTHER)
def test_what_it_does_counts(tmp_path, text):
    assert digest(tmp_path, text) != digest(tmp_path, CODE)


def test_a_class_without_a_file():
    assert _code(type("Made", (), {"__module__": "nowhere"})) == "unknown"

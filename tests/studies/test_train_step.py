"""The bare loop takes a step of the router that Buddy trains; every study can be run as a module."""

import ast
from pathlib import Path

import pytest
import torch

import studies
from buddy.engine.model import RoutedLM, geometry_of
from buddy.registry import build
from studies.train_step import BareLoop
from tests.calibration.small import WINDOWS
from tests.tiny import tiny_backbone


def test_the_bare_loop_takes_a_step():
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, build("buddy", geometry_of(backbone, 1), {}))
    before = {name: value.clone() for name, value in routed.router.named_parameters()}
    BareLoop(routed, lambda index: WINDOWS[index : index + 2], [3, 4], lr=1e-2).step(0)
    changed = {name for name, value in routed.router.named_parameters() if not torch.equal(value, before[name])}
    assert any(name.startswith("output") for name in changed)
    assert all(value.isfinite().all() for value in routed.router.parameters())


@pytest.mark.parametrize("path", sorted(Path(studies.__path__[0]).glob("*.py")), ids=lambda path: path.stem)
def test_a_study_defines_all_before_it_starts(path):
    body = ast.parse(path.read_text("utf-8")).body
    assert not any(isinstance(node, ast.If) for node in body[:-1])

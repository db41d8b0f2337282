"""Searches that were killed go on: the same result, and nothing measured twice."""

from contextlib import suppress
from itertools import count

import pytest
import torch

from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from buddy.registry import build
from tests.tiny import tiny_backbone

WINDOWS = torch.randint(3, 259, (3, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "sleb": {},
    "dr-llm": {"simulations": 8},
    "evopress": {"generations": 6, "offspring": 6, "initial": 6, "windows": [1, 3]},
}


def search(name: str, store, stop_after: int | None = None) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What a router keeps of a search, and how many pairs of plan and batch each measurement took."""
    backbone, measured = tiny_backbone(num_hidden_layers=12), []

    steps = count()

    def track(items, _):
        for item in items:
            if next(steps) == stop_after:
                raise KeyboardInterrupt
            yield item

    torch.manual_seed(0)
    router = build(name, geometry_of(backbone), OPTIONS[name])
    probe = CalibrationProbe(RoutedLM(backbone, router), WINDOWS, 1, track, layer_counts=[9, 7], seed=1, store=store)
    measure = probe._measure
    probe._measure = lambda missing, *rest: (measured.append(len(missing)), measure(missing, *rest))
    with suppress(KeyboardInterrupt):
        router.calibrate(probe)
    return {key: value.clone() for key, value in router.state_dict().items()}, measured


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_search_goes_on_where_it_was_killed(name, tmp_path):
    whole, alone = search(name, tmp_path / "whole")
    _, before = search(name, tmp_path / "parts", stop_after=10)
    resumed, after = search(name, tmp_path / "parts")
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), "bit for bit as if it had not been killed"
    assert 0 < sum(before) < sum(alone)
    assert sum(before) + sum(after) == sum(alone)

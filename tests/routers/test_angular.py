"""Angular distance against brute force on all blocks of a stock model."""

from math import acos, pi

import pytest
import torch

from buddy import Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from routers.angular import Angular
from tests.routers.landscape import Landscape, left_out
from tests.routers.uneven import LAYERS, WINDOWS, uneven_backbone


def distance(states: tuple[torch.Tensor, ...], before: int, after: int) -> float:
    """Mean angle between the last tokens of what enters two layers, one window after the other (eq. 6)."""
    angles = []
    for x, y in zip(states[before][:, -1].double(), states[after][:, -1].double(), strict=True):
        angles.append(acos(float(x @ y / (x.norm() * y.norm()))) / pi)
    return sum(angles) / len(angles)


@pytest.mark.parametrize("context_layer", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_number_of_layers_loses_the_block_that_brute_force_finds(seed, context_layer):
    states = uneven_backbone(seed).model(WINDOWS, output_hidden_states=True).hidden_states
    backbone = uneven_backbone(seed)
    router = Angular(geometry_of(backbone, context_layer))
    router.calibrate(CalibrationProbe(RoutedLM(backbone, router), WINDOWS, 2))
    routable, starts = LAYERS - context_layer - 1, set()
    for n in range(1, routable + 1):
        angles = [
            distance(states, first, first + n) for first in range(context_layer, context_layer + routable - n + 1)
        ]
        start = angles.index(min(angles))
        assert left_out(router, LAYERS - n) == set(range(start, start + n))
        starts.add(start)
    assert left_out(router, LAYERS) == set()
    assert len(starts) > 1


def test_of_equal_blocks_the_earlier_goes():
    sizes = Geometry(layers=7, context_layer=1, hidden=8, features=4)
    probe, router = Landscape(sizes, lambda removed: 0.0, []), Angular(sizes)
    probe.angular_distance = torch.ones(6, 6).triu(1)
    router.calibrate(probe)
    for n in range(6):
        assert left_out(router, 7 - n) == set(range(n))


def test_a_second_calibration_forgets_the_first():
    sizes = Geometry(layers=7, context_layer=1, hidden=8, features=4)
    probe, router = Landscape(sizes, lambda removed: 0.0, []), Angular(sizes)
    for far in (0, 4):
        probe.angular_distance = torch.ones(6, 6).triu(1)
        probe.angular_distance[far, far + 1] = 0.5
        router.calibrate(probe)
        assert left_out(router, 6) == {far}

"""Dr.LLM: its searches, its network, and one plan for an input."""

from itertools import combinations

import pytest
import torch

from buddy import Context
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from routers.dr_llm import DrLLM
from tests.routers.planted import planted_backbone
from tests.tiny import tiny_backbone

WINDOWS = torch.randint(3, 259, (4, 16), generator=torch.Generator().manual_seed(0))


class ByDistance(CalibrationProbe):
    """The text of a random model says nothing about its layers; distance to the dense model stands for the answers."""

    def losses(self, runs, criterion="ce", windows=None, **options):
        return super().losses(runs, "kl", windows, **options)


def calibrated(backbone, windows, asked, probe=CalibrationProbe, **options) -> tuple[RoutedLM, CalibrationProbe]:
    model = RoutedLM(backbone, DrLLM(geometry_of(backbone), **options))
    probe = probe(model, windows, layer_counts=asked, seed=0, prompt=8)
    model.router.calibrate(probe)
    return model, probe


def test_a_search_with_enough_simulations_finds_the_best_set_of_each_window():
    model, probe = calibrated(tiny_backbone("llama"), WINDOWS, (5, 4), simulations=100)
    found = model.router.search(probe, 4)
    assert [*found] == [5, 4]
    for executed, sets in found.items():
        removed = [*combinations(range(4), 6 - executed)]
        losses = probe.losses(torch.stack([probe.plan_without(each) for each in removed]))
        for window, best in enumerate(losses.argmin(0).tolist()):
            assert (~sets[window]).nonzero()[:, 0].tolist() == list(removed[best])


def test_simulations_bound_what_is_measured():
    backbone, asked = tiny_backbone("llama", num_hidden_layers=10), []
    router = DrLLM(geometry_of(backbone), simulations=8)

    class Counts(CalibrationProbe):
        def losses(self, runs, criterion="ce", windows=None, **options):
            if isinstance(windows, list):
                asked.append(len(runs))
            return super().losses(runs, criterion, windows, **options)

    probe = Counts(RoutedLM(backbone, router), WINDOWS, layer_counts=(8, 6), prompt=8)
    router.search(probe, 4)
    assert 0 < sum(asked) <= 4 * 2 * (1 + 8)


def kinds(rows: int, seed: int) -> torch.Tensor:
    """(rows, 16) long: rows of even and of odd ids in turn."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(2, 129, (rows, 16), generator=generator) + (torch.arange(rows) % 2)[:, None]


@pytest.mark.slow
def test_unseen_prompts_get_the_layers_that_their_text_needs():
    model, _ = calibrated(planted_backbone(), kinds(24, 0), (4, 3), ByDistance)
    runs = model(kinds(8, 1), executed=torch.full((8,), 4), prompt=8).runs[:, 1:, 1:5]
    even, odd = torch.tensor([True, False, True, False]), torch.tensor([False, True, False, True])
    assert (runs[0::2] == even).all()
    assert (runs[1::2] == odd).all()
    assert (runs == runs[:, :1]).all(), "one plan per input"


def test_without_budgets_below_one_nothing_is_searched():
    model, _ = calibrated(tiny_backbone("llama"), WINDOWS, ())
    assert model(WINDOWS, executed=torch.tensor([3, 4, 5, 6]), prompt=8).runs[:, -1].sum(-1).tolist() == [3, 4, 5, 6]


def test_k_is_an_input():
    backbone = tiny_backbone("llama")
    router, pooled = DrLLM(geometry_of(backbone)), torch.randn(1, geometry_of(backbone).features)
    scores = [
        router.score(Context(pooled, pooled, torch.zeros(1, 64), torch.full((1,), executed))) for executed in (3, 5)
    ]
    assert not torch.equal(*scores)

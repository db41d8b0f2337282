"""The most frequent plan, against counting by hand; and the router that runs it alone."""

from collections import Counter

import pytest
import torch

from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.hub.export import OnePlan
from buddy.inspection.routing import most_frequent
from tests.engine.reference import Fickle, FickleGates
from tests.tiny import tiny_backbone

IDS = torch.randint(3, 259, (5, 24), generator=torch.Generator().manual_seed(0))
WINDOWS = Windows(IDS, torch.arange(5))


def by_hand(routed: RoutedLM, executed: int, prompt: int) -> tuple[Counter, list[tuple[int, ...]]]:
    """How often each plan is asked for by a token that is no sink."""
    runs = routed(IDS, executed=torch.full((5,), executed), prompt=prompt).runs[:, routed.sink_tokens :]
    plans = [tuple(plan.nonzero()[:, 0].tolist()) for plan in runs.flatten(0, 1)]
    return Counter(plans), plans


@pytest.mark.parametrize("settings", [{}, {"sink_tokens": 0}, {"prompt_plan": "shared", "reroute_every": None}])
@pytest.mark.parametrize("router", [Fickle, FickleGates])
def test_it_is_what_counting_gives(router, settings):
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, router(geometry_of(backbone)), **settings)
    for executed in (3, 4):
        counts, plans = by_hand(routed, executed, 9)
        choice = most_frequent(routed, WINDOWS, executed, prompt=9, batch_size=2)
        assert counts[choice.kept] == max(counts.values())
        assert (choice.tokens, choice.plans) == (len(plans), len(counts))
        assert choice.share == pytest.approx(counts[choice.kept] / len(plans))
        chosen = [{*plan} - {0, 5} for plan in plans]
        held = sum(len(plan & {*choice.kept}) for plan in chosen) / sum(map(len, chosen))
        assert choice.overlap == pytest.approx(held)
        assert sorted({*choice.kept} | {*choice.removed}) == list(range(6))


def test_one_plan_runs_its_layers_for_every_token():
    backbone = tiny_backbone()
    kept = (0, 2, 3, 5)
    routed = RoutedLM(backbone, OnePlan(geometry_of(backbone), kept), sink_tokens=0)
    runs = routed(IDS, executed=torch.full((5,), 4)).runs
    assert runs.sum() == 4 * IDS.numel()
    assert runs[..., list(kept)].all()
    choice = most_frequent(routed, WINDOWS, 4, prompt=9)
    assert (choice.kept, choice.plans, choice.share, choice.overlap) == (kept, 1, 1.0, 1.0)

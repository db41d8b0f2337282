"""What ran against planted plans, and the refusal to show what did not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from buddy import Context, Geometry, Router
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.inspection.routing import TextWindows, observe
from tests.tiny import tiny_backbone

PROMPT, TOKENS = 5, 14


class TwoOrders(Router):
    """The earliest layers for tokens whose first hidden number is negative, the latest for the others."""

    def score(self, context: Context) -> Tensor:
        """(..., R)."""
        depth = torch.arange(self.geometry.routable, dtype=torch.float32)
        return torch.where(context.hidden[..., :1] < 0, -depth, depth)


def planted_runs(hidden: Tensor, executed: int, geometry: Geometry, sinks: int) -> list[list[list[bool]]]:
    """N × T × L, what `TwoOrders` has to run, one token and one layer at a time."""
    found = []
    for row in hidden:
        plans = []
        for position, state in enumerate(row):
            routable = list(range(geometry.context_layer, geometry.layers - 1))
            kept = executed - geometry.always_on
            chosen = routable[:kept] if state[0] < 0 else routable[len(routable) - kept :]
            always = [*range(geometry.context_layer), geometry.layers - 1]
            plans.append([position < sinks or layer in (*chosen, *always) for layer in range(geometry.layers)])
        found.append(plans)
    return found


@pytest.fixture
def routed():
    backbone = tiny_backbone()
    return RoutedLM(backbone, TwoOrders(geometry_of(backbone)), sink_tokens=2)


@pytest.fixture
def domains():
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 259, (windows, TOKENS), generator=draw) for windows in (5, 2)]
    texts = [Windows(each, torch.zeros(len(each), dtype=torch.long)) for each in ids]
    return [TextWindows("one", "one.txt", texts[0], PROMPT), TextWindows("two", None, texts[1], PROMPT)]


@torch.no_grad()
def states(routed, domain):
    return routed(domain.windows.input_ids).context.hidden


def test_plans_are_the_planted_ones(routed, domains):
    seen = []
    found = observe(
        routed, domains, [5, 3, 3], batch_size=2, track=lambda jobs: [seen.append(job) or job for job in jobs]
    )
    assert found.keys() == {(label, count) for label in ("one", "two") for count in (5, 3)}
    assert len(seen) == (3 + 1) * 2, "a forward for each batch and budget"
    for domain in domains:
        hidden = states(routed, domain)
        assert 0.1 < (hidden[..., 0] < 0).float().mean() < 0.9, "both orders occur"
        for count in (5, 3):
            expected = planted_runs(hidden, count, routed.geometry, sinks=2)
            assert found[domain.label, count].tolist() == expected


def test_a_shared_prompt_has_one_plan(routed, domains):
    with routed.changed(prompt_plan="shared"):
        runs = observe(routed, domains[:1], [3])["one", 3]
    expected = planted_runs(states(routed, domains[0]), 3, routed.geometry, sinks=2)
    for window, plans in zip(runs.tolist(), expected, strict=True):
        assert window[2:PROMPT] == [plans[PROMPT - 1]] * (PROMPT - 2)
        assert window[PROMPT:] == plans[PROMPT:]


def test_a_plan_that_did_not_run_is_not_shown(routed, domains, monkeypatch):
    forward = RoutedLM.forward

    def lie(self, *words, **options):
        output = forward(self, *words, **options)
        return replace(output, runs=output.runs.clone().index_fill_(-1, torch.tensor([2]), True))

    monkeypatch.setattr(RoutedLM, "forward", lie)
    with pytest.raises(RuntimeError, match="not those of the plan"):
        observe(routed, domains, [3])

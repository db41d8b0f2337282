"""Properties of plans: exactly K, whatever the scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy.errors import BudgetError
from buddy.plan import Plan, plan_rows_on_host, top_k

LAYERS = st.integers(3, 40)
VALUES = st.floats(-1e6, 1e6, width=32)


@st.composite
def scored(draw, values=VALUES):
    """(scores (B, R), executed (B,), L), with any always-on layers that fit."""
    routable = draw(st.integers(1, 30))
    always_on = draw(st.integers(2, 4))
    rows = draw(st.integers(1, 4))
    scores = draw(st.lists(st.lists(values, min_size=routable, max_size=routable), min_size=rows, max_size=rows))
    executed = draw(st.lists(st.integers(always_on, always_on + routable), min_size=rows, max_size=rows))
    return torch.tensor(scores), torch.tensor(executed), always_on + routable


@given(scored())
def test_the_k_best_layers_run(case):
    """Exactly K, with all that always run; none that is skipped scores above one that runs; each row by itself."""
    scores, executed, layers = case
    plan = Plan.from_scores(scores, executed, layers)
    assert torch.equal(plan.executed, executed)
    first = layers - scores.shape[-1] - 1
    assert plan.runs[..., :first].all()
    assert plan.runs[..., -1].all()
    runs = plan.runs[..., first:-1]
    worst_run = scores.masked_fill(~runs, torch.inf).amin(-1)
    best_skipped = scores.masked_fill(runs, -torch.inf).amax(-1)
    assert (worst_run >= best_skipped).all()
    single = [Plan.from_scores(s, k, layers).runs for s, k in zip(scores, executed, strict=True)]
    assert torch.equal(plan.runs, torch.stack(single))


@given(scored(values=st.integers(-1000, 1000).map(float)), st.integers(-1000, 1000))
def test_a_constant_added_changes_nothing(case, constant):
    scores, executed, layers = case  # whole numbers, so that the sum is exact
    before, after = (Plan.from_scores(s, executed, layers).runs for s in (scores, scores + constant))
    assert torch.equal(before, after)


@given(scored())
def test_plans_nest_where_scores_do_not_depend_on_the_budget(case):
    scores, _, layers = case
    always_on = layers - scores.shape[-1]
    counts = torch.arange(always_on, layers + 1)[:, None].expand(-1, len(scores))
    runs = Plan.from_scores(scores.expand(len(counts), -1, -1), counts, layers).runs
    assert (runs[:-1] <= runs[1:]).all()


def test_ties_break_by_layer_index():
    assert top_k(torch.zeros(6), torch.tensor(2)).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("executed", [1, 7])
def test_a_count_that_no_plan_has_is_refused(executed):
    with pytest.raises(BudgetError, match="from 2 to 6 layers"):
        Plan.from_scores(torch.zeros(4), torch.tensor(executed), 6)
    with pytest.raises(BudgetError, match="from 2 to 6 layers"):
        plan_rows_on_host([[0.0] * 4], (executed,), 6)

"""Plans whose count holds in the mean over tokens."""

import torch

from studies.mean_count import plan_above, window_plan

LAYERS, ROUTABLE = 8, 5


def scores(rows: int = 3, tokens: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, tokens, ROUTABLE, generator=generator) + torch.randn(rows, tokens, 1, generator=generator)


def test_the_best_scores_of_a_window_run_and_as_many_as_asked():
    given, executed = scores(), torch.tensor([4, 6, 7])
    plan = window_plan(given, executed, LAYERS, sinks=1)
    assert plan[:, 0].all()
    assert plan[..., :2].all()
    assert plan[..., -1].all()
    assert plan[:, 1:].sum((1, 2)).tolist() == [39 * count for count in executed.tolist()]
    runs = plan[:, 1:, 2:-1]
    for row in range(3):
        assert given[row, 1:][runs[row]].min() > given[row, 1:][~runs[row]].max()
    assert len(set(plan[0, 1:].sum(-1).tolist())) > 3  # not the same for each token


def test_a_correction_holds_the_mean_and_no_plan_depends_on_later_tokens():
    given = scores(tokens=400)
    free = plan_above(given, 2.0, 3.0, 0.0, LAYERS, sinks=1)
    assert torch.equal(free[:, 1:, 2:-1], given[:, 1:] > 2.0)
    held = plan_above(given, 2.0, 3.0, 0.05, LAYERS, sinks=1)
    mean = held[:, 1:].sum(-1).float().mean(1)
    assert (mean - 6.0).abs().max() < 0.2 < (free[:, 1:].sum(-1).float().mean(1) - 6.0).abs().min()
    changed = torch.cat([given[:, :200], -given[:, 200:]], 1)
    assert torch.equal(plan_above(changed, 2.0, 3.0, 0.05, LAYERS, sinks=1)[:, :200], held[:, :200])

"""Losses on some of the windows."""

import pytest
import torch

from tests.calibration.small import WINDOWS, plans, probe


@pytest.mark.parametrize("chosen", [[0], [1, 4], range(1, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("criterion", ["ce", "kl"])
def test_some_windows_have_the_losses_that_they_have_among_all(chosen, criterion):
    measured, runs = probe(), plans(4)
    some = measured.losses(runs, criterion, chosen)
    torch.testing.assert_close(some, measured.losses(runs, criterion)[:, list(chosen)], atol=1e-6, rtol=1e-6)


def test_only_the_chosen_windows_are_run():
    measured, seen = probe(), []
    layer = measured.routed.backbone.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]) if args[0].shape[1] > 1 else None)
    measured.losses(plans(3), windows=[0, 2, 4])
    assert sum(rows for rows, _ in set(seen)) == 3
    seen.clear()
    measured.losses(plans(3), windows=[0, 2, 4])
    assert not seen, "nothing is measured twice"


@pytest.mark.parametrize("chosen", [[], [5], [-1], [2, 1], [1, 1]])
def test_impossible_windows_are_refused(chosen):
    with pytest.raises(ValueError, match="give rising numbers from 0 to 4"):
        probe().losses(plans(1), windows=chosen)


def test_no_plan_has_no_losses():
    assert probe().losses(plans(0), windows=[0, 3]).shape == (0, 2)
    assert len(WINDOWS) == 5

"""Sound routers pass every check, and each fault fails the one check that names it."""

import re

import pytest
import torch

from buddy import plan, testing
from buddy.registry import installed
from buddy.testing import CHECKS, Subject, answers, check_router
from buddy.testing import engine as running
from tests.testing.bad import FAULTS, BufferMeddler, DropsOut, Meddler, PeeksAhead, Sound, SoundGates, Whole

NAMES = [entry.name for entry in installed() if entry.distribution == "buddy-depth"]


@pytest.fixture(scope="module")
def backbone():
    return testing.tiny_backbone()


@pytest.mark.parametrize("router", [*NAMES, Sound, SoundGates, DropsOut])
def test_a_sound_router_passes(router, backbone):
    results = {result.check: result for result in check_router(router, backbone=backbone)}
    assert len(results) == len(CHECKS)
    assert {result.state for result in results.values()} <= {"passed", "left out"}
    left_out = {name for name, result in results.items() if result.state == "left out"}
    assert left_out <= {"groups", "weights", "gradients"}, "every other check asked something"


@pytest.mark.parametrize("options", [{"per": "input"}, {"per": "run", "seed": 3}])
def test_options_are_handed_on(options, backbone):
    check_router("random", options=options, backbone=backbone)


@pytest.mark.parametrize("router", FAULTS, ids=lambda router: router.__name__)
def test_a_fault_fails_the_check_that_names_it(router, backbone):
    check, words = FAULTS[router]
    spoils = router in (Meddler, BufferMeddler)
    subject = Subject(router, backbone=None if spoils else backbone)
    results = [each.examine(subject) for each in CHECKS]
    failed = {result.check: result.words for result in results if result.state == "failed"}
    assert [*failed] == [check], failed
    assert words in failed[check]
    assert failed[check].endswith(".")
    assert "\n" not in failed[check]


def test_layers_that_run_beyond_the_count_are_noticed(backbone, monkeypatch):
    """No router can overspend, so here the engine does."""
    honest = plan.top_k
    monkeypatch.setattr(plan, "top_k", lambda scores, k: honest(scores, k + 1))
    result = running.counts.examine(Subject(Sound, backbone=backbone))
    assert result.state == "failed"
    assert re.search(r"tokens did not run the layers asked for \(3 instead of 2\)", result.words)


def test_every_check_can_fail():
    assert {check for check, _ in FAULTS.values()} == {check.name for check in CHECKS} - {"counts"}


def test_a_large_number_common_to_all_layers_hides_no_leak(backbone):
    class FarUp(PeeksAhead):
        """Learned: peeks ahead, far from nought."""

        def score(self, context):
            return super().score(context) + 3000.0

    assert answers.causal.examine(Subject(FarUp, backbone=backbone)).state == "failed"


def test_a_failed_check_leaves_gradients_on(backbone):
    assert answers.dtype.examine(Subject(Whole, backbone=backbone)).state == "failed"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("router", ["random", SoundGates])
def test_random_numbers_go_on_as_if_nothing_had_been_checked(router, backbone):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check_router(router, backbone=backbone)
    assert torch.equal(torch.rand(3), expected)

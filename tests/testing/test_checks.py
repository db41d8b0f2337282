"""Sound routers pass every check, and each fault fails the one check that names it."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from buddy import Router, plan, testing
from buddy.registry import installed
from buddy.testing import CHECKS, Failed, Subject, behaviour, check_router, outputs
from buddy.testing.subject import LENGTH, ROWS
from tests.testing.bad import FAULTS, DropsOut, Nameless, PeeksAhead, Sound, SoundGates

NAMES = [entry.name for entry in installed() if entry.value.startswith("routers.")]
TRAINING = {"groups", "weights", "gradients"}
TOKENS = st.tuples(st.integers(0, ROWS - 1), st.integers(0, LENGTH - 1))


@pytest.fixture(scope="module")
def backbone():
    return testing.tiny_backbone()


@pytest.mark.slow
@pytest.mark.parametrize("router", [*NAMES, Sound, SoundGates, DropsOut])
def test_a_sound_router_passes(router, backbone):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    states = {result.check: result.state for result in check_router(router, backbone=backbone)}
    assert torch.equal(torch.rand(3), expected), "the caller's generator goes on as if nothing had been checked"
    assert [*states] == [check.name for check in CHECKS]
    assert {*states.values()} <= {"passed", "skipped"}
    assert {name for name, state in states.items() if state == "skipped"} <= TRAINING


@pytest.mark.slow
@pytest.mark.parametrize("router", FAULTS, ids=lambda router: router.__name__)
def test_a_fault_fails_the_check_that_names_it(router, backbone):
    spoils = FAULTS[router] == "calibration"
    subject = Subject(router, backbone=None if spoils else backbone)
    failed = [result for result in (each.examine(subject) for each in CHECKS) if result.state == "failed"]
    assert [result.check for result in failed] == [FAULTS[router]]
    assert failed[0].message.endswith(".")
    assert "\n" not in failed[0].message
    assert torch.is_grad_enabled()


def test_a_missing_docstring_blocks_no_check(backbone):
    results = [each.examine(Subject(Nameless, backbone=backbone)) for each in CHECKS[:3]]
    assert [result.state for result in results] == ["failed", "passed", "passed"]


def test_layers_that_run_beyond_the_count_are_noticed(backbone, monkeypatch):
    """No router can overspend, so here the engine does."""
    honest = plan.top_k
    monkeypatch.setattr(plan, "top_k", lambda scores, k: honest(scores, k + 1))
    result = behaviour.plans.examine(Subject(Sound, backbone=backbone))
    assert (result.state, "3 instead of 2" in result.message) == ("failed", True)


def test_every_check_can_fail():
    assert {*FAULTS.values()} == {check.name for check in CHECKS}


def test_a_large_number_common_to_all_layers_hides_no_leak(backbone):
    class FarUp(PeeksAhead):
        """Learned: peeks ahead, far from 0."""

        def score(self, context):
            return super().score(context) + 3000.0

    assert outputs.independent.examine(Subject(FarUp, backbone=backbone)).state == "failed"


class Leaks(Router):
    """Learned: reads its token, and for one token of a window another one too."""

    kind = "learned"
    reader, source = (0, 0), (0, 0)

    def score(self, context):
        scores = context.hidden[..., : self.geometry.routable]
        if scores.dim() < 3 or scores.shape[:2] != (ROWS, LENGTH):
            return scores
        scores = scores.clone()
        scores[self.reader] += 0.3 * context.hidden[self.source][: self.geometry.routable].flip(0)
        return scores


@pytest.fixture(scope="module")
def leaking(backbone):
    return Subject(Leaks, backbone=backbone)


@settings(max_examples=40, deadline=None)
@given(reader=TOKENS, source=TOKENS)
def test_every_leak_between_tokens_is_named(leaking, reader, source):
    assume(reader != source)
    Leaks.reader, Leaks.source = reader, source
    leak = "other rows" if source[0] != reader[0] else "later tokens" if source[1] > reader[1] else "earlier tokens"
    with pytest.raises(Failed, match=leak):
        outputs.independent.function(leaking)

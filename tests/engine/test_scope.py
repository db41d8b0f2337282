"""Routers that make one plan for an input, from its prompt's last token."""

from functools import partial
from itertools import permutations

import pytest
import torch

from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError
from tests.engine import reference
from tests.engine.reference import Fickle, FickleGates, decoded

EXECUTED, LENGTH, PROMPT = torch.tensor([3, 4, 5]), 14, 6
IDS = torch.randint(3, 259, (3, LENGTH), generator=torch.Generator().manual_seed(0))


class OnePlan(Fickle):
    """Its class says that a plan is for a prompt."""

    scope = "prompt"


routed_tiny = partial(reference.routed_tiny, router=OnePlan)


@pytest.mark.parametrize("options", [{}, {"reroute_every": 2}, {"prompt_plan": "token", "reroute_every": 1}])
def test_a_window_has_the_plan_of_its_prompts_last_token(options):
    routed = routed_tiny(**options)
    runs = routed(IDS, executed=EXECUTED, prompt=PROMPT).runs
    expected = routed_tiny(router=Fickle)(IDS, executed=EXECUTED).runs[:, PROMPT - 1 : PROMPT]
    assert torch.equal(runs[:, 1:], expected.expand(-1, LENGTH - 1, -1))
    scores = routed(IDS, executed=EXECUTED, prompt=PROMPT).context
    planned = routed.plan(routed.router.score(scores), EXECUTED, PROMPT)
    assert torch.equal(planned, expected.expand(-1, LENGTH, -1))


@pytest.mark.parametrize("cuts", [[PROMPT], [PROMPT, PROMPT + 3]])
def test_decode_keeps_the_plan_of_the_prefill(cuts):
    routed = routed_tiny(reroute_every=1)
    parallel = routed(IDS, executed=EXECUTED, prompt=PROMPT)
    logits, runs, _ = decoded(routed, IDS, EXECUTED, cuts)
    assert torch.equal(runs, parallel.runs)
    torch.testing.assert_close(logits, parallel.logits, atol=1e-4, rtol=1e-4)


def test_generate_never_changes_the_plan_and_takes_no_token_back():
    routed = routed_tiny()
    with routed.at(0.5) as record:
        routed.backbone.model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        cache = routed.backbone.model(IDS[:1], use_cache=True).cache
    assert len(torch.cat(record.runs[:-1], 1)[0, 1:].unique(dim=0)) == 1
    with pytest.raises(BuddyError, match="reroute_every"):
        cache.crop(-1)


def test_other_settings_for_a_while_leave_the_scope():
    routed = routed_tiny()
    with routed.changed(prompt_plan="token", reroute_every=1):
        assert (routed.settings.prompt_plan, routed.settings.reroute_every) == ("shared", None)
    ordinary = routed_tiny(router=Fickle)
    with ordinary.changed(prompt_plan="shared"):
        assert (ordinary.settings.prompt_plan, ordinary.settings.reroute_every) == ("shared", 1)
    assert ordinary.settings.prompt_plan == "token"


@torch.no_grad()
@pytest.mark.parametrize("kind", [Fickle, FickleGates])
@pytest.mark.parametrize("options", [{"prompt_plan": "shared"}, {}, {"reroute_every": 3}, {"reroute_every": 1}])
def test_what_follows_a_prompt_at_full_depth_is_planned_as_if_it_came_token_by_token(kind, options):
    """The first token after it decides, and no later one is seen before."""
    routed = routed_tiny(router=kind, **{"reroute_every": None, **options})
    model, plans, logits = routed.backbone.model, [], []
    for lengths in ([8], [1] * 8, [3, 5]):
        with routed.at(1.0):
            cache = model(IDS[:, :PROMPT], use_cache=True).cache
        with routed.at(0.5) as record:
            parts = IDS[:, PROMPT:].split(lengths, 1)
            logits.append(torch.cat([model(part, cache=cache, use_cache=True).logits for part in parts], 1))
        plans.append(torch.cat(record.runs, 1))
    for other in (1, 2):
        assert torch.equal(plans[0], plans[other])
        assert torch.allclose(logits[0], logits[other], atol=1e-5)
    if routed.settings.reroute_every is None:
        assert all(len(row.unique(dim=0)) == 1 for row in plans[0])


def test_a_newer_router_of_the_same_backbone_decodes():
    first, ids = routed_tiny(), IDS[:1]
    expected = routed_tiny()(ids, executed=torch.tensor([4])).logits
    newer = RoutedLM(first.backbone, first.router)
    with newer.at(executed=[4]):
        cache = newer.backbone.model(ids[:, :-1], use_cache=True).cache
        logits = newer.backbone.model(ids[:, -1:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected[:, -1:], atol=1e-4, rtol=1e-4)


def test_a_newer_router_takes_the_place_of_an_older_one():
    older = routed_tiny()
    base, hooks = older.backbone.base, len(older.backbone.base._forward_pre_hooks)
    with older.at(0.5), pytest.raises(BuddyError):
        RoutedLM(older.backbone, older.router)
    newer = RoutedLM(older.backbone, older.router)
    assert len(base._forward_pre_hooks) == hooks
    with pytest.raises(BuddyError, match="newer"):
        older(IDS, executed=EXECUTED)
    newer.detach()
    with pytest.raises(BuddyError, match="newer"):
        older(IDS, executed=EXECUTED)


def test_an_older_router_takes_off_only_itself():
    older = routed_tiny()
    newer = RoutedLM(older.backbone, older.router)
    expected = newer(IDS, executed=EXECUTED).logits
    older.detach()
    assert torch.equal(newer(IDS, executed=EXECUTED).logits, expected)


@pytest.mark.parametrize(("first", "other"), [*permutations([Fickle, OnePlan, FickleGates], 2)])
def test_another_router_for_a_while_plans_as_if_it_had_been_attached(first, other):
    routed, alone = (routed_tiny(router=router, reroute_every=2) for router in (first, other))
    own = routed(IDS, executed=EXECUTED, prompt=PROMPT)
    with routed.changed(alone.router):
        lent = routed(IDS, executed=EXECUTED, prompt=PROMPT)
    expected, after = (each(IDS, executed=EXECUTED, prompt=PROMPT) for each in (alone, routed))
    assert torch.equal(lent.runs, expected.runs)
    assert torch.equal(lent.logits, expected.logits)
    assert torch.equal(after.runs, own.runs)
    assert torch.equal(after.logits, own.logits)

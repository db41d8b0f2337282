"""transformers' generate() on a routed model: every way of decoding, at full depth and below."""

import pytest
import torch
from transformers import StoppingCriteria

from tests.engine.reference import Fickle, FickleGates, reference_logits, routed_tiny
from tests.tiny import tiny_backbone

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
COMMON = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 5)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "stopping": {"do_sample": False, "stopping_criteria": [AfterFive()]},
}


def generated(model, way: str, **options):
    torch.manual_seed(0)
    return model.generate(IDS, attention_mask=MASK, **COMMON, **WAYS[way], **options)


@pytest.mark.parametrize("way", WAYS)
def test_at_full_budget_generate_returns_what_stock_returns(way):
    expected = generated(tiny_backbone("llama").model, way)
    routed = routed_tiny()
    with routed.at(1.0):
        assert torch.equal(generated(routed.backbone.model, way), expected)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_assisted_generation_returns_what_greedy_returns(budget):
    routed = routed_tiny()
    model, assistant = routed.backbone.model, tiny_backbone("llama", seed=1).model
    options = {**COMMON, "do_sample": False, "max_new_tokens": 12}
    with routed.at(budget):
        plain = model.generate(IDS[:1], **options)
        assisted = model.generate(IDS[:1], assistant_model=assistant, **options)
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_drafts_by_the_first_layers_change_no_text(budget):
    routed = routed_tiny()
    model, options = routed.backbone.model, {**COMMON, "do_sample": False, "max_new_tokens": 12}
    with routed.at(budget):
        plain = model.generate(IDS[:1], **options)
        drafted = model.generate(IDS[:1], assistant_early_exit=3, **options)
    assert torch.equal(plain, drafted)
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize("router", [Fickle, FickleGates])
@pytest.mark.parametrize(("prompt_plan", "budget"), [("shared", 0.5), ("token", "auto")])
def test_assisted_generation_is_refused_where_drafts_would_plan_for_the_prompt(router, prompt_plan, budget):
    routed = routed_tiny(router=router, prompt_plan=prompt_plan)
    routed.chooser = lambda most: lambda context: torch.full_like(context.executed, 4)
    model, assistant = routed.backbone.model, tiny_backbone("llama", seed=1).model
    with routed.at(budget), pytest.raises(ValueError, match="cropped"):  # of transformers
        model.generate(IDS[:1], assistant_model=assistant, do_sample=False, **COMMON)


def test_each_cache_keeps_the_budget_that_was_chosen_for_its_prompt():
    """Guidance runs a second prompt with a cache of its own, in turn with the first."""
    routed, budgets = routed_tiny(), iter((3, 5))
    routed.chooser = lambda most: lambda context: torch.full_like(context.executed, next(budgets))
    with routed.at("auto") as record:
        routed.backbone.model.generate(IDS[:1], guidance_scale=2.0, do_sample=False, **COMMON)
    steps = [set(executed[~sinks].tolist()) for executed, sinks in zip(record.executed, record.sinks, strict=True)]
    assert steps[2:] == [{3}, {5}] * ((len(steps) - 2) // 2)


@pytest.mark.parametrize("policy", ["fill", "hole", "zero"])
@pytest.mark.parametrize("reroute_every", [1, 3, None])
def test_greedy_below_full_depth_follows_brute_force(policy, reroute_every):
    routed = routed_tiny(policy=policy, reroute_every=reroute_every)
    with routed.at(executed=[3, 4]) as record:
        sequences = generated(routed.backbone.model, "greedy")
    mask = torch.cat([MASK, torch.ones(2, 8, dtype=torch.long)], 1)
    runs = torch.cat(record.runs, 1)
    logits = reference_logits(tiny_backbone("llama").model, sequences[:, :-1], runs, mask[:, :-1], policy)
    assert torch.equal(logits[:, IDS.shape[1] - 1 :].argmax(-1), sequences[:, IDS.shape[1] :])
    changes = (runs[:, IDS.shape[1] :][:, 1:] != runs[:, IDS.shape[1] :][:, :-1]).any(-1).sum().item()
    assert (changes == 0) == (reroute_every is None)


def test_a_kept_prefix_is_reused():
    routed = routed_tiny()
    model = routed.backbone.model
    with routed.at(0.5):
        whole = model.generate(IDS[:1], do_sample=False, **COMMON)
        cache = model(IDS[:1, :6], use_cache=True).cache
        reused = model.generate(IDS[:1], cache=cache, do_sample=False, **COMMON)
    assert torch.equal(whole, reused)


def test_padding_changes_nothing():
    routed = routed_tiny()
    model = routed.backbone.model
    with routed.at(0.5):
        padded = generated(model, "greedy")
        alone = model.generate(IDS[:1, 3:], do_sample=False, **COMMON)
    assert torch.equal(padded[0, IDS.shape[1] :], alone[0, IDS.shape[1] - 3 :])

"""The routed model against brute force and against stock transformers, family by family."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import BatchEncoding, GenerationConfig

from buddy.calibration.measures import similarities
from buddy.engine import selection
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BuddyError, BudgetError, DataError
from routers.buddy import BuddyRouter
from routers.first import FiRST
from tests.engine.reference import Fickle, FickleGates, decoded, reference_logits, routed_tiny, whole_layers
from tests.tiny import FAMILIES, tiny_backbone

BATCH, LENGTH = 3, 14
EXECUTED = torch.tensor([3, 4, 6])


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", ["fill", "hole", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_form_equals_brute_force(family, policy):
    routed = routed_tiny(family, policy=policy)
    stock = tiny_backbone(family).model
    output = routed(tokens(), executed=EXECUTED)
    assert len({tuple(plan.tolist()) for plan in output.runs[0]}) > 3, "plans should change from token to token"
    torch.testing.assert_close(
        output.logits, reference_logits(stock, tokens(), output.runs, policy=policy), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_agrees_with_parallel_form(family, padded):
    routed, ids = routed_tiny(family), tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
        mask[2, :1] = 0
    parallel = routed(ids, attention_mask=mask, executed=EXECUTED).logits
    logits, _, record = decoded(routed, ids, EXECUTED, [6], mask)
    real = mask.bool()
    torch.testing.assert_close(logits[real], parallel[real], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(executed[:, 0], EXECUTED) for executed in record.executed[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_equals_stock_exactly(family):
    stock = tiny_backbone(family).model
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    expected = [stock(tokens()).logits, stock(tokens(), attention_mask=mask).logits]
    routed = routed_tiny(family)
    full = torch.full((BATCH,), 6)
    assert torch.equal(routed(tokens(), executed=full).logits, expected[0])
    assert torch.equal(routed(tokens(), attention_mask=mask, executed=full).logits, expected[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_later_tokens_change_nothing_before_them(family):
    routed, ids = routed_tiny(family), tokens()
    chosen = routed(ids, executed=EXECUTED)
    with whole_layers():
        whole = routed(ids, executed=EXECUTED)
    for cut in range(1, LENGTH):
        changed = ids.clone()
        changed[:, cut:] = tokens(seed=cut)[:, cut:]
        with whole_layers():
            after = routed(changed, executed=EXECUTED)
        assert torch.equal(whole.runs[:, :cut], after.runs[:, :cut])
        assert torch.equal(whole.logits[:, :cut], after.logits[:, :cut])
        # Running only the chosen tokens changes the shapes of the products, and so their last bit.
        after = routed(changed, executed=EXECUTED)
        assert torch.equal(chosen.runs[:, :cut], after.runs[:, :cut])
        torch.testing.assert_close(chosen.logits[:, :cut], after.logits[:, :cut], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_whole_layers_changes_nothing(family, monkeypatch):
    routed = routed_tiny(family)
    outputs = []
    for few in (0, 10**6):
        monkeypatch.setattr(selection, "MIN_SKIPPED", few)
        with torch.no_grad(), routed.at(executed=EXECUTED.tolist()) as record:
            done = routed.backbone.model(tokens(), use_cache=True)
            after = routed.backbone.model(tokens(seed=9)[:, :4], cache=done.cache)
        outputs.append((done.logits, after.logits, record.executed))
    (first, later, ran), (whole, whole_later, whole_ran) = outputs
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(later, whole_later, atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, ran, whole_ran))


def test_layers_count_what_they_ran_not_what_was_planned():
    routed = routed_tiny()
    calls = []
    for index, layer in enumerate(routed.backbone.layers):
        layer.mlp.register_forward_hook(lambda _, args, out, index=index: calls.append(args[0].shape[:2].numel()))
    output = routed(tokens()[:1], executed=torch.tensor([3]))
    assert sum(calls) == output.executed.sum()


@torch.no_grad()
def test_what_a_hook_was_given_stays_as_it_was():
    routed = routed_tiny(prompt_plan="shared", batch_plan="shared")
    for index in range(6):
        given = []
        hook = routed.backbone.layers[index].register_forward_hook(
            lambda *each, to=given: to.extend((each[2], each[2].clone()))
        )
        with routed.at(executed=[2]):
            routed.backbone.model(tokens(), use_cache=True)
        hook.remove()
        held, copied = given
        assert torch.equal(held, copied)


@pytest.mark.parametrize("sinks", [0, 2])
def test_sinks_run_at_full_depth_and_are_told_apart(sinks):
    output = routed_tiny(sink_tokens=sinks)(tokens(), executed=EXECUTED)
    assert output.sinks.sum().item() == sinks * BATCH
    assert (output.executed[output.sinks] == 6).all()
    assert torch.equal(output.executed[:, sinks], EXECUTED)


def test_sinks_are_the_first_real_tokens_of_padded_rows():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    output = routed_tiny()(tokens(), attention_mask=mask, executed=EXECUTED)
    assert output.executed[0, 4] == 6
    assert (output.executed[0, 5:] == 3).all()


def test_shared_prompt_has_the_plan_of_its_last_token():
    shared, token = routed_tiny(prompt_plan="shared"), routed_tiny()
    runs = shared(tokens(), executed=EXECUTED, prompt=6).runs
    expected = token(tokens(), executed=EXECUTED).runs
    assert torch.equal(runs[:, 1:6], expected[:, 5:6].expand(-1, 5, -1))
    assert torch.equal(runs[:, 6:], expected[:, 6:])


def test_generate_with_beams_below_full_depth_equals_brute_force():
    routed = routed_tiny()
    with routed.at(executed=EXECUTED.tolist()):
        result = routed.backbone.model.generate(
            tokens(),
            num_beams=2,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
    logits = routed(result.sequences, executed=EXECUTED).logits[:, LENGTH - 1 : -1].log_softmax(-1)
    chosen = logits.gather(-1, result.sequences[:, LENGTH:, None])[..., 0].sum(1) / 6
    torch.testing.assert_close(chosen, result.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["value", "key", "both"])
def test_rows_that_are_padded_have_the_plans_that_they_have_alone(pool):
    routed, ids = routed_tiny(pool=pool, context_layer=2), tokens()[:1]
    padded = torch.nn.functional.pad(ids, (3, 0), value=0)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    alone = routed(ids, executed=torch.tensor([4]))
    beside = routed(padded, mask, executed=torch.tensor([4]))
    assert torch.equal(beside.runs[:, 3:], alone.runs)
    assert torch.allclose(beside.context.pooled[:, 3:], alone.context.pooled, atol=1e-5)


def test_positional_arguments_count():
    routed, ids = routed_tiny(), tokens()
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with routed.at(executed=[4]) as record:
        by_position = routed.backbone.base(ids, mask).last_hidden_state
        by_name = routed.backbone.base(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(by_position, by_name)
    assert torch.equal(record.runs[0], record.runs[1])


def test_a_crop_takes_the_pool_back():
    routed, ids = routed_tiny(), tokens()
    model = routed.backbone.model
    with routed.at(executed=EXECUTED.tolist()):
        cache = model(ids[:, :10], use_cache=True).cache
        cache.crop(-4)
        again = model(ids[:, 6:7], cache=cache, use_cache=True).logits
    torch.testing.assert_close(again[:, 0], routed(ids[:, :7], executed=EXECUTED).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_a_crop_that_is_refused_changes_nothing():
    routed = routed_tiny("mistral-sliding")
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
    with routed.at(executed=[4]), torch.no_grad():
        cache = routed.backbone.model(ids, use_cache=True).cache
        before = float(cache.pool.count)
        with pytest.raises(RuntimeError):
            cache.crop(-2)
    assert float(cache.pool.count) == before == 40


def test_backward_hooks_of_layers_run():
    routed, seen = routed_tiny(), []
    for layer in routed.backbone.layers:
        layer.register_full_backward_hook(lambda *_: seen.append(1))
    states = routed.backbone.model.get_input_embeddings()(tokens()).detach().requires_grad_()
    with routed.at(executed=[6, 6, 6]):
        routed.backbone.model(inputs_embeds=states, use_cache=False).logits.sum().backward()
    assert len(seen) == 6


@pytest.mark.parametrize("router", [BuddyRouter, FiRST])
def test_routers_decide_in_float32_under_mixed_precision(router):
    backbone = tiny_backbone()
    module = router(geometry_of(backbone))
    types, ask = [], "score" if router is BuddyRouter else "logits"
    asked = getattr(module, ask)
    setattr(module, ask, lambda *given: types.append((answer := asked(*given)).dtype) or answer)
    routed = RoutedLM(backbone, module)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        routed(tokens(), executed=EXECUTED)
    assert {*types} == {torch.float32}


def test_detach_restores_the_stock_model():
    backbone = tiny_backbone("llama")
    kinds = [type(layer) for layer in backbone.layers]
    keys = list(backbone.model.state_dict())
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    assert list(backbone.model.state_dict()) == keys
    routed.detach()
    assert [type(layer) for layer in backbone.layers] == kinds
    assert not backbone.base._forward_pre_hooks
    assert not backbone.base._forward_hooks


def test_no_request_means_the_stock_model():
    routed = routed_tiny()
    expected = tiny_backbone("llama").model(tokens()).logits
    assert torch.equal(routed.backbone.model(tokens()).logits, expected)
    assert torch.equal(routed.dense(tokens()), expected)


@pytest.mark.parametrize("policy", ["hole", "zero"])
def test_another_policy_may_hold_for_a_while(policy):
    routed, other = routed_tiny(), routed_tiny(policy=policy)
    before = routed(tokens(), executed=EXECUTED).logits
    with routed.changed(policy=policy):
        assert torch.equal(routed(tokens(), executed=EXECUTED).logits, other(tokens(), executed=EXECUTED).logits)
    assert torch.equal(routed(tokens(), executed=EXECUTED).logits, before)


def test_a_forward_that_is_interrupted_leaves_the_layers_stock(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    routed, backbone = routed_tiny(), tiny_backbone("llama")
    with monkeypatch.context() as patch:
        patch.setattr(routed.backbone.layers[3].mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            routed(tokens(), executed=EXECUTED)
    stock, after = (similarities(each, [tokens()], 1, 1) for each in (backbone, routed.backbone))
    assert torch.equal(after[0], stock[0])


@pytest.mark.parametrize("way", ["older name", "position"])
def test_a_cache_by_its_older_name_or_by_its_position(way):
    routed, ids = routed_tiny(), tokens()
    with routed.at(0.5):
        cache = routed.backbone.model(ids[:, :-1], use_cache=True).cache
        named = {"past_key_values": cache} if way == "older name" else {}
        before = () if named else (None, None, cache)  # after the mask and the positions
        states = routed.backbone.base(ids[:, -1:], *before, use_cache=True, **named).last_hidden_state
        expected = routed.backbone.base(ids).last_hidden_state[:, -1:]
    torch.testing.assert_close(states, expected)


def test_what_no_forward_can_do_is_refused_and_leaves_the_model_stock():
    routed, stock = routed_tiny(), tiny_backbone("llama").model(tokens()).logits
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with routed.at(executed=[3, 4]), pytest.raises(BudgetError, match="3 rows"):
        routed.backbone.model(tokens())
    with routed.at(executed=[3]), pytest.raises(BudgetError, match="mask"):
        routed.backbone.model(tokens(), attention_mask=mask)
    with pytest.raises(BudgetError), routed.at():
        pass
    right = torch.ones(BATCH, LENGTH).long()
    right[0, -2:] = 0
    with routed.changed(prompt_plan="shared"), routed.at(0.5), pytest.raises(BudgetError, match="left"):
        routed.backbone.model(tokens(), attention_mask=right)
    wrong = {"policy": "holes", "prompt_plan": "share", "batch_plan": "token", "sink_tokens": -1, "reroute_every": 0}
    for name, value in wrong.items():
        with pytest.raises(BuddyError, match=str(value)):
            routed_tiny(**{name: value})
    routed.router.score = lambda context: torch.zeros(routed.geometry.routable)  # not expanded over tokens
    with routed.at(0.5), pytest.raises(BuddyError, match=rf"\({routed.geometry.routable},\)"):
        routed.backbone.model(tokens())
    routed.router.scope = "window"
    with pytest.raises(BuddyError, match="window"), routed.changed(routed.router):
        pass
    assert torch.equal(routed.backbone.model(tokens()).logits, stock)


@pytest.mark.parametrize("reroute_every", [1, 2, 3, None])
@pytest.mark.parametrize("prompt_plan", ["token", "shared"])
def test_parallel_form_decides_as_seldom_as_decode(reroute_every, prompt_plan):
    routed, cut = routed_tiny(reroute_every=reroute_every, prompt_plan=prompt_plan), 6
    parallel = routed(tokens(), executed=EXECUTED, prompt=cut)
    _, runs, _ = decoded(routed, tokens(), EXECUTED, [cut])
    assert torch.equal(parallel.runs, runs)
    changed = (parallel.runs[:, cut:] != parallel.runs[:, cut - 1 : -1]).any(-1).any(0)
    allowed = {t - 1 for t in range(1, LENGTH - cut + 1) if reroute_every and t % reroute_every == 0}
    assert set(changed.nonzero()[:, 0].tolist()) <= allowed
    assert changed.any() == bool(allowed)


@pytest.mark.parametrize("router", [Fickle, FickleGates])
def test_gates_need_the_plan_that_they_belong_to(router):
    routed = routed_tiny(router=router)
    gates = routed(tokens(), executed=EXECUTED).runs.float()
    with pytest.raises(BuddyError, match="runs"):
        routed(tokens(), executed=EXECUTED, gates=gates)


@pytest.mark.parametrize("policy", ["hole", "zero"])
def test_gates_need_fill(policy):
    routed = routed_tiny(policy=policy)
    runs = routed(tokens(), executed=EXECUTED).runs
    with pytest.raises(BuddyError, match="'fill'"):
        routed(tokens(), runs=runs, gates=runs.float())


def test_a_routed_model_can_be_saved_copied_and_checkpointed(tmp_path):
    routed = routed_tiny()
    model = routed.backbone.model
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    whole = routed(tokens(), executed=EXECUTED).logits
    model.activation_checkpointing_enable()
    model.train()
    assert torch.equal(routed(tokens(), executed=EXECUTED).logits, whole)
    model.eval()


def test_hidden_states_can_be_captured_while_layers_are_skipped():
    routed = routed_tiny()
    plain = routed(tokens(), executed=EXECUTED)
    with routed.at(executed=EXECUTED.tolist()):
        output = routed.backbone.model(tokens(), output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 7
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-5, rtol=1e-5)


def test_attention_weights_are_had_at_full_depth_alone():
    routed = routed_tiny()
    model = routed.backbone.model
    model.set_attn_implementation("eager")
    with routed.at(1.0):
        assert len(model(tokens(), output_attentions=True).attentions) == 6
    with routed.at(0.5), pytest.raises(BudgetError):
        model(tokens(), output_attentions=True)


def test_gradient_checkpointing_is_refused_where_weights_of_the_backbone_are_trained():
    routed = routed_tiny()
    model = routed.backbone.model
    model.activation_checkpointing_enable()
    model.train()
    model.get_input_embeddings().requires_grad_(True)
    for budget in (0.5, 1.0):
        with routed.at(budget), pytest.raises(BuddyError):
            model(tokens(), use_cache=False)
    model(tokens(), use_cache=False).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_a_detached_model_says_so():
    routed = routed_tiny()
    routed.detach()
    with pytest.raises(BuddyError, match="detached"), routed.at(0.5):
        pass
    assert routed.dense(tokens()).shape[:2] == (BATCH, LENGTH)


def test_one_text_is_continued_to_one_text():
    routed = routed_tiny()
    for options in ({"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}):
        for given in (options, {"generation_config": GenerationConfig(**options)}):
            with pytest.raises(BuddyError):
                routed.generate("A text", **given)
    with pytest.raises(DataError):
        routed.generate(["A text", "another"])


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, 64),
        ({"max_length": 9}, 6),
        ({"max_new_tokens": 5}, 5),
        ({"generation_config": GenerationConfig(max_new_tokens=7)}, 7),
    ],
)
def test_the_limit_of_a_text_is_the_callers(options, written):
    backbone = replace(tiny_backbone(), tokenizer=Numbers())
    backbone.model.generation_config.eos_token_id = None  # nothing ends a text before its limit
    model = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    assert len(model.generate("A text", **options).split()) == written


class Numbers:
    """Every text has the same three tokens, and a token is its number."""

    pad_token_id = 0

    def __call__(self, *_: object, **__: object) -> BatchEncoding:
        return BatchEncoding({"input_ids": torch.tensor([[3, 4, 5]])})

    def decode(self, ids: torch.Tensor, **_: object) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.mark.parametrize("length", [5, 40])
def test_the_context_computes_no_layer_after_the_context_layer(length):
    model, ran = routed_tiny(context_layer=2), []
    ids = torch.arange(3, 3 + length)[None]
    with torch.no_grad():
        expected = model(ids, executed=torch.tensor([3])).context[:, -1]
    for index, layer in enumerate(model.backbone.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    context = model.context(ids)
    assert ran == [0, 1]
    for name in ("pooled", "newest", "hidden"):
        torch.testing.assert_close(getattr(context, name), getattr(expected, name))


def test_an_empty_prompt_is_refused():
    backbone = tiny_backbone()
    model = RoutedLM(replace(backbone, tokenizer=no_tokens), Fickle(geometry_of(backbone)))
    with pytest.raises(DataError):
        model.generate("")


def no_tokens(*_, **__) -> BatchEncoding:
    return BatchEncoding({"input_ids": torch.empty(1, 0)})


def test_padding_has_no_part_in_a_shared_plan():
    routed, ids = routed_tiny(batch_plan="shared"), tokens()[:2, :14]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    runs = routed(ids, attention_mask=mask, executed=torch.tensor([4, 4])).runs
    assert torch.equal(runs[1, 1:6], routed(ids[1:], executed=torch.tensor([4])).runs[0, 1:6])


@pytest.mark.parametrize("policy", ["fill", "hole", "zero"])
def test_mixed_precision(policy):
    routed, ids = routed_tiny(policy=policy), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        output = routed(ids, executed=EXECUTED)
    assert output.runs.sum(-1)[:, 1:].tolist() == [[count] * (LENGTH - 1) for count in EXECUTED.tolist()]
    expected = routed(ids, runs=output.runs).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()

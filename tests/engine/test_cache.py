"""Adopted caches: what they hold, what is pending, and which are refused."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from buddy.engine.kv_cache import ROOM, SHORT, GrowingLayer
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError
from tests.engine.reference import routed_tiny
from tests.tiny import tiny_backbone

IDS = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))


def decoded(routed: RoutedLM, upto: int, cache=None, start: int = 0):
    model = routed.backbone.model
    for t in range(start, upto):
        out = model(IDS[:, t : t + 1], cache=cache, use_cache=True)
        cache = out.cache
    return out.logits, cache


def test_pending_states_are_counted_and_bounded():
    routed = routed_tiny(batch_plan="shared", reroute_every=None)
    with routed.at(executed=[3]), torch.no_grad():
        _, cache = decoded(routed, 12)
        deferring = [layer for layer in cache.layers if layer.pending]
        assert len(deferring) == 3
        assert all(layer.get_seq_length() == 12 for layer in cache.layers)
        assert all(layer.keys is None or layer.keys.shape[2] < 12 for layer in deferring if layer.is_initialized)
        for _ in range(100):
            routed.backbone.model(IDS[:, :1], cache=cache, use_cache=True)
            assert all(len(layer.pending) < 64 for layer in cache.layers)


def test_a_cache_of_inference_mode_goes_on_without_it():
    routed, more = routed_tiny(), IDS[:, :1]
    long = torch.randint(3, 259, (2, SHORT + 8), generator=torch.Generator().manual_seed(1))
    logits = []
    for first in (torch.inference_mode, torch.no_grad):
        with routed.at(executed=[3, 4]):
            with first():
                cache = routed.backbone.model(long, use_cache=True).cache
                cache = routed.backbone.model(more, cache=cache, use_cache=True).cache
            with torch.no_grad():
                logits.append([routed.backbone.model(more, cache=cache, use_cache=True).logits for _ in range(3)])
    torch.testing.assert_close(*logits)


def test_a_copied_cache_goes_on_by_itself():
    routed = routed_tiny()
    with routed.at(executed=[3, 4]):
        _, cache = decoded(routed, 10)
        twin = copy.deepcopy(cache)
        first, _ = decoded(routed, 20, cache, 10)
        second, _ = decoded(routed, 20, twin, 10)
    assert torch.equal(first, second)


def test_a_routed_cache_without_a_request_goes_on_at_full_depth():
    routed = routed_tiny()
    model = routed.backbone.model
    with routed.at(executed=[3]) as record:
        _, cache = decoded(routed, 10)
    logits = model(IDS[:, 10:11], cache=cache, use_cache=True).logits
    runs = torch.cat([*record.runs, torch.ones(2, 1, 6, dtype=torch.bool)], 1)
    torch.testing.assert_close(logits, routed(IDS[:, :11], runs=runs).logits[:, -1:], atol=1e-4, rtol=1e-4)


def test_a_long_cache_grows_in_place_and_equals_stock():
    stock, ours = DynamicCache(), GrowingLayer()
    ours.pending, ours.view = [], None
    generator = torch.Generator().manual_seed(0)
    pointers = set()
    for length in [SHORT - 2, 1, 1, *[1] * (3 * ROOM), 7]:
        new = torch.randn(2, 3, length, 8, generator=generator)
        expected = stock.update(new, -new, 0)
        got = ours.update(new, -new)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        pointers.add(got[0].data_ptr())
    assert len(pointers) <= 8


def test_pending_states_are_not_lost_to_the_stock_model():
    routed = routed_tiny(batch_plan="shared", reroute_every=None)
    with routed.at(executed=[3]):
        _, cache = decoded(routed, 5)
    routed.detach()
    with pytest.raises(RuntimeError, match="cache"):
        routed.backbone.model(IDS[:, 5:6], cache=cache, use_cache=True)


def test_the_stock_model_continues_a_routed_cache():
    routed = routed_tiny()
    model = routed.backbone.model
    with routed.at(executed=[6]):
        cache = model(IDS[:, :5], use_cache=True).cache
    with routed.stock():
        logits = model(IDS[:, 5:6], cache=cache, use_cache=True).logits
    torch.testing.assert_close(logits[:, 0], model(IDS[:, :6]).logits[:, 5])


def test_a_copied_model_asks_its_own_router():
    routed = routed_tiny()
    twin = copy.deepcopy(routed)
    twin.router.weight.neg_()
    executed = torch.tensor([3, 3])
    assert not torch.equal(twin(IDS, executed=executed).runs, routed(IDS, executed=executed).runs)


def test_a_cache_that_something_else_filled_is_refused():
    routed = routed_tiny()
    model = routed.backbone.model
    other = RoutedLM(tiny_backbone("llama", seed=1), routed.router)
    others = {
        "stock": model(IDS[:, :3], use_cache=True).cache,
        "static": StaticCache(config=model.config, max_cache_len=20),
        "depth": tiny_backbone("llama", num_hidden_layers=4).model(IDS[:, :3], use_cache=True).cache,
    }
    for name, filler in (("policy", routed_tiny(policy="hole")), ("model", other)):
        with filler.at(executed=[3]):
            others[name] = filler.backbone.model(IDS[:, :3], use_cache=True).cache
    for cache in others.values():
        with routed.at(executed=[3]), pytest.raises(BuddyError, match=r"(?i)cache"):
            model(IDS[:, 3:4], cache=cache, use_cache=True)


def test_rows_may_be_repeated_and_a_cache_is_not_emptied():
    routed = routed_tiny()
    model = routed.backbone.model
    with routed.at(executed=[3]):
        cache = model(IDS[:, :6], use_cache=True).cache
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        logits = model(IDS[[1, 0], 6:7], cache=cache, use_cache=True).logits
    expected = routed(IDS[[1, 0], :7], executed=torch.tensor([3, 3])).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(BuddyError, match="cache"):
        cache.reset()


def test_under_hole_memory_is_what_ran():
    routed = routed_tiny(policy="hole")
    with routed.at(executed=[3]) as record:
        cache = routed.backbone.model(IDS[:1], use_cache=True).cache
    stored = sum(layer.keys.shape[2] for layer in cache.layers if layer.slots is not None)
    assert stored == record.runs[0].sum()


@pytest.mark.parametrize("change", ["reorder", "crop"])
@torch.no_grad()
def test_a_long_cache_goes_on_after_its_rows_or_its_end_change(change):
    routed, ids = routed_tiny(), torch.randint(3, 259, (2, 300), generator=torch.Generator().manual_seed(0))
    model, expected = routed.backbone.model, routed(ids[:, :285], executed=torch.tensor([3, 4])).logits[:, -1:]
    with routed.at(executed=[3, 4]):
        cache = model(ids[:, :283], use_cache=True).cache
        cache = model(ids[:, 283:284], cache=cache, use_cache=True).cache
    rows = [1, 0] if change == "reorder" else [0, 1]
    with routed.at(executed=[(3, 4)[row] for row in rows]):
        if change == "reorder":
            cache.reorder_cache(torch.tensor(rows))
        else:
            model(ids[:, 5:7], cache=cache, use_cache=True)
            cache.crop(-2)
        logits = model(ids[rows, 284:285], cache=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected[rows], atol=1e-4, rtol=1e-4)

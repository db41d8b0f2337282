"""FSDP: layers that lie in parts on two devices are routed, measured, trained through and healed as whole ones are."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from buddy.backbone.sharding import check_sharding, finish_sharding, is_sharded, shard
from buddy.calibration.probe import CalibrationProbe
from buddy.console import quiet
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import TrainingError
from buddy.evaluation.evaluate import evaluate
from buddy.fit import Session
from buddy.losses import Objective
from buddy.metrics.perplexity import Reference
from buddy.training.estimators import StraightThrough, TrainingBatch, Weighted
from routers.buddy import BuddyRouter
from routers.first import FiRST
from routers.greedy import BridgedRemoval
from tests.adapted import new_adapter, stirred
from tests.scale.forked import side_by_side
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow
IDS = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(0))
PLANS = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()


def routed_on(family: str, router, shared_out: bool, dtype: torch.dtype = torch.float32, **options) -> RoutedLM:
    backbone = tiny_backbone(family)
    backbone.model.to(dtype)
    if shared_out:
        shard(backbone, "cpu")
        finish_sharding(backbone)
    torch.manual_seed(0)
    routed = RoutedLM(backbone, router(geometry_of(backbone)), **options)
    with torch.no_grad():
        for parameter in routed.router.parameters():
            parameter.normal_()
    return routed


def answers(family: str, policy: str, dtype: torch.dtype, shared_out: bool) -> dict:
    """What is asked of a model all along a fit, the same questions in every process."""
    routed = routed_on(family, BuddyRouter, shared_out, dtype, policy=policy)
    probe = CalibrationProbe(routed, IDS, 2)
    batch = TrainingBatch(IDS, torch.tensor([3, 4, 3, 5]), torch.arange(4, 23), prompt=5)
    found = {"dense": routed.dense(IDS), "routed": routed(IDS, executed=batch.executed, prompt=5).logits}
    found |= {"losses": probe.losses(PLANS), "kl": probe.losses(PLANS, "kl")}
    found |= {"influence": probe.block_influence, "taylor": probe.taylor, "contexts": probe.contexts().pooled}
    windows = Windows(IDS, torch.arange(4))
    scores = evaluate(routed, windows, [1.0, 0.5], prompt=8, batch_size=3)  # the second process has a batch too few
    found |= {f"loss at {each.budget}": torch.from_numpy(each.loss) for each in scores}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize(
    ("family", "policy", "dtype"),
    [("llama", "fill", torch.bfloat16), ("gemma3", "hole", torch.float32)],
)
def test_a_model_in_parts_answers_as_a_whole_one(family, policy, dtype):
    expected = answers(family, policy, dtype, False)
    for found in side_by_side(answers, family, policy, dtype, True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def removed(shared_out: bool) -> list:
    """What a search removes where the first process has memory for twice as many states as the second."""
    routed = routed_on("llama", BuddyRouter, shared_out)
    with pytest.MonkeyPatch.context() as patch:
        rank = dist.get_rank() if shared_out else 0
        patch.setattr("buddy.calibration.measures.MAX_CACHE", (8 - 4 * rank) * IDS[:1].numel() * 64 * 4)
        probe = CalibrationProbe(routed, IDS, 1, layer_counts=[3, 4, 5], seed=0)
        search = BridgedRemoval(probe, 4)
        for _ in range(3):
            search.remove_one()
    return [search.removed, search.losses]


def test_processes_with_unequal_memory_measure_the_same():
    expected = removed(False)
    for found in side_by_side(removed, True):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], rel=1e-4)


def dense_forwards() -> list[int]:
    """Forwards of the backbone in each of two evaluations of windows, whose last batch has fewer rows."""
    routed, forwards = routed_on("llama", BuddyRouter, True), [0]
    routed.backbone.base.register_forward_pre_hook(lambda *_: forwards.append(forwards.pop() + 1))
    windows, counts = Windows(IDS.repeat(4, 1)[:14], torch.arange(14)), []
    reference = Reference(int(1.6 * 4 * 16 * 64 * 4))  # room for one whole batch and the short one
    for _ in range(2):
        forwards[:] = [0]
        evaluate(routed, windows, [0.5], prompt=8, batch_size=4, reference=reference)
        counts.append(forwards[0])
    return counts


def test_processes_run_the_same_forwards_in_each_evaluation():
    first, second = side_by_side(dense_forwards)
    assert first == second


def held(shared_out: bool) -> list:
    """Bytes of the layers' and of the other weights here, and what the layers are once the router is detached."""
    routed = routed_on("llama", BuddyRouter, shared_out)
    model = routed.backbone.model
    sizes = {name: (x.to_local() if hasattr(x, "to_local") else x).nbytes for name, x in model.named_parameters()}
    inside = sum(size for name, size in sizes.items() if ".layers." in name)
    routed.detach()
    kinds = {type(layer).__name__ for layer in routed.backbone.layers}
    return [inside, sum(sizes.values()) - inside, isinstance(routed.backbone.layers[1], FSDPModule), kinds]


def test_each_process_holds_its_part_of_the_layers_and_the_rest_whole():
    inside, outside, parted, kinds = held(False)
    assert (parted, kinds) == (False, {"LlamaDecoderLayer"})
    assert side_by_side(held, True) == [[inside // 2, outside, True, {"FSDPLlamaDecoderLayer"}]] * 2


def gradients(kind: str, shared_out: bool) -> dict:
    """Of the router, or of the adapter where it is healed, for other windows in each process."""
    router = FiRST if kind == "weighted" else BuddyRouter
    routed = routed_on("llama", router, shared_out)
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared_out else (0, 1)
    share = slice(rank, None, world)
    executed = torch.tensor([3, 4, 3, 5])
    batch = TrainingBatch(IDS[share], executed[share], torch.arange(4, 23), 5, executed, rank)
    if kind == "healed":
        adapter = new_adapter(routed.backbone)
        stirred(adapter)
        routed.adapter = adapter
        with quiet():
            logits = routed(batch.input_ids, executed=batch.executed, prompt=5).logits
        (logits.float().square().mean() + 0.0 * sum(x.sum() for x in adapter.parameters())).backward()
        trained = adapter.parts
    else:
        objective = Objective()
        estimator = Weighted(objective) if kind == "weighted" else StraightThrough(objective)
        estimator(routed, batch, torch.Generator().manual_seed(1)).loss.backward()
        trained = routed.router
    return {name: x.grad for name, x in trained.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("kind", ["straight-through", "weighted", "healed"])
def test_the_mean_gradient_over_the_processes_is_that_of_the_whole_batch(kind):
    expected, shares = gradients(kind, False), side_by_side(gradients, kind, True)
    assert expected
    assert any(value.abs().max() > 1e-4 for value in expected.values())
    for name, value in expected.items():
        mean = torch.stack([share[name] for share in shares]).mean(0)
        torch.testing.assert_close(mean, value, atol=1e-6, rtol=1e-4)


def test_what_cannot_be_shared_out_is_refused(small, tmp_path):
    two = ("trainer.devices=2", "trainer.strategy=fsdp")
    assert is_sharded(small(tmp_path, *two).trainer)
    assert not is_sharded(small(tmp_path, "trainer.strategy=fsdp").trainer)
    assert not is_sharded(small(tmp_path, "trainer.devices=2").trainer)
    check_sharding(small(tmp_path, "predictor.name=regress"))
    with pytest.raises(TrainingError, match="predictor"):
        check_sharding(small(tmp_path, *two, "predictor.name=regress"))
    with pytest.raises(TrainingError, match="joint"):
        check_sharding(small(tmp_path, *two, "adapter.joint=true"))
    with pytest.raises(TrainingError, match="joint"):  # of any rival
        Session.prepare([small(tmp_path, *two, "adapter.joint=true"), small(tmp_path, *two)])

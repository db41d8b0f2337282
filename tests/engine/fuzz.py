"""Random uses of the engine against brute force: `python -m tests.engine.fuzz --cases 2000`.

A case draws a family, a policy, a batch with or without padding, budgets, ways of planning, bridges or none, and a
course of forwards: chunked prefill, decode, crops and reorders. Every logit must agree with full recomputation.
"""

import argparse
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from buddy.engine.model import RoutedLM, geometry_of
from tests.engine.reference import Fickle, FickleGates, random_bridges, reference_logits
from tests.tiny import FAMILIES, tiny_backbone

SLIDING = ("qwen2", "mistral-sliding", "gemma2", "gemma3")
TOLERANCE = 1e-4


@dataclass
class Case:
    """What a seed stands for."""

    seed: int
    family: str
    options: dict
    batch: int
    padding: list[int]
    router: type[Fickle] | type[FickleGates]
    scope: str
    course: list[tuple[str, int]]
    bridges: bool = False


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    family, batch = rng.choice(list(FAMILIES)), rng.choice([1, 1, 2, 3, 4])
    options = {
        "policy": rng.choice(["fill", "fill", "hole", "zero"]),
        "sink_tokens": rng.choice([0, 1, 1, 2]),
        "prompt_plan": rng.choice(["token", "token", "shared"]),
        "batch_plan": rng.choice(["row", "row", "shared"]),
        "reroute_every": rng.choice([1, 1, 2, 3, None]),
        "context_layer": rng.choice([1, 1, 2, 3]),
        "pool": rng.choice(["value", "key", "both"]),
        "mean_over": rng.choice([1, 1, 4]),
    }
    padded = batch > 1 and rng.random() < 0.5
    first = rng.choice([1, 5, 12, 150])
    padding = [rng.randint(0, min(3, first - 1)) if padded else 0 for _ in range(batch)]
    router, scope = rng.choice([Fickle, FickleGates]), rng.choice(["token", "token", "prompt"])
    case = Case(seed, family, options, batch, padding, router, scope, [("forward", first)])
    decides = options["reroute_every"] == options["mean_over"] == 1 and scope == "token"
    croppable = family not in SLIDING and decides
    for _ in range(rng.randint(2, 7)):
        kinds = ["forward"] * 6 + ["reorder"] + ["crop"] * croppable
        kind = rng.choice(kinds)
        case.course.append((kind, rng.choice([1, 1, 1, 1, 4]) if kind == "forward" else rng.randint(1, 3)))
    case.bridges = rng.random() < 0.5
    return case


@torch.no_grad()
def worst(case: Case) -> float:
    """The largest difference between a logit of the engine and of brute force."""
    backbone = tiny_backbone(case.family)
    options = dict(case.options)
    geometry = geometry_of(backbone, options.pop("context_layer"), options["pool"])
    router = case.router(geometry, case.seed)
    router.scope = case.scope
    routed = RoutedLM(backbone, router, **options)
    routed.bridge(random_bridges(geometry, case.seed) if case.bridges else None)
    stock = tiny_backbone(case.family).model
    generator = torch.Generator().manual_seed(case.seed)
    ids, logits, runs = torch.zeros(case.batch, 0, dtype=torch.long), [], []
    cache, difference = None, 0.0
    for kind, amount in case.course:
        if kind == "forward":
            new = torch.randint(3, 259, (case.batch, amount), generator=generator)
            ids = torch.cat([ids, new], 1)
            executed = torch.randint(geometry.always_on, 7, (case.batch,), generator=generator).tolist()
            output, plan = _forward(routed, ids, amount, case.padding, cache, executed)
            cache = output.cache
            logits.append(output.logits)
            runs.append(plan)
            continue
        difference = max(difference, _compare(stock, case, ids, logits, runs, routed.bridges))
        whole, plan = torch.cat(logits, 1), torch.cat(runs, 1)
        if kind == "crop":
            amount = min(amount, ids.shape[1] - 1 - max(case.padding))
            cache.crop(-amount)
            ids, whole, plan = (x[:, : x.shape[1] - amount] for x in (ids, whole, plan))
        else:
            rows = torch.randint(case.batch, (case.batch,), generator=generator)
            cache.reorder_cache(rows)
            ids, whole, plan = ids[rows], whole[rows], plan[rows]
            case.padding = [case.padding[row] for row in rows]
        logits, runs = [whole], [plan]
    return max(difference, _compare(stock, case, ids, logits, runs, routed.bridges))


def _mask(length: int, padding: list[int]) -> Tensor | None:
    if not any(padding):
        return None
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()


def _forward(routed, ids, amount, padding, cache, executed):
    mask = _mask(ids.shape[1], padding)
    inputs = {"input_ids": ids[:, -amount:], "attention_mask": mask, "cache": cache, "use_cache": True}
    if mask is not None:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -amount:]
    with routed.at(executed=executed) as record:
        output = routed.backbone.model(**inputs)
    real = torch.ones_like(ids[:, -amount:]) if mask is None else mask[:, -amount:]
    real = real.bool()
    wanted = torch.tensor(executed)[:, None].expand(-1, amount)
    counted = torch.where(record.sinks[0], wanted, record.executed[0])
    asked = torch.ones_like(wanted, dtype=torch.bool)
    if routed.mean_over > 1:  # K is a mean, but full depth is not
        asked = wanted == routed.geometry.layers
    assert torch.equal(counted[asked & real], wanted[asked & real]), "layers ran that were not asked for"
    return output, record.runs[0]


def _compare(stock, case: Case, ids, logits, runs, bridges) -> float:
    mask = _mask(ids.shape[1], case.padding)
    expected = reference_logits(stock, ids, torch.cat(runs, 1), mask, case.options["policy"], bridges)
    difference = (torch.cat(logits, 1) - expected).abs()
    if mask is not None:
        difference = difference[mask.bool()]
    return float("inf") if difference.isnan().any() else difference.max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    largest, failed = 0.0, []
    for seed in range(asked.first, asked.first + asked.cases):
        case = draw(seed)
        try:
            found = worst(case)
        except Exception as error:
            found = float("inf")
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        largest = max(largest, found if found < float("inf") else 0.0)
        if not found <= TOLERANCE:
            failed.append(seed)
            print(f"seed {seed}: {found:.1e} {draw(seed)}", flush=True)
    print(f"{asked.cases} cases, {len(failed)} failed, largest difference of the others {largest:.1e}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

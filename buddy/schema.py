"""What a recipe may say: sections, defaults and bounds. Each bound stands beside the field that it holds for."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args

from buddy.errors import nearest


def _bounded(default: float | None, **bounds: float) -> Any:
    """A number within `least` (inclusive), `above` (exclusive) and `most` (inclusive)."""
    return field(default=default, metadata=bounds)


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"accepted": (default, *others)})


@dataclass(frozen=True)
class BackboneSection:
    name: str = "smollm2-135m"  # embedded, a folder in the hub's layout, or a hub name
    dtype: str = _choice("bfloat16", "float32", "float16")
    revision: str | None = None  # branch, tag or commit on the hub
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSection:
    source: str = "sotu"  # embedded, a text / json / parquet file or folder, or a hub name
    text_field: str = "text"
    train_sources: list[str] = field(default_factory=list)  # more texts to train on, in turn with the source
    calibration_sources: list[str] = field(default_factory=list)  # more to calibrate on, in turn with it
    window: int = _bounded(256, least=2)  # tokens
    prompt: int = _bounded(64, least=1)  # tokens of each window that are read, not scored
    batch_size: int = _bounded(4, least=1)  # windows a step
    calibration_windows: int = _bounded(64, least=1)
    validation_windows: int = _bounded(16, least=1)
    test_windows: int = _bounded(64, least=1)
    seed: int | None = _bounded(None, least=0, most=2**32 - 1)  # of split and windows; null for the recipe's


@dataclass(frozen=True)
class RoutingSection:
    context_layer: int = _bounded(1, least=1)  # layers that run before the plan is made
    pool: str = _choice("value", "key", "both")
    sink_tokens: int = _bounded(1, least=0)  # first positions that run at full depth
    prompt_plan: str = _choice("token", "shared")
    batch_plan: str = _choice("row", "shared")
    reroute_every: int | None = _bounded(1, least=1)  # tokens between decisions while decoding; null decides never
    policy: str = _choice("fill", "hole", "zero")  # what a layer's cache holds for tokens that skipped it


@dataclass(frozen=True)
class RouterSection:
    name: str = "buddy"  # an installed name or my_module:MyRouter
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the router's class


@dataclass(frozen=True)
class ObjectiveSection:
    kl: float = _bounded(1.0, least=0)  # weight of the KL divergence to the dense model
    ce: float = _bounded(0.0, least=0)  # weight of the cross-entropy
    estimator: str = _choice("perturbed", "straight-through")
    plans: int = _bounded(4, least=2)  # perturbed plans a step, in antithetic pairs
    sigma: float = _bounded(0.15, above=0)  # spread of the perturbation, in units of the scores
    shared: float = _bounded(0.75, least=0, most=1)  # share of its variance that all tokens of a window have in common


@dataclass(frozen=True)
class OptimizerSection:
    lr: float = _bounded(6.0e-3, above=0)
    lr_by_router: dict[str, float] = field(default_factory=dict)  # in place of lr, for the routers named
    warmup_steps: int = _bounded(20, least=0)
    weight_decay: float = _bounded(0.0, least=0)
    clip: float = _bounded(10.0, least=0)  # largest gradient norm; 0 never clips


@dataclass(frozen=True)
class AdapterSection:
    kind: str = _choice("lora")
    rank: int = _bounded(8, least=1)
    alpha: float = _bounded(16.0, above=0)  # what the adapter adds is multiplied by alpha / rank
    dropout: float = _bounded(0.0, least=0, most=0.9)
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # linear modules of a layer, or all of them
    steps: int = _bounded(200, least=1)
    lr: float = _bounded(1.0e-3, above=0)
    rates: list[float] = field(default_factory=list)  # in place of lr: each is tried, the best on validation is kept
    joint: bool = False  # train the router in the same steps, instead of before


@dataclass(frozen=True)
class PredictorSection:
    name: str | None = field(default=None, metadata={"accepted": ("regress", "grpo")})  # null for none
    windows: int = _bounded(128, least=2)  # training windows whose losses are measured at every budget
    cap: float = _bounded(1.0, above=0, most=1)  # the largest budget that it may choose
    epsilon: float = _bounded(0.05, least=0)  # of regress: nats a token that may be lost against full depth
    hidden: int = _bounded(32, least=1)  # of grpo, as all that follows: width of the network
    steps: int = _bounded(10_000, least=1)
    lr: float = _bounded(1.0e-5, above=0)
    samples: int = _bounded(4, least=2)  # budgets drawn for each request and step
    quality: float = _bounded(5.0, least=0)  # weight of the cross-entropy in the reward
    cost: float = _bounded(0.05, least=0)  # weight of the share of layers in the reward
    entropy: float = _bounded(0.01, least=0)  # weight of the policy's entropy in the loss
    kl: float = _bounded(0.0, least=0)  # weight of its KL divergence to the policy at the start


@dataclass(frozen=True)
class TrainerSection:
    max_steps: int = _bounded(200, least=1)
    accelerator: str = _choice("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    devices: int = _bounded(1, least=1)  # on each node
    nodes: int = _bounded(1, least=1)
    strategy: str = "auto"
    checkpoint_every: int = _bounded(50, least=1)  # steps
    log_every: int = _bounded(10, least=1)  # steps
    ckpt_path: str | None = None  # a checkpoint to go on from


@dataclass(frozen=True)
class Recipe:
    """One run, wholly described."""

    backbone: BackboneSection = field(default_factory=BackboneSection)
    data: DataSection = field(default_factory=DataSection)
    budgets: list[float] = field(default_factory=lambda: [1.0, 0.875, 0.75, 0.625, 0.5])
    routing: RoutingSection = field(default_factory=RoutingSection)
    router: RouterSection = field(default_factory=RouterSection)
    rivals: list[str] = field(default_factory=list)  # routers fitted and evaluated under the same recipe
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    adapter: AdapterSection | None = None  # healing; null for none
    predictor: PredictorSection = field(default_factory=PredictorSection)  # of budgets, for --budget auto
    trainer: TrainerSection = field(default_factory=TrainerSection)
    seed: int = _bounded(0, least=0, most=2**32 - 1)
    output: str = "runs"  # folder of all run folders

    @property
    def data_seed(self) -> int:
        """The seed of split and windows: `data.seed` where it is given."""
        return self.seed if self.data.seed is None else self.data.seed


def section_of(hint: Any) -> type | None:
    """The section that a field holds, whether it is always there or may be left out as null; None for a plain value."""
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)


def leaves(section: object, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted key, value, bounds) of every field of a recipe, in the order of the schema."""
    for item in fields(section):  # type: ignore[arg-type]
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, item.metadata


def storable(value: Any) -> bool:
    """Whether every text in a value can be a file's name and be saved: no zero sign, no half of a surrogate pair."""
    if isinstance(value, str):
        return not any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in value)
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return not isinstance(value, list) or all(map(storable, value))


def impossible_values(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    """(the keys concerned, one sentence) for every value that has the right type and still cannot be."""
    for key, value, bounds in leaves(recipe):
        sentence = _out_of_bounds(key, value, bounds)
        if sentence:
            yield {key}, sentence
    yield from _list_mistakes(recipe)
    yield from _contradictions(recipe)


def _out_of_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> str | None:
    accepted = bounds.get("accepted")
    if accepted and value is not None and value not in accepted:
        return f"{key} cannot be {value!r} (accepted: {', '.join(accepted)}){nearest(value, accepted) or '.'}"
    if isinstance(value, str) and not value.strip():
        return f"{key} is empty; give it a value or leave the key out."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} is {value}, but must be a finite number."
    if value is None:
        return None
    if "least" in bounds and value < bounds["least"]:
        return f"{key} is {value}, but must be at least {bounds['least']}."
    if "above" in bounds and value <= bounds["above"]:
        return f"{key} is {value}, but must be above {bounds['above']}."
    if "most" in bounds and value > bounds["most"]:
        return f"{key} is {value}, but must be at most {bounds['most']}."
    return None


def _list_mistakes(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    if not recipe.budgets:
        yield {"budgets"}, "budgets is empty; list at least one, such as budgets=[1.0,0.5]."
    for budget in dict.fromkeys(recipe.budgets):
        if not 0 < budget <= 1:
            yield {"budgets"}, f"budgets holds {budget}, but each must be above 0 and at most 1."
    named: dict[str, list[Any]] = {"budgets": recipe.budgets, "rivals": recipe.rivals}
    named |= {} if recipe.adapter is None else {"adapter.rates": recipe.adapter.rates}
    texts = {name: getattr(recipe.data, name) for name in ("train_sources", "calibration_sources")}
    named |= {f"data.{name}": sources for name, sources in texts.items()}
    for key, values in named.items():
        for value in dict.fromkeys(value for value in values if values.count(value) > 1):
            yield {key}, f"{key} holds {value} more than once; name it once."
    if recipe.adapter is not None and not recipe.adapter.targets:
        yield {"adapter.targets"}, "adapter.targets is empty; list modules such as [q_proj, v_proj], or [all-linear]."
    for rate in recipe.adapter.rates if recipe.adapter is not None else ():
        if not 0 < rate < math.inf:
            yield {"adapter.rates"}, f"adapter.rates holds {rate}, but each must be a number above 0."
    for name, rate in recipe.optimizer.lr_by_router.items():
        if not 0 < rate < math.inf:
            yield {"optimizer.lr_by_router"}, f"optimizer.lr_by_router.{name} is {rate}, but must be a number above 0."
    for name, sources in texts.items():
        if any(not source.strip() for source in sources):
            yield {f"data.{name}"}, f"data.{name} holds an empty name; name a text or leave it out."
    if any(not rival.strip() for rival in recipe.rivals):
        yield {"rivals"}, "rivals holds an empty name; name a router or leave it out."


def _contradictions(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    data, routing, objective = recipe.data, recipe.routing, recipe.objective
    for key, tokens in (("data.prompt", data.prompt), ("routing.sink_tokens", routing.sink_tokens)):
        if tokens >= data.window:
            yield (
                {key, "data.window"},
                f"{key} is {tokens}, but must be below data.window, which is {data.window}.",
            )
    if objective.kl == objective.ce == 0:
        yield (
            {"objective.kl", "objective.ce"},
            "objective.kl and objective.ce are both 0, which leaves nothing to learn from; set one above 0.",
        )
    if recipe.adapter is not None and recipe.adapter.joint and recipe.adapter.rates:
        yield (
            {"adapter.joint", "adapter.rates"},
            "adapter.rates are tried with one and the same router; leave them out, or set adapter.joint=false.",
        )
    if objective.estimator == "straight-through" and routing.policy != "fill":
        yield (
            {"objective.estimator", "routing.policy"},
            f"objective.estimator is straight-through, which needs routing.policy=fill, not {routing.policy}.",
        )
    if objective.plans % 2:
        yield (
            {"objective.plans"},
            f"objective.plans is {objective.plans}, but must be even: plans are drawn in pairs.",
        )
    yield from _predictor_mistakes(recipe)


def _predictor_mistakes(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    predictor = recipe.predictor
    if predictor.name is None:
        return
    if recipe.budgets and 0 < predictor.cap < min(recipe.budgets):
        yield (
            {"predictor.cap", "budgets"},
            f"predictor.cap is {predictor.cap}, below the smallest budget, which is {min(recipe.budgets)}; raise it.",
        )
    if predictor.name == "grpo" and predictor.quality == predictor.cost == 0:
        yield (
            {"predictor.quality", "predictor.cost"},
            "predictor.quality and predictor.cost are both 0, which rewards nothing; set one above 0.",
        )

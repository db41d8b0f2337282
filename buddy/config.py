"""Recipes: what they may say, how they are found, overridden, checked and saved."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

from buddy.errors import RecipeError, nearest


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


NOT_PLAIN = "holds ${…}, but a recipe takes plain values only; write the value itself."
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError)
DIGITS = 1000  # of a whole number
MOST = 10_000  # values in a file or an override, those that an alias repeats counted as often as they stand there
_MISFITS = (OmegaConfBaseException, TypeError, ValueError, OverflowError)
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    str | None: "text or null",
    int | None: "a whole number or null",
    list[float]: "a list of numbers",
    list[str]: "a list of names",
    dict[str, Any]: "a mapping such as {hidden: 64}",
    dict[str, float]: "a mapping of routers to numbers",
}
_SUCH_AS = {  # for lists and mappings of one kind
    "budgets": "[1.0, 0.5]",
    "rivals": "[uniform, random]",
    "adapter.rates": "[1.0e-2, 3.0e-3]",
    "optimizer.lr_by_router": "{buddy: 0.003}",
    "adapter.targets": "[q_proj, v_proj]",
    "data.train_sources": "[more.jsonl, notes.txt]",
    "data.calibration_sources": "[more.jsonl, notes.txt]",
}


class Draft:
    """Holds a recipe's configuration so far and what is wrong with it."""

    def __init__(self) -> None:
        self.config: DictConfig = OmegaConf.structured(Recipe)
        self.mistakes: list[str] = []
        self.wrong: set[str] = set()

    def merge(self, part: Mapping[Any, Any]) -> None:
        """Lay a nested mapping over the draft; what does not fit is noted and left out."""
        self._merge(_spelt_out(part), Recipe, self.config, "")

    def override(self, overrides: Sequence[str]) -> None:
        """Lay `key=value` texts over the draft, each after the one before it."""
        parts = list(self._parts(overrides))
        names = [name for part in parts if (name := _router_name(part)) is not None]
        before = None if OmegaConf.is_missing(self.config.router, "name") else self.config.router.name
        if names and names[-1] != before:
            with read_write(self.config.router):
                self.config.router.options = {}
        if any("lr" in _section(part, "optimizer") for part in parts):  # a rate that is asked for is for all
            with read_write(self.config.optimizer):
                self.config.optimizer.lr_by_router = {}
        for part in parts:
            self.merge(part)

    def finish(self, what: str) -> Recipe:
        """The finished recipe, or all mistakes of `what` in one RecipeError."""
        try:
            recipe: Recipe = OmegaConf.to_object(self.config)
        except MissingMandatoryValue as error:
            self.mistakes.append(f"{error.full_key} holds ???; write its value.")
        else:
            self.mistakes += [text for keys, text in impossible_values(recipe) if not keys & self.wrong]
        if len(self.mistakes) > 1:
            lines = "".join(f"\n  - {mistake}" for mistake in self.mistakes)
            raise RecipeError(f"{what} has {len(self.mistakes)} mistakes:{lines}")
        if self.mistakes:
            raise RecipeError(f"{what} has a mistake: {self.mistakes[0]}")
        return recipe

    def _merge(self, part: Mapping[Any, Any], schema: type, node: DictConfig, prefix: str) -> None:
        hints = {item.name: item.type for item in fields(schema)}
        for key, value in part.items():
            name, hint = f"{prefix}{key}", hints.get(key)
            section = section_of(hint)
            if hint is None:
                self.mistakes.append(_unknown_key(name, key, list(hints)))
            elif section is None or (value is None and hint is not section):
                self._set(node, key, name, value, hint)
            elif isinstance(value, Mapping):
                if node[key] is None:  # one that may be left out begins with its defaults
                    self._set_section(node, key, section)
                self._merge(value, section, node[key], f"{name}.")
            else:
                inner = ", ".join(item.name for item in fields(section))
                self._note(name, f"{name} is a section with the keys {inner}, not {shown(value)}.")

    @staticmethod
    def _set_section(node: DictConfig, key: str, section: type) -> None:
        with read_write(node):
            node[key] = OmegaConf.structured(section)

    def _set(self, node: DictConfig, key: str, name: str, value: Any, hint: Any) -> None:
        if "${" in str(value):
            return self._note(name, f"{name} {NOT_PLAIN}")
        if not storable(value):
            return self._note(name, f"{name} is {shown(value)}, which holds a sign that no file can; write it without.")
        if hint is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # YAML reads 1e3 as a float
        try:
            _refuse_objects(value)
            _refuse_lost_spelling(value, hint)
            with read_write(node):
                OmegaConf.update(node, key, value, merge=True)
        except _MISFITS:
            lost = hint in (str, str | None) and isinstance(value, bool | int | float)
            advice = "; put it in quotes" if lost else ""
            example = f" such as {_SUCH_AS[name]}" if name in _SUCH_AS else ""
            self._note(name, f"{name} must be {_WORDS[hint]}{example}, not {shown(value)}{advice}.")

    def _parts(self, overrides: Sequence[str]) -> Iterator[Mapping[Any, Any]]:
        for text in overrides:
            try:
                yield _parse(text)
            except RecipeError as error:
                self.mistakes.append(str(error))

    def _note(self, key: str, sentence: str) -> None:
        self.wrong.add(key)
        self.mistakes.append(sentence)


def shown(value: Any) -> str:
    """A value as a recipe spells it, on one line and not too long."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    except yaml.YAMLError:  # of a kind that no recipe can hold
        text = str(value)
    text = " ".join(text.removesuffix("\n...\n").split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def yaml_reason(error: Exception) -> str:
    """What YAML or OmegaConf found wrong, on one line, with the line where it is known."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    return f"line {mark.line + 1}: {reason}" if mark else reason


def refuse_repeats(root: yaml.Node | None) -> None:
    """Raises ValueError where aliases (`&a`, `*a`) make a small text stand for very many values or endless ones."""
    if root is not None and _size(root, {}) > MOST:
        raise ValueError(f"its aliases stand for more than {MOST} values")


def plain(value: Any) -> Any:
    """A value as OmegaConf read it, in lists and mappings; ValueError for a number too long to be shown to anybody."""
    value = OmegaConf.to_container(value)
    if _longest(value) > DIGITS:
        raise ValueError(f"a number has more than {DIGITS} digits")
    return value


def _parse(text: str) -> Mapping[Any, Any]:
    """{"a": {"b": value}} of "a.b=value"; values are read as YAML."""
    key, equals, value = text.partition("=")
    if "[" in key:
        raise RecipeError(f"{text!r} reaches into a list; give the whole list, as in budgets=[1.0,0.5].")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise RecipeError(f"{text!r} is not an override; write key=value without blanks, as in trainer.max_steps=50.")
    if not equals:
        raise RecipeError(f"{text!r} has no value; write {text}=VALUE.")
    if "${" in value:
        raise RecipeError(f"{key} {NOT_PLAIN}")
    try:
        refuse_repeats(yaml.compose(value, yaml.SafeLoader))
        parsed: Mapping[Any, Any] = plain(OmegaConf.from_dotlist([text]))
        return parsed
    except UNREADABLE as error:
        reason = yaml_reason(error)
        raise RecipeError(f"The value of {key} cannot be read ({reason}); check its quotes and brackets.") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for, with all aliases written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands in what it refers to")
        return known[id(node)]
    known[id(node)] = 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _longest(value: Any) -> float:
    """Digits of the longest whole number in a value."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return max(map(_longest, value), default=0)
    return value.bit_length() * math.log10(2) if isinstance(value, int) else 0


def _refuse_objects(value: Any) -> None:
    """Tags such as `!!binary` make values that are neither text nor numbers."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            _refuse_objects(item)
    elif not isinstance(value, bool | int | float | str | None):
        raise TypeError


def _refuse_lost_spelling(value: Any, hint: Any) -> None:
    """OmegaConf turns any scalar into text, but YAML has already read `1e5` as a number and `on` as true."""
    if hint == list[str] and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise TypeError
    if hint == list[float] and isinstance(value, list) and any(isinstance(item, list | Mapping) for item in value):
        raise TypeError  # which OmegaConf lets pass
    if hint in (str, str | None) and value is not None and not isinstance(value, str):
        raise TypeError


def _spelt_out(part: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The long form of what may be said in one word: a router by its name alone, one target of an adapter."""
    if isinstance(part.get("router"), str):
        part = {**part, "router": {"name": part["router"]}}
    adapter = part.get("adapter")
    if isinstance(adapter, Mapping) and isinstance(adapter.get("targets"), str):
        part = {**part, "adapter": {**adapter, "targets": [adapter["targets"]]}}
    return part


def _router_name(part: Mapping[Any, Any]) -> Any:
    router = part.get("router")
    return router.get("name") if isinstance(router, Mapping) else router


def _section(part: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    section = part.get(name)
    return section if isinstance(section, Mapping) else {}


def _unknown_key(name: str, key: Any, accepted: list[str]) -> str:
    paths = [path for path, *_ in leaves(Recipe(adapter=AdapterSection()))]
    elsewhere = " or ".join(repr(path) for path in paths if path.endswith(f".{key}"))
    if elsewhere:
        return f"The key '{name}' is unknown; did you mean {elsewhere}?"
    hint = nearest(str(key), accepted) or nearest(name, paths)
    name = shorten(name, 60, placeholder="…")
    return f"The key '{name}' is unknown{hint or '; accepted here are ' + ', '.join(accepted) + '.'}"


FOLDER = Path(__file__).parent / "recipes"
LARGEST = 2**20  # bytes of a file that may be a recipe


@dataclass(frozen=True)
class Listed:
    """An installed recipe: its name, the first line of its comment, its file."""

    name: str
    summary: str
    path: Path


def list_recipes() -> list[Listed]:
    """The recipes that come with Buddy, by name."""
    return [Listed(path.stem, _first_comment(path), path) for path in sorted(FOLDER.glob("*.yaml"))]


def recipe_path(source: str | Path) -> Path:
    """The file of an installed recipe's name or of a path.

    Raises:
        RecipeError: neither exists.
    """
    text, installed = str(source), {recipe.name: recipe.path for recipe in list_recipes()}
    if text in installed:
        return installed[text]
    if os.path.isfile(text):
        return Path(text)
    if os.path.isdir(text):
        raise RecipeError(f"{text} is a folder; give the recipe's file in it.")
    hint = nearest(recipe_name(source), installed)
    known = f"installed are {', '.join(installed)}, or give the path of a YAML file"
    kind = "file" if re.search(r"\.ya?ml$", text) or os.sep in text else "named"
    raise RecipeError(f"There is no recipe {kind} {text!r} ({known}){hint or '.'}")


def copy_recipe(source: str | Path, destination: Path) -> Path:
    """Copy a recipe to a file, or under its own name into a folder; the path written.

    Raises:
        RecipeError: no such recipe, the file exists, or it cannot be written.
    """
    path = recipe_path(source)
    target = destination / path.name if os.path.isdir(destination) else destination
    text = path.read_text("utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                target.unlink(missing_ok=True)  # half of it would bar the way of a second try
                raise
    except FileExistsError as error:
        raise RecipeError(f"{target} exists and is not overwritten; name another file.") from error
    except OSError as error:
        raise RecipeError(f"{target} cannot be written ({error.strerror}); name another place.") from error
    return target


def recipe_name(source: str | Path) -> str:
    """The name under which runs of a recipe are kept: its file's name without .yaml."""
    return re.sub(r"\.ya?ml$", "", os.path.basename(str(source)))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a name or file with `key=value` overrides laid over it.

    `router=NAME` stands for `router.name=NAME`. A router other than the file's starts from empty options, since
    options belong to one router. An override of `optimizer.lr` is for all routers: those rates of the file that are
    for one alone go.

    Raises:
        RecipeError: no such recipe, not YAML, or mistakes in it; all mistakes are named, one a line.
    """
    path = recipe_path(source)
    return _finished(lambda: _read(path), overrides, f"The recipe {source}")


def override(recipe: Recipe, overrides: Sequence[str], what: str) -> Recipe:
    """A recipe with `key=value` overrides laid over it, as `load_recipe` lays them over a file.

    Args:
        what: named at the beginning of the error's sentence.

    Raises:
        RecipeError: mistakes in them; all are named, one a line.
    """
    return _finished(lambda: asdict(recipe), overrides, what)


def to_yaml(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back to an equal recipe."""
    text: str = OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))
    return text


def flatten(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Dotted keys to scalars, for TensorBoard's table of hyperparameters; all else as a recipe spells it."""
    values = {key: value for key, value, _ in leaves(recipe)}
    options = {f"router.options.{name}": option for name, option in values.pop("router.options").items()}
    scalars = (bool, int, float, str)
    return {key: value if isinstance(value, scalars) else shown(value) for key, value in {**values, **options}.items()}


def with_router(recipe: Recipe, name: str) -> Recipe:
    """The recipe for one router, at that router's learning rate; another than its own has its default options."""
    router = recipe.router if name == recipe.router.name else RouterSection(name)
    lr = recipe.optimizer.lr_by_router.get(name, recipe.optimizer.lr)
    return replace(recipe, router=router, optimizer=replace(recipe.optimizer, lr=lr, lr_by_router={}))


def _finished(read: Callable[[], Mapping[Any, Any]], overrides: Sequence[str], what: str) -> Recipe:
    try:
        draft = Draft()
        draft.merge(read())
        draft.override(overrides)
        return draft.finish(what)
    except RecursionError as error:
        raise RecipeError(f"{what} is nested too deeply; write it with fewer brackets.") from error


def _read(path: Path) -> Mapping[Any, Any]:
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
        refuse_repeats(root)
        values: Mapping[Any, Any] = plain(OmegaConf.create(text))
        return values
    except GrammarParseError as error:
        raise RecipeError(f"The recipe {path} {NOT_PLAIN}") from error
    except UNREADABLE as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {yaml_reason(error)}; mend it there.") from error


def _first_comment(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")

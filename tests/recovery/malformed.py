"""Malformed recipes and files, drawn by hypothesis: whatever they are, Buddy ends well or with one sentence."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from buddy.backbone.load import load_backbone
from buddy.config import flatten, load_recipe
from buddy.errors import BackboneError, BuddyError
from buddy.router import Geometry
from buddy.run import RunFolder
from buddy.schema import Recipe
from tests.recovery.asking import ask
from tests.small import Small

GEOMETRY = Geometry(layers=6, context_layer=1, hidden=16, features=8)
PLANTED = "planted"  # a file that the tags below would make, if anything ran them
SPECIAL = [
    "${oc.env:HOME}",
    "${oc.decode:'!!python/object'}",
    "../x",
    "/no/such/folder",
    "~nobody-at-all/x",
    "a\0b",
    "\ud800",
    "x" * 300,
    "a\nb",
    "日本/語",
    "module:",
    "os:system",
    "owner/name:config",
    "1e400",
    "nan",
]
NUMBERS = st.integers(-3, 9) | st.sampled_from([2**31, 2**53, 2**63, 10**30, -(10**30), 10**400])
FLOATS = st.floats() | st.sampled_from([1e308, 5e-324, -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | FLOATS | st.sampled_from(SPECIAL) | st.text(max_size=8)
WILD = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
BOMB = "router: {name: buddy, options: {a: &a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", {name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
RAW = [
    BOMB + "}}",
    "a: &a [*a]",
    "router: &r {name: buddy, options: {<<: *r}}",
    "a: &a {x: 1}\nb: &b {<<: [*a, *a, *a, *a]}\ndata: {<<: [*b, *b, *b]}",
    f"seed: !!python/object/apply:os.system ['touch {PLANTED}']",
    f"router: {{name: buddy, options: {{a: !!python/object/apply:builtins.open ['{PLANTED}', w]}}}}",
    "seed: !!python/name:os.system",
    "output: !!python/object/apply:pathlib.Path [x]",
    "rivals: !!python/tuple [full, uniform]",
    "router: {name: buddy, options: {a: !!binary aGk=, b: !!set {c}, d: !!omap [e: 1], f: !!timestamp 2001-01-01}}",
    "seed: !!int abc",
    "seed: !unknown 3",
    "seed: 1\nseed: 2",
    "data:\n\twindow: 4",
    "a: " + "[" * 2000 + "]" * 2000,
    "%YAML 9.9\n---\nseed: 1",
    "seed: 1\n---\nseed: 2",
    "? [a]\n: b",
    "\ufeffseed: 1",
    "seed: \x00",
    'output: "\\ud800"',
    'output: "a\\0b"',
    "seed: 0x" + "f" * 4000,
    "data: *nothing",
    "router: ???\nrivals: [???]\nbudgets: [???]",
    "budgets: {0: 1}",
    "data: {source: '${oc.env:HOME}'}",
    "router: {name: uniform, options: {'${x}': '\\${y}'}}",
]


@dataclass(frozen=True)
class Bench:
    """What is made malformed: a folder to work in, a recipe of seconds, and a finished run of a trained router."""

    work: Path
    small: Small
    run: Path


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Content that was cut, changed in places, or is something else."""
    ends = st.integers(0, len(whole))
    cut = ends.map(lambda end: whole[:end])
    changed = st.builds(
        lambda at, noise: whole[:at] + noise + whole[at + len(noise) :], ends, st.binary(min_size=1, max_size=9)
    )
    longer = st.builds(lambda at, noise: whole[:at] + noise + whole[at:], ends, st.binary(min_size=1, max_size=3))
    other = WILD.map(lambda value: json.dumps(value).encode())
    return cut | changed | longer | st.binary(max_size=64) | other


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts, anywhere in it, replaced, left out or renamed."""
    value = copy.deepcopy(value)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return value
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 4)):
            node = node[key]
            continue
        if draw(st.booleans()):
            node[key] = draw(WILD)
        else:
            del node[key]
        return value


def _values(section: type) -> st.SearchStrategy[Any]:
    """A mapping with some of a section's keys, some of them with values that are wrong."""
    made = {}
    for item in fields(section):
        inner = next((cls for cls in (item.type, *getattr(item.type, "__args__", ())) if is_dataclass(cls)), None)
        made[item.name] = st.one_of(_values(inner), WILD) if inner else WILD
    return st.fixed_dictionaries({}, optional=made)


def _dumped(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=True)


def recipes(whole: bytes) -> st.SearchStrategy[bytes]:
    """Recipes with wrong values under right keys, with YAML's darker corners, or damaged."""
    written = _values(Recipe).map(_dumped).map(lambda text: text.encode("utf-8", "surrogatepass"))
    raw = st.sampled_from(RAW).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return written | raw | damaged(whole)


def check_recipe(bench: Bench, content: bytes) -> None:
    """`buddy fit` with a recipe, up to where the model would be loaded."""
    (bench.work / "mine.yaml").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buddy.compare.fit", lambda recipe, name, command: _begun(bench, recipe, name))
        ask("fit", "--recipe", bench.work / "mine.yaml")


def _begun(bench: Bench, recipe: Recipe, name: str) -> None:
    """What a fit makes of a recipe that was accepted; deep enough in a folder that `..` does not lead out of it."""
    deep = bench.work.joinpath(*"abcdefgh")
    held = replace(recipe, output=f"{deep}/{recipe.output.lstrip('/')}")
    folder = RunFolder.of(held, name)
    assert folder.path.parent.parent.parent == Path(held.output)
    with folder.lock():
        work = folder.begin(held, name, {"model": ""}, GEOMETRY)
        assert flatten(held)
        assert work.is_relative_to(bench.work)
    shutil.rmtree(bench.work / "a")


def check_run(bench: Bench, name: str, content: bytes) -> None:
    """`buddy evaluate` of a run of which a file is damaged, and no checksum tells."""
    run = bench.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(bench.run, run, ignore=shutil.ignore_patterns("checkpoints", "*.png", "*tfevents*"))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "checksums": {}}))
    (run / name).write_bytes(content)
    if name == "recipe.yaml" and _walks(run / name):
        return
    ask("evaluate", "--run", run, "--budgets", "0.5")


def _walks(recipe: Path) -> bool:
    """Whether a cut path names a whole folder as text, such as all of the disk."""
    try:
        return os.path.isdir(load_recipe(recipe).data.source)
    except BuddyError:
        return False


def check_model(bench: Bench, name: str, content: bytes) -> None:
    """Loading of a backbone of which a file is damaged."""
    folder = bench.work / "model"
    if not folder.exists():
        shutil.copytree(bench.small.model, folder)
    whole = (bench.small.model / name).read_bytes()
    (folder / name).write_bytes(content)
    with _one_sentence(BackboneError):
        load_backbone(str(folder), "float32")
    (folder / name).write_bytes(whole)


def _kinds(bench: Bench) -> dict[str, tuple[float, st.SearchStrategy[Any], Callable[..., None]]]:
    """What is made malformed: its share of the examples, the arguments of its check, the check."""
    runs = {name: (bench.run / name).read_bytes() for name in ("run.json", "recipe.yaml", "router.safetensors")}
    facts = {**json.loads(runs["run.json"]), "checksums": {}}
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
    model = {name: (bench.small.model / name).read_bytes() for name in names}
    config = json.loads(model["config.json"])

    def one_of(files: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
        return st.sampled_from([*files]).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name])))

    def as_json(value: Any) -> st.SearchStrategy[bytes]:
        return altered(value).map(lambda changed: json.dumps(changed).encode())

    recipe = st.tuples(recipes(runs["recipe.yaml"]))
    run = one_of(runs) | st.tuples(st.just("run.json"), as_json(facts))
    models = one_of(model) | st.tuples(st.just("config.json"), as_json(config))
    return {
        "recipes": (1.0, recipe, check_recipe),
        "runs": (0.3, run, check_run),
        "models": (0.2, models, check_model),
    }


def fuzz(bench: Bench, examples: int, number: int) -> dict[str, int]:
    """Draw so many malformed recipes, and shares of as many other files; how many there were of each kind.

    Args:
        bench: what is made malformed.
        examples: recipes.
        number: the seed.

    Raises:
        AssertionError, or whatever a traceback would show: a command ended in another way than it may.
    """
    counts = {}
    with _inside(bench.work):
        for kind, (share, arguments, check) in _kinds(bench).items():
            counts[kind] = _drawn(max(1, round(share * examples)), number, arguments, lambda *a, c=check: c(bench, *a))
        assert not (bench.work / PLANTED).exists(), "a tag of a recipe was run"
    return counts


def _drawn(most: int, number: int, arguments: st.SearchStrategy[Any], check: Callable[..., None]) -> int:
    """Check so many examples; their number."""
    count = 0

    @seed(number)
    @settings(
        max_examples=most, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(arguments)
    def each(drawn: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        check(*drawn)

    each()
    return count


@contextmanager
def _one_sentence(kind: type[BuddyError]) -> Iterator[None]:
    """What is done within either goes well or is refused in one line by an error of that kind."""
    said = []
    try:
        yield
    except kind as error:
        said.append(str(error))
    assert not any("\n" in each for each in said), said


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In a folder, so that what a relative name makes is made there."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

"""Malformed recipes and files, drawn by hypothesis: whatever they are, Buddy ends well or with one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, fields, replace
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
from buddy.run import RunFolder, folder_name
from buddy.schema import Recipe, section_of
from tests.asking import ask
from tests.small import Small

GEOMETRY = Geometry(layers=6, context_layer=1, hidden=16, features=8)
PLANTED = "planted"  # a file that the tags below would make, if anything ran them
SPECIAL = ["${oc.env:HOME}", "../x", "/no/such/folder", "~nobody-at-all/x", "a\0b", "\ud800", "x" * 300, "a\nb"]
SPECIAL += ["日本/語", "module:", "os:system", "owner/name:config", "1e400", "nan"]
NUMBERS = st.integers(-3, 9) | st.sampled_from([2**31, 2**63, 10**30, -(10**30), 10**400, 1e308, 5e-324, -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.sampled_from(SPECIAL) | st.text(max_size=8)
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
    "output: !!python/object/apply:pathlib.Path [x]",
    "router: {name: buddy, options: {a: !!binary aGk=, b: !!set {c}, d: !!omap [e: 1], f: !!timestamp 2001-01-01}}",
    "seed: !!int abc",
    "seed: !unknown 3",
    "data:\n\twindow: 4",
    "a: " + "[" * 2000 + "]" * 2000,
    "%YAML 9.9\n---\nseed: 1",
    "seed: 1\n---\nseed: 2",
    "? [a]\n: b",
    "\ufeffseed: 1",
    "seed: \x00",
    'output: "\\ud800"',
    "data: *nothing",
    "router: ???\nrivals: [???]\nbudgets: [???]",
    "budgets: {0: 1}",
    "router: {name: uniform, options: {'${x}': '\\${y}'}}",
]


@dataclass(frozen=True)
class Bench:
    """What is made malformed: a folder to work in, a recipe of seconds, and a finished run of a trained router."""

    work: Path
    small: Small
    run: Path


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Content that was cut, changed in a place, or is something else."""
    ends = st.integers(0, len(whole))
    cut = ends.map(lambda end: whole[:end])
    noise = st.binary(min_size=1, max_size=9)
    changed = st.builds(lambda at, size, noise: whole[:at] + noise + whole[at + size :], ends, st.integers(0, 9), noise)
    return cut | changed | st.binary(max_size=64) | WILD.map(lambda value: json.dumps(value).encode())


def altered(value: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON of a mapping with another value under one of its keys."""
    changed = st.builds(lambda key, wild: {**value, key: wild}, st.sampled_from([*value]), WILD)
    return changed.map(lambda value: json.dumps(value).encode())


def _values(section: type) -> st.SearchStrategy[Any]:
    """A mapping with some of a section's keys, some of them with values that are wrong."""
    inner = {item.name: section_of(item.type) for item in fields(section)}
    made = {name: st.one_of(_values(cls), WILD) if cls else WILD for name, cls in inner.items()}
    return st.fixed_dictionaries({}, optional=made)


def recipes(whole: bytes) -> st.SearchStrategy[bytes]:
    """Recipes with wrong values under right keys, with YAML's darker corners, or damaged."""
    written = _values(Recipe).map(lambda value: yaml.safe_dump(value, allow_unicode=True))
    return (written | st.sampled_from(RAW)).map(lambda text: text.encode("utf-8", "surrogatepass")) | damaged(whole)


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
    folder = RunFolder.of(Path(held.output) / folder_name(name), held.router.name, held.seed)
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
    (run / "run.json").write_text(json.dumps(_without_checksums(run)))
    (run / name).write_bytes(content)
    try:
        walks = name == "recipe.yaml" and os.path.isdir(load_recipe(run / name).data.source)
    except BuddyError:
        walks = False
    if not walks:  # a cut path may name all of the disk as text
        ask("evaluate", "--run", run, "--budgets", "0.5")


def _without_checksums(run: Path) -> dict[str, Any]:
    """The facts of a run that Buddy 0.1 would have made, of which no file has a checksum."""
    return json.loads((run / "run.json").read_text()) | {"checksums": {}}


def check_model(bench: Bench, name: str, content: bytes) -> None:
    """Loading of a backbone of which a file is damaged."""
    folder = bench.work / "model"
    shutil.copytree(bench.small.model, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        load_backbone(str(folder), "float32")
    except BackboneError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are checked


def fuzz(bench: Bench, examples: int, number: int) -> dict[str, int]:
    """Draw so many malformed recipes, and shares of as many other files; how many there were of each kind.

    Args:
        bench: what is made malformed.
        examples: of recipes.
        number: seed of what is drawn.

    Raises:
        AssertionError: something ended in another way than well or with one sentence.
    """
    runs = {name: (bench.run / name).read_bytes() for name in ("recipe.yaml", "router.safetensors")}
    runs["run.json"] = json.dumps(_without_checksums(bench.run)).encode()
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
    models = {name: (bench.small.model / name).read_bytes() for name in names}
    kinds: dict[str, tuple[float, st.SearchStrategy[Any], Callable[..., None]]] = {
        "recipes": (1.0, st.tuples(recipes(runs["recipe.yaml"])), check_recipe),
        "runs": (0.3, _one_of(runs, "run.json"), check_run),
        "models": (0.2, _one_of(models, "config.json"), check_model),
    }
    counts = {}
    with chdir(bench.work):  # what a relative name makes is made here
        for kind, (share, arguments, check) in kinds.items():
            counts[kind] = _drawn(max(1, round(share * examples)), number, arguments, lambda *a, c=check: c(bench, *a))
        assert not (bench.work / PLANTED).exists(), "a tag of a recipe was run"
    return counts


def _one_of(files: dict[str, bytes], mapping: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of the files damaged, or the one that holds a mapping altered."""
    some = st.sampled_from([*files]).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name])))
    return some | st.tuples(st.just(mapping), altered(json.loads(files[mapping])))


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

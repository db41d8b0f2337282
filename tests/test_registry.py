"""Routers are found by installed metadata, loaded one at a time, and every fault is told in plain words."""

import subprocess
import sys

import pytest

from buddy.errors import RegistryError
from buddy.registry import Description, build, describe, installed, load
from buddy.router import Geometry, Router
from tests.documents import setup_cfg

GEOMETRY = Geometry(layers=6, context_layer=1, hidden=16, features=8)
PLUGIN = '''
from buddy import Router


class Stranger(Router):
    """Scores layers as told.

    More than one line.
    """

    source = "a friend"

    def __init__(self, geometry, *, weight: float, name: str = "x", size: int | None = None, parts=(), **_):
        super().__init__(geometry)
        if weight > 9:
            raise ValueError("weight must be at most 9.")
        self.weight = weight

    def score(self, context):
        return context.pooled[..., :1] * self.weight


class Strict(Router):
    def __init__(self, geometry, *, hidden: int = 4, prior: str = "none"):
        super().__init__(geometry)

    def score(self, context):
        return context.pooled


class Unfinished(Router):
    pass


number = 3
'''


def test_built_in_routers_are_announced_like_any_other():
    mine = [f"{entry.name} = {entry.value}" for entry in installed() if entry.value.startswith("routers.")]
    assert mine == sorted(setup_cfg()["options.entry_points"]["buddy.routers"].strip().splitlines())


def test_listing_imports_nothing(install):
    install("stranger", {"odd-one": "odd_module:Stranger"}, odd_module="raise SystemExit('imported')")
    assert ("odd-one", "odd_module:Stranger") in [(entry.name, entry.value) for entry in installed()]
    assert "odd_module" not in sys.modules
    code = "import sys; from buddy.registry import installed; assert installed(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_installed_meanwhile_is_found(install):
    assert "late-one" not in [entry.name for entry in installed()]
    install("latecomer", {"late-one": "late_module:Late"})
    assert "late-one" in [entry.name for entry in installed()]


def test_loading_imports_one_module(install):
    install("stranger", {"one": "first_module:Stranger", "two": "second_module:Strict"}, first_module=PLUGIN)
    assert issubclass(load("one"), Router)
    assert "second_module" not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("random-drp", "'random'"),
        ("zzz", "'zzz'.*angular, .*buddy"),
        ("nowhere_module:Thing", "ModuleNotFoundError"),
        ("buddy.router:Rooter", "AttributeError"),
        ("x:", "'x:'"),
        ("buddy.router:Geometry", "'buddy.router:Geometry'"),
        ("buddy.router:Router", "score"),
    ],
)
def test_names_that_cannot_be_loaded(name, words):
    with pytest.raises(RegistryError, match=words):
        load(name)


def test_two_distributions_with_one_name(install):
    install("first", {"twin": "twin_module:Stranger"}, twin_module=PLUGIN)
    install("second", {"twin": "twin_module:Strict"})
    with pytest.raises(RegistryError, match="'first' and 'second'"):
        load("twin")
    flagged = [row for row in describe() if row.name == "twin"]
    assert [row.distribution for row in flagged] == ["first", "second"]
    assert all(row.problem for row in flagged)


def test_a_name_that_folders_need_is_reserved(install):
    install("stranger", {"tensorboard": "odd_module:Stranger"}, odd_module=PLUGIN)
    with pytest.raises(RegistryError, match="'stranger'"):
        load("tensorboard")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("import nowhere", "ModuleNotFoundError"), ("raise SystemExit", "SystemExit"), ("def", "SyntaxError")],
)
def test_a_broken_router_is_listed_with_its_reason_and_stops_nobody_else(install, text, reason):
    install("stranger", {"broken": "broken_module:Stranger"}, broken_module=text)
    with pytest.raises(RegistryError, match=f"'stranger'.*{reason}"):
        load("broken")
    rows = {row.name: row for row in describe()}
    assert reason in rows["broken"].problem
    assert rows["uniform"].problem == ""


def test_descriptions(install):
    install("stranger", {"odd": "odd_module:Stranger", "strict": "odd_module:Strict"}, odd_module=PLUGIN)
    rows = {row.name: row for row in describe()}
    assert rows["odd"] == Description("odd", "stranger", "Scores layers as told.", "static", "a friend")
    assert rows["strict"].summary == ""
    kinds = {"uniform": "static", "random": "random", "buddy": "learned"}
    assert {name: rows[name].kind for name in kinds} == kinds


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "local_module.py").write_text(PLUGIN)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    router = build("local_module:Stranger", GEOMETRY, {"weight": 2})
    assert router.weight == 2
    assert sys.path[-1] == str(tmp_path)
    monkeypatch.delitem(sys.modules, "local_module")


def test_a_module_that_an_installed_one_hides(tmp_path, monkeypatch):
    (tmp_path / "routers.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match=r"__init__\.py was read and not routers\.py"):
        load("routers:Stranger")


def test_options_are_passed_or_all_named_at_once(install):
    install("stranger", {"odd": "odd_module:Stranger", "strict": "odd_module:Strict"}, odd_module=PLUGIN)
    router = build("odd", GEOMETRY, {"weight": 1, "size": None, "parts": ["a"], "anything": 3})
    assert (router.geometry, router.weight) == (GEOMETRY, 1)
    with pytest.raises(RegistryError, match="strict") as caught:
        build("strict", GEOMETRY, {"hiden": 3, "zzz": 1, "prior": 3, "hidden": True})
    for named in ("hiden", "'hidden'", "zzz", "prior", "True"):
        assert named in str(caught.value)
    with pytest.raises(RegistryError, match=r"size.*weight"):
        build("odd", GEOMETRY, {"size": "a"})
    with pytest.raises(RegistryError, match="at most 9"):
        build("odd", GEOMETRY, {"weight": 10})
    for option in ("x", "geometry"):
        with pytest.raises(RegistryError, match=rf"router\.options\.{option}"):
            build("full", GEOMETRY, {option: 1})

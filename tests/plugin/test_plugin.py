"""Packages of strangers, really installed by pip: the one beside this file, and what `buddy routers new` writes."""

import sys
from pathlib import Path

import pytest

from buddy.compare import fit
from buddy.registry import describe, load
from buddy.run_files import read_metrics
from buddy.testing import check_router
from tests.asking import ask
from tests.small import pip_install

pytestmark = pytest.mark.slow

STRANGER = Path(__file__).parent / "buddy-router-every-other"
NAMES = ["every-other", "prompt-gates", "ebb-and-flow"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that `buddy routers new` wrote."""
    out = tmp_path_factory.mktemp("new")
    assert ask("routers", "new", "ebb-and-flow", "--out", out) is None
    return out / "buddy-router-ebb-and-flow"


@pytest.fixture(scope="module")
def site(written, tmp_path_factory):
    """The folder into which both packages are installed."""
    site = tmp_path_factory.mktemp("site")
    pip_install(STRANGER, written, site=site, work=tmp_path_factory.mktemp("work"))
    return site


@pytest.fixture
def visible(site, monkeypatch):
    """The installed packages can be imported, as long as a test lasts."""
    monkeypatch.syspath_prepend(site)
    yield
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("every_other", "buddy_router_ebb_and_flow")
    ]:
        del sys.modules[name]


@pytest.mark.usefixtures("visible")
def test_they_are_found_by_their_entry_points():
    rows = {row.name: row for row in describe()}
    assert [rows[name].distribution for name in NAMES[:2]] == ["buddy-router-every-other"] * 2
    assert rows["ebb-and-flow"].distribution == "buddy-router-ebb-and-flow"
    assert (rows["every-other"].kind, rows["every-other"].source) == ("static", "a stranger")
    assert all(not rows[name].problem for name in NAMES)
    assert load("ebb-and-flow").__name__ == "EbbAndFlowRouter"


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize("name", NAMES)
def test_they_keep_what_routers_promise(name):
    states = {result.check: result.state for result in check_router(name)}
    trained = {"groups", "weights", "gradients"}
    expected = {"every-other": set(), "prompt-gates": trained, "ebb-and-flow": trained - {"weights"}}[name]
    assert {check for check in trained if states[check] == "passed"} == expected


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize("name", NAMES)
def test_they_fit_and_evaluate_as_they_stand(name, small, tmp_path):
    fit(small(tmp_path, f"router={name}", "rivals=[]"), "small")
    run = tmp_path / "small" / name / "seed-0"
    assert [round(row["executed"]["mean"]) for row in read_metrics(run)["results"]] == [6, 4, 3]
    assert ask("evaluate", "--run", run, "--budgets", "0.5") is None

"""Imports run downwards: a module imports from its own layer and from those before it, and no cycle exists."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import buddy

pytestmark = pytest.mark.slow

ROOT = Path(buddy.__file__).parent
ROUTERS = ROOT.parent / "routers"
HEAVY = {"lightning", "transformers", "datasets", "lm_eval", "matplotlib", "omegaconf"}
LAYERS = (
    *("errors", "io", "console", "distributed", "plan", "budget", "router"),
    *("values", "registry", "schema", "config", "provenance", "run_files", "run"),
    *("backbone", "engine", "data", "losses", "measurements", "calibration"),
    *("metrics", "latency", "training", "predictor"),
    *("builders", "evaluation", "fit", "executors", "worker", "compare", "inspection", "footprint", "hub", "testing"),
    *("scaffold", "serve", "cli"),
)
EXCEPTIONS: set[tuple[str, str]] = set()  # (importing module, imported module): this set only shrinks


def import_nodes(path: Path) -> Iterator[tuple[str, bool]]:
    """(full dotted name, whether it is needed at run time) of every import of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in checked) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: write imports in full"
            yield from ((f"{node.module}.{alias.name}", id(node) not in checked) for alias in node.names)


def modules() -> dict[str, Path]:
    """Dotted name inside `buddy` to file, for every file with code; the package `buddy` itself is not among them."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "__main__" and path.read_text("utf-8").strip():
            found[name] = path
    return found


MODULES = modules()


def imported(module: str) -> set[str]:
    """The modules of `buddy` that one imports, for type checkers too."""
    found = set()
    for name, _ in import_nodes(MODULES[module]):
        parts = name.split(".")
        while len(parts) > 1 and ".".join(parts[1:]) not in MODULES:
            parts.pop()
        if parts[0] == "buddy" and len(parts) > 1:
            found.add(".".join(parts[1:]))
    return found - {module}


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[0])


def test_imports_run_downwards():
    upward = {(one, other) for one in MODULES for other in imported(one) if layer(other) > layer(one)}
    assert upward - EXCEPTIONS == set()
    assert EXCEPTIONS - upward == set(), "no longer needed: take them out"


def test_there_is_no_cycle():
    graph = {one: {other for other in imported(one) if (one, other) not in EXCEPTIONS} for one in MODULES}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)  # raises where there is one


def test_buddy_never_imports_routers():
    assert not [one for one in MODULES for name, _ in import_nodes(MODULES[one]) if name.split(".")[0] == "routers"]


@pytest.mark.parametrize("path", sorted(ROUTERS.glob("*.py")), ids=lambda path: path.stem)
def test_routers_import_only_public_names(path):
    names = {name for name, running in import_nodes(path) if running}
    public = {f"buddy.{name}" for name in buddy.__all__} | {name for name in names if name.startswith("buddy.router.")}
    assert {
        name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", "routers"}
    } <= public


def loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after a fresh interpreter ran some code."""
    show = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import buddy", {*HEAVY, "torch", "numpy"}),
        ("from buddy import Router, Context, Geometry, Plan", HEAVY),
        ("from buddy.cli import app\napp(['--help'], standalone_mode=False)", {*HEAVY, "torch", "numpy", "rich"}),
        (
            "from buddy.cli import app\napp(['recipes', 'show', 'gpu'], standalone_mode=False)",
            {*HEAVY, "torch", "numpy"} - {"omegaconf"},
        ),
        ("from buddy.config import load_recipe\nload_recipe('quickstart')", {*HEAVY, "torch"} - {"omegaconf"}),
    ],
)
def test_light_commands_load_no_framework(code, absent):
    assert not loaded_by(code) & absent


def test_serving_a_run_loads_neither_lightning_nor_pandas(finished):
    code = f"import buddy\nbuddy.load({str(finished / 'buddy')!r}).generate('a', 0.5, max_new_tokens=1)"
    assert not loaded_by(code) & ({*HEAVY, "pandas"} - {"transformers", "omegaconf"})


def test_every_public_name_is_there():
    assert {"Router", "Context", "Geometry", "BuddyError", "Plan", "Probe"} <= set(buddy.__all__)
    for name in buddy.__all__:
        assert getattr(buddy, name).__name__ == name
        assert name in dir(buddy)
    with pytest.raises(AttributeError, match="Ruter"):
        _ = buddy.Ruter

"""The architecture's table: which room may import which. What is not listed is refused."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import buddy

ROOT = Path(buddy.__file__).parent
ROUTERS = ROOT.parent / "routers"
HEAVY = {"lightning", "transformers", "datasets", "lm_eval", "matplotlib", "omegaconf"}

CONTRACTS = {"errors", "budget", "plan", "router"}
CONFIGURED = {
    "assemble",
    "backbone",
    "io",
    "run",
    "distributed",
    "console",
    "config",
    "registry",
    "__init__",
}
TABLE = {
    "__init__": set(),
    "__main__": {"cli"},
    "distributed": {"errors", "config", "training.interrupt"},
    "sharding": {"backbone", "errors", "distributed", "config"},
    "errors": set(),
    "budget": {"errors"},
    "plan": {"errors"},
    "router": {"errors"},
    "registry": {"errors", "router"},
    "scaffold": {"errors", "io", "handover.folder", "registry", "scaffold"},
    "testing": {*CONTRACTS, "backbone", "calibration", "engine", "io", "registry", "testing"},
    "testing.command": {"errors", "backbone", "console", "config", "testing"},
    "config": {"errors"},
    "signals": set(),
    "io": {"errors"},
    "run": {"errors", "io", "run", "config", "__init__"},
    "console": set(),
    "embedded": {"errors", "io"},
    "backbone": {"errors", "embedded"},
    "engine": {*CONTRACTS, "backbone", "engine"},
    "calibration": {
        *CONTRACTS,
        "backbone",
        "calibration",
        "embedded",
        "engine",
        "console",
        "training.objective",
    },
    "calibration.benchmark": {*CONTRACTS, *CONFIGURED, "calibration", "evaluation.pruned", "training.objective"},
    "assemble": {
        *CONTRACTS,
        "backbone",
        "engine",
        "healing.adapter",
        "latency",
        "run",
        "predictor",
        "distributed",
        "registry",
        "config",
        "sharding",
        "training.data",
        "training.sources",
        "training.windows",
    },
    "training": {*CONTRACTS, "engine", "console", "training"},
    "training.fit": {*CONTRACTS, *CONFIGURED, "evaluation.report", "sharding", "training"},
    "training.session": {
        *CONTRACTS,
        *CONFIGURED,
        "calibration",
        "engine",
        "evaluation",
        "healing",
        "predictor.fit",
        "sharding",
        "training",
    },
    "healing": {*CONTRACTS, *CONFIGURED, "engine", "healing", "training"},
    "healing.rates": {*CONTRACTS, *CONFIGURED, "engine", "evaluation.perplexity", "healing", "training"},
    "healing.adapter": {"backbone", "errors", "io"},
    "training.ledger": {"errors", "evaluation.perplexity", "evaluation.saved", "io", "run", "config"},
    "training.interrupt": {"errors", "io", "console"},
    "training.inputs": {"backbone", "registry", "config", "training.data"},
    "training.stopwatch": {"errors", "io"},
    "training.train": {*CONTRACTS, *CONFIGURED, "engine", "sharding", "training"},
    "training.benchmark": {*CONTRACTS, *CONFIGURED, "calibration", "engine", "config", "training"},
    "evaluation": {
        *CONTRACTS,
        *CONFIGURED,
        "engine",
        "evaluation",
        "latency",
        "sharding",
        "training.data",
        "training.objective",
        "training.windows",
    },
    "latency": {*CONTRACTS, "comparison.machine", "embedded", "engine", "evaluation.speed", "io", "console"},
    "predictor": {*CONTRACTS, "backbone", "engine", "io", "run", "predictor", "training.objective"},
    "predictor.choosing": {"evaluation.mixture", "predictor"},
    "predictor.study_figure": {"evaluation.figure", "evaluation.mixture"},
    "predictor.fit": {*CONTRACTS, *CONFIGURED, "engine", "predictor", "training.data"},
    "predictor.study": {
        *CONTRACTS,
        *CONFIGURED,
        "engine",
        "evaluation",
        "inspection.domains",
        "predictor",
        "training.windows",
    },
    "comparison": {
        *CONTRACTS,
        *CONFIGURED,
        "comparison",
        "config",
        "engine",
        "evaluation",
        "healing.adapter",
        "inspection.domains",
        "signals",
        "training",
    },
    "inspection": {
        *CONTRACTS,
        *CONFIGURED,
        "engine",
        "evaluation.figure",
        "inspection",
        "training.sources",
        "training.windows",
    },
    "handover": {
        *CONTRACTS,
        *CONFIGURED,
        "embedded",
        "engine",
        "evaluation",
        "handover",
        "healing.adapter",
        "inspection",
        "training.windows",
    },
    "handover.model": {"budget", "errors", "engine", "io"},
    "footprint": {*CONTRACTS, *CONFIGURED, "embedded", "footprint"},
    "serve": {*CONTRACTS, *CONFIGURED, "engine", "handover.model"},
    "cli": {
        "distributed",
        "footprint.plan",
        "handover.export",
        "handover.pull",
        "handover.push",
        "cli",
        "scaffold",
        "testing.command",
        "errors",
        "config",
        "registry",
        "training.fit",
        "evaluation.evaluate",
        "evaluation.bench",
        "evaluation.tasks",
        "comparison.asked",
        "comparison.compare",
        "comparison.rewrite",
        "inspection.inspect",
        "serve",
        "__init__",
    },
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that can run, at the top or inside a function; those for type checkers alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not is_type_checking(child):
            yield from import_nodes(child)


def imported(path: Path) -> Iterator[str]:
    """Full dotted names, a module where there is one and a module's attribute otherwise."""
    for node in import_nodes(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path} line {node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    """Dotted name inside `buddy` to file; a package's own name stands for its __init__."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def home(name: str) -> str:
    """The module of `buddy` that holds a dotted name."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def ours(path: Path) -> set[str]:
    return {home(name) for name in imported(path) if name.split(".")[0] == "buddy"}


def lies_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def row_of(module: str) -> set[str]:
    rooms = [room for room in TABLE if lies_in(module, room)]
    assert rooms, f"buddy.{module} has no row in the table of imports; give it one"
    return TABLE[max(rooms, key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_row_allows(module):
    allowed = row_of(module)
    refused = {name for name in ours(MODULES[module]) if not any(lies_in(name, room) for room in allowed)}
    assert not refused, f"buddy.{module} imports {sorted(refused)}, but may import only {sorted(allowed)}"


def test_imports_run_one_way():
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    assert order.index("errors") < order.index("router") < order.index("engine.model") < order.index("cli")


@pytest.mark.parametrize("module", MODULES)
def test_buddy_never_imports_routers(module):
    assert not {name for name in imported(MODULES[module]) if name.split(".")[0] == "routers"}


@pytest.mark.parametrize("path", sorted(ROUTERS.glob("*.py")), ids=lambda path: path.stem)
def test_routers_import_only_public_names(path):
    names = set(imported(path))
    public = {f"buddy.{name}" for name in buddy.__all__} | {name for name in names if name.startswith("buddy.router.")}
    foreign = {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, "torch"}}
    assert foreign <= public


def test_the_walk_sees_what_it_must(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from buddy import embedded, Router\nimport buddy.plan\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from buddy.calibration.probe import CalibrationProbe\n"
        "def f():\n    from buddy.engine.model import RoutedLM\n"
    )
    assert ours(path) == {"embedded", "__init__", "plan", "engine.model"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after a fresh interpreter ran some code."""
    show = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_buddy_is_light():
    assert not loaded_by("import buddy") & {*HEAVY, "torch", "numpy"}


def test_a_plug_in_needs_no_framework():
    assert "torch" in loaded_by("import buddy.router")
    assert not loaded_by("from buddy import Router, Context, Geometry, Plan") & HEAVY


def test_help_and_recipes_are_light():
    run = "import sys\nfrom buddy.cli import app\napp({words}, standalone_mode=False)"
    assert not loaded_by(run.format(words=["--help"])) & {*HEAVY, "torch", "numpy", "rich"}
    assert not loaded_by(run.format(words=["recipes", "show", "gpu"])) & ({*HEAVY, "torch", "numpy"} - {"omegaconf"})


def test_every_public_name_is_there():
    assert {"Router", "Context", "Geometry", "BuddyError", "Plan", "Probe"} <= set(buddy.__all__)
    for name in buddy.__all__:
        assert getattr(buddy, name).__name__ == name
        assert name in dir(buddy)
    with pytest.raises(AttributeError, match="module 'buddy' has no attribute 'Ruter'"):
        _ = buddy.Ruter

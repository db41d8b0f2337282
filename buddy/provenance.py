"""What a run is made from: digests of its inputs, how those and its recipe differ from another run's, the machine."""

import ast
import hashlib
import inspect
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import buddy
from buddy.config import MACHINE_KEYS, flatten
from buddy.errors import RecipeError
from buddy.schema import Recipe, Rival
from buddy.values import shown

PACKAGES = ("torch", "transformers", "lightning", "datasets", "numpy")  # that results depend on
CODE = "router's code"  # the digest whose change only warns
UNKNOWN = "unknown"  # that digest without source code
# Digests that older runs lack, with what it means if they differ; they are compared where both sides have them.
OPTIONAL_DIGESTS = {
    "details": "another configuration of the model, or other weights",
    "tokens": "another text to train on",
    "checkpoint": "another content of ckpt_path",
}
# Keys of a recipe that change nothing in the run.
IGNORED_KEYS = (
    "output",
    "rivals",
    "checkpoint_every",
    "logger",
    "trainer.log_every_n_steps",
    "fixed",
    "backbone.accept_license",
)
# Beginnings of keys that change nothing if nothing is trained.
TRAINING_KEYS = ("trainer.", "objective.", "optimizer.", "data.train_sources")
# Keys that change nothing if no estimator of a recipe trains the router.
ESTIMATOR_KEYS = ("objective.estimator", "objective.plans", "objective.sigma", "objective.shared")
CKPT_KEY = "ckpt_path"


@cache
def code_digest(router: type) -> str:
    """Digest of the module of a class, without comments, docstrings and layout; "unknown" without source code.

    Of the code as it was when it was first asked for, since the file may change while it runs.
    """
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(router)))
    except (OSError, TypeError, SyntaxError):  # defined in a notebook, for example
        return UNKNOWN
    return hashlib.sha256(ast.unparse(_WithoutDocstrings().visit(tree)).encode()).hexdigest()[:16]


def check_fixed(recipe: Recipe, routers: Sequence[Rival], digests: Mapping[str, str]) -> None:
    """Refuse test windows under other settings than those that the recipe fixed; `digests` are of the inputs.

    Raises:
        RecipeError: another setting or input, or a router with overrides that are not among the recipe's rivals.
    """
    if recipe.fixed is None or recipe.data.evaluate_on != "test":
        return
    if found := [each.label for each in routers if each.overrides and each not in recipe.rivals]:
        raise RecipeError(
            f"The settings of {', '.join(found)} are not in the recipe, which is fixed as {recipe.fixed}; add "
            "them to its rivals, or choose settings with data.evaluate_on=validation."
        )
    digest = _settings_digest(recipe, digests)
    if digest != recipe.fixed:
        raise RecipeError(
            f"The settings differ from those that the recipe fixed before its test windows were read ({recipe.fixed}); "
            f"choose settings with data.evaluate_on=validation, or set fixed={digest}."
        )


def _settings_digest(recipe: Recipe, digests: Mapping[str, str]) -> str:
    """15 hexadecimal digits of the settings of a comparison and of its inputs, wherever the texts lie.

    An "s" before them keeps YAML from reading a number. The seed of the routers is left out: a comparison has many. So
    are texts beside the recipe's own, whose windows depend on the settings.
    """
    data, none = recipe.data, () if recipe.callbacks else ("callbacks",)
    free = (*IGNORED_KEYS, *MACHINE_KEYS, CKPT_KEY, "seed", "data.evaluate_on", *none)
    settings: dict[str, Any] = {key: value for key, value in flatten(recipe).items() if not key.startswith(free)}
    settings |= {"data.source": PurePath(data.source).name, "data.seed": recipe.data_seed}
    for key in ("train_sources", "calibration_sources"):
        settings[f"data.{key}"] = [PurePath(each).name for each in getattr(data, key)]
    overrides = sorted(each.label for each in recipe.rivals if each.overrides)
    inputs = {name: value for name, value in digests.items() if name not in (CODE, *OPTIONAL_DIGESTS)}
    content = json.dumps([settings, overrides, inputs], sort_keys=True)
    return "s" + hashlib.sha256(content.encode()).hexdigest()[:15]


def differences(
    stored: Recipe,
    recipe: Recipe,
    stored_digests: Mapping[str, str],
    digests: Mapping[str, str],
    ignore: Sequence[str] = (),
) -> list[str]:
    """One phrase for each recipe key or input that differs, such as "optimizer.lr: 0.003 there, 0.006 here".

    Keys that start with one of `IGNORED_KEYS` or `ignore` may differ, and so may the digest of the router's code.
    Unknown (empty) digests differ from nothing, and nor do those that an older run lacks.
    """
    there, here = flatten(stored), flatten(recipe)
    free = (*IGNORED_KEYS, *ignore)
    keys = [key for key in dict.fromkeys([*there, *here]) if not key.startswith(free)]
    names = {*stored_digests, *digests} if stored_digests and digests else set()
    names -= {CODE, *(["training text", "tokens"] if "data.train_sources".startswith(free) else [])}
    names -= {name for name in OPTIONAL_DIGESTS if name not in stored_digests or name not in digests}
    return [
        f"{key}: {shown(there[key]) if key in there else 'not set'} there, "
        f"{shown(here[key]) if key in here else 'not set'} here"
        for key in keys
        if there.get(key) != here.get(key)
    ] + [
        OPTIONAL_DIGESTS.get(name, f"another {name}")
        for name in sorted(names)
        if stored_digests.get(name) != digests.get(name)
    ]


def versions() -> dict[str, str]:
    """Of Python, Buddy and `PACKAGES`."""
    found = {"python": platform.python_version(), "buddy": buddy.__version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # installed without metadata
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory (None where unknown), accelerator."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator) if accelerator else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory: float | None = None
    with suppress(AttributeError, OSError, ValueError):  # not every system has these
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+?)\s*$", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
        processor = found[1] if found else processor
    return {"processor": processor, "cores": cores, "memory_gib": memory, "accelerator": name}


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes string statements: docstrings, and others without effect."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node

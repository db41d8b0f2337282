"""A small, complete package for a new router: `buddy routers new NAME`."""

import re
from importlib.util import find_spec
from pathlib import Path
from string import Template

from buddy.errors import RegistryError
from buddy.io import new_folder, writing
from buddy.registry import RESERVED, installed

NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
MAX_LENGTH = 40  # characters of a name


def new_router(name: str, out: Path) -> Path:
    """Write the package `out/buddy-router-NAME` atomically; returns its folder.

    Raises:
        RegistryError: the name cannot be used or is taken.
        RunError: the folder exists or cannot be written.
    """
    check_name(name)
    folder = out / f"buddy-router-{name}"
    with new_folder(folder) as made, writing(folder):
        for path, text in package(name).items():
            (made / path).parent.mkdir(exist_ok=True)
            (made / path).write_text(text, "utf-8")
    return folder


def package(name: str) -> dict[str, str]:
    """Path inside the package → text, for a checked name."""
    module = _module(name)
    cls = "".join(part.capitalize() for part in name.removesuffix("-router").split("-")) + "Router"
    words = {"name": name, "module": module, "class": cls}
    return {path.format(**words): Template(text).substitute(words) for path, text in FILES.items()}


def check_name(name: str) -> None:
    """Raises RegistryError unless a new router, its distribution and its module can have this name."""
    if not re.fullmatch(NAME, name):
        tidy = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        hint = f", such as {tidy!r}" if re.fullmatch(NAME, tidy) else ", such as 'my-router'"
        raise RegistryError(
            f"{name!r} is not a valid router name; use lower-case letters and digits, joined by hyphens{hint}."
        )
    if len(name) > MAX_LENGTH:
        raise RegistryError(f"The name {name!r} has {len(name)} letters; use at most {MAX_LENGTH}.")
    if name in RESERVED:
        raise RegistryError(f"{name!r} is reserved; choose another name.")
    if any(entry.name == name for entry in installed()):
        raise RegistryError(f"A router named {name!r} is installed already; choose another name.")
    if find_spec(_module(name)) is not None:
        raise RegistryError(f"A package buddy-router-{name} is installed already; choose another name.")


def _module(name: str) -> str:
    return f"buddy_router_{name.replace('-', '_')}"


PROJECT = """\
[build-system]
requires = ["setuptools>=70.1"]
build-backend = "setuptools.build_meta"

[project]
name = "buddy-router-$name"
version = "0.1.0"
description = "The router $name for Buddy"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["buddy-depth"]
optional-dependencies = { test = ["pytest"] }

[project.entry-points."buddy.routers"]
$name = "$module:$class"

[tool.setuptools]
py-modules = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

MODULE = '''\
"""The router $name for Buddy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Context, Geometry, Probe, Router


class $class(Router):
    """Learned: one linear map of the token's hidden state, added to what each layer changes on average.

    Args:
        geometry: sizes of the backbone.
        prior_weight: how much the average counts beside the token.

    Raises:
        ValueError: a negative weight.
    """

    kind = "learned"

    def __init__(self, geometry: Geometry, *, prior_weight: float = 0.3) -> None:
        super().__init__(geometry)
        if prior_weight < 0:
            raise ValueError(f"prior_weight is {prior_weight}; give 0 or more")
        self.prior_weight = prior_weight
        self.read = nn.Linear(geometry.hidden, geometry.routable)
        nn.init.zeros_(self.read.weight)  # so training starts from the order of the prior
        nn.init.zeros_(self.read.bias)
        self.register_buffer("prior", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Measure once how much each layer changes the hidden state (Block Influence), standardised."""
        influence = probe.block_influence
        self.prior.copy_(F.layer_norm(influence, influence.shape))

    def score(self, context: Context) -> Tensor:
        """(..., R) float32: larger is more worth running; the engine runs the best of them."""
        hidden = F.layer_norm(context.hidden, context.hidden.shape[-1:])
        return self.read(hidden) + self.prior_weight * self.prior
'''

TEST = '''\
"""The router $name keeps what all routers promise; run `pytest` in the folder above."""

import pytest

from buddy.testing import CHECKS, Check, Subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The router as it is installed, on a tiny random model."""
    return Subject("$name")


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_it_keeps_its_promises(check: Check, subject: Subject) -> None:
    check(subject)
'''

README = """\
# buddy-router-$name

The router `$name` for Buddy (`buddy-depth`): how much is each layer of a language model worth for a token? The class is
`$class` in `$module.py`; its keyword arguments are the router's options, as in `router.options.prior_weight=0.5`.

```bash
pip install -e '.[test]'
buddy routers check $name
pytest
buddy fit --recipe quickstart router=$name 'rivals=[uniform]'
buddy compare --recipe quickstart --routers $name,buddy,shortgpt
```
"""

FILES = {
    "pyproject.toml": PROJECT,
    "README.md": README,
    "{module}.py": MODULE,
    "tests/test_{module}.py": TEST,
}

"""A small complete package for a router of one's own: `buddy routers new NAME`."""

import os
import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from buddy.errors import RegistryError
from buddy.handover.folder import whole_folder
from buddy.io import writing
from buddy.registry import installed
from buddy.scaffold.templates import FILES

NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
LONGEST = 40  # letters of a name
OTHERWISE = "all", "false", "no", "null", "off", "on", "true", "yes"  # a command line reads these as something else


def new_router(name: str, out: Path) -> Path:
    """Write the package `out/buddy-router-NAME`, whole or not at all; returns its folder.

    Raises:
        RegistryError: no name for a router, or one that is taken.
        RunError: the place is taken or cannot be written.
    """
    check_name(name)
    folder = out / f"buddy-router-{name}"
    _check_place(out, folder)
    with whole_folder(folder) as made, writing(folder):
        for path, text in package(name).items():
            (made / path).parent.mkdir(exist_ok=True)
            (made / path).write_text(text, "utf-8")
    return folder


def package(name: str) -> dict[str, str]:
    """Path inside the package → text, for a checked name."""
    module = f"buddy_router_{name.replace('-', '_')}"
    cls = "".join(part.capitalize() for part in name.removesuffix("-router").split("-")) + "Router"
    words = {"name": name, "module": module, "class": cls, "title": name.replace("-", " ")}
    return {path.format(**words): text.substitute(words) for path, text in FILES.items()}


def check_name(name: str) -> None:
    """Raises RegistryError unless a new router, its distribution and its module can have this name."""
    if not re.fullmatch(NAME, name):
        tidy = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        hint = f", such as {tidy!r}" if re.fullmatch(NAME, tidy) else ", such as 'my-router'"
        raise RegistryError(
            f"{name!r} is no name for a router; take lower-case letters and digits, joined by hyphens{hint}."
        )
    if len(name) > LONGEST:
        raise RegistryError(f"The name {name!r} has {len(name)} letters; take at most {LONGEST}.")
    if name in OTHERWISE:
        raise RegistryError(f"{name!r} means something else on the command line; choose another name.")
    for entry in installed():
        if entry.name == name:
            raise RegistryError(
                f"A router named {name!r} is installed already, by {entry.distribution!r}; choose another name."
            )
    module = f"buddy_router_{name.replace('-', '_')}"
    if _is_installed(f"buddy-router-{name}") or find_spec(module) is not None:
        raise RegistryError(f"A package buddy-router-{name} is installed already; choose another name.")


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _check_place(out: Path, folder: Path) -> None:
    if not os.path.isdir(out):  # os.path, unlike Path, answers for any text: a name of 300 letters, say
        trouble = "is a file" if os.path.exists(out) else "is not there"
        raise RegistryError(f"The folder {out} {trouble}; name a folder that is, with --out.")
    if os.path.lexists(folder):
        raise RegistryError(f"{folder} exists and is not overwritten; choose another name, or another --out.")

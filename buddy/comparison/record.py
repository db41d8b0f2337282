"""comparison.json: all that was asked and found, from which every table and figure can be made again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from buddy.errors import BuddyError, RunError
from buddy.io import read_json, write_text

FORMAT = 1
KEYS = (
    "command",
    "created",
    "recipe",
    "layers",
    "versions",
    "machine",
    "domains",
    "routers",
    "runs",
    "failures",
    "tasks",
)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all; lists of numbers keep to one line, for there are thousands of them."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A comparison that was saved.

    Raises:
        RunError: missing, not one, or made by a newer Buddy.
    """
    if os.path.isdir(path):
        raise RunError(f"{path} is a folder; name the comparison.json in it.")
    try:
        found = read_json(path)
    except BuddyError as error:
        if not os.path.exists(path):
            raise RunError(f"There is no file {path}; name the comparison.json that `buddy compare` wrote.") from error
        raise RunError(f"{path} is damaged; make it again with the `buddy compare` that made it.") from error
    made = found.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise RunError(f"{path} was made by a newer Buddy (format {made}); upgrade Buddy to read it.")
    missing = [key for key in KEYS if key not in found]
    if made != FORMAT or missing:
        raise RunError(f"{path} is no comparison; name the comparison.json that `buddy compare` wrote.")
    return found

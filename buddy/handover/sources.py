"""What stands for a run that lies elsewhere: a folder, or a name on the hub."""

import os
import re
from pathlib import Path

from buddy.errors import RunError

HUB = "hf://"  # before a name, where it could be a folder too
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")


def hub_name(text: str) -> str | None:
    """The hub's `owner/name` that a text stands for; None where it stands for a folder.

    `hf://owner/name` is the hub's whatever lies here; `owner/name` is where no folder `owner` does.

    Raises:
        RunError: it is empty, `hf://` without such a name, or could be either.
    """
    if not text.strip():
        raise RunError(f"The name is empty; give a folder, such as ./shared, or {HUB}owner/name.")
    if text.startswith(HUB):
        name = text.removeprefix(HUB)
        if not _is_name(name):
            raise RunError(f"{text} is no name on the hub; write {HUB}owner/name.")
        return name
    if not _is_name(text) or os.path.isdir(text):
        return None
    if os.path.isdir(text.partition("/")[0]):
        raise RunError(f"{text} could be a folder or a name on the hub; write ./{text} or {HUB}{text}.")
    return text


def folder_of(text: str) -> Path:
    """The folder that a text which is no name on the hub stands for."""
    return Path(os.path.expanduser(text))


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text

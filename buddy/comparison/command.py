"""The command of a comparison as it is shown to others: files and folders by their names alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def shown_command(words: Sequence[str]) -> str:
    """The words as a person would type them, without the folders of files."""
    return " ".join(shlex.quote(shown_text(word)) for word in words)


def shown_text(text: str) -> str:
    """A path by its last part; of other text, such as a list, each path in it."""
    return shown_path(text) if os.path.exists(text) else "".join(map(shown_path, re.split(r"([],=[{} ])", text)))


def shown_path(text: str) -> str:
    """The last part of a path; any other text, names on the hub among them, as it is."""
    is_path = os.sep in text and (text.startswith((os.sep, ".", "~")) or os.path.exists(text))
    return Path(text).name if is_path else text

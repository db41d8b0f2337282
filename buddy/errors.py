"""Errors that a user can cause and correct.

Each is a `BuddyError`. Its message is one plain sentence with the next step; the command line prints it without a
traceback and exits with 2.
"""

import inspect
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten


class BuddyError(Exception):
    """Base of all errors that a user can cause and correct."""


class BudgetError(BuddyError):
    """A budget that no plan can meet."""


class RegistryError(BuddyError):
    """A router that cannot be found, imported or trusted."""


class RecipeError(BuddyError):
    """A recipe with unknown keys, wrong types or impossible values."""


class BackboneError(BuddyError):
    """A language model that cannot be found, loaded or routed."""


class DataError(BuddyError):
    """Text that is missing, empty or too short."""


class RunError(BuddyError):
    """A run folder that is missing, half-written or made for something else."""


class DamagedError(RunError):
    """A file of a run that cannot be used.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        reason = " ".join(reason.split())  # one line
        super().__init__(f"{path} is damaged ({reason}); repeat the run with `buddy fit`.")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        """From one process to another: `Exception` itself would make it anew from the message alone."""
        return type(self), (self.path, self.reason)


class TrainingError(BuddyError):
    """Training that cannot go on."""


def reason(error: BaseException) -> str:
    """The message of an error, on one line of at most 200 characters and without a full stop."""
    return shorten(str(error), 200, placeholder=" …").rstrip(". ") or type(error).__name__


def described(error: BaseException) -> str:
    """The type of an error and its message, if it has one, as `reason` gives it."""
    name, text = type(error).__name__, reason(error)
    return name if text == name else f"{name}: {text}"


def raised(error: BaseException, cls: type) -> str:
    """Type and message of an error, with the line in the router's own file if there is one."""
    try:
        file = inspect.getfile(cls)
    except (OSError, TypeError):  # defined in a notebook, for example
        file = ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" (line {frames[-1].lineno} of {file.rpartition('/')[2]})" if frames else ""
    return f"{cls.__name__} raises {described(error)}{where}"


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for a mistyped `word`, or "" if no accepted word is similar."""
    close = get_close_matches(word, list(accepted), n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def check_text(text: str, what: str) -> None:
    """Raises DataError for text that cannot be encoded in UTF-8, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = error.start + 1
        raise DataError(f"{what} has a character that is not valid UTF-8, at position {where}; correct it.") from error

"""A check of a router: what it asks for, what has to hold before it can be asked, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from unittest import SkipTest

from buddy.testing.subject import Subject, raised

State = Literal["passed", "failed", "left out", "waits"]


class Failed(AssertionError):
    """The router does not keep what routers promise; the message is a sentence that says what to change."""


class LeftOut(Exception):
    """The check has nothing to ask of this router; the message says why."""


@dataclass(frozen=True)
class Result:
    """How one check ended.

    Attributes:
        check: its name.
        asks: the promise.
        state: "left out" where it does not apply to the router, "waits" where one that it builds on failed.
        words: what was seen, or for "failed" what to change.
        error: what was raised, for "failed".
    """

    check: str
    asks: str
    state: State
    words: str
    error: BaseException | None = None

    @property
    def line(self) -> str:
        """What was asked and what was seen; of a failure only what to change."""
        return self.words if self.error else f"{self.asks} ({self.words})"


@dataclass(frozen=True)
class Check:
    """One promise of routers. Call it with a `Subject` in a test of your own.

    Attributes:
        name: one or two words.
        asks: the promise in a phrase.
        function: raises `Failed`, or says what it saw.
        needs: checks without which the answer would mean nothing, so that one fault fails one check.
    """

    name: str
    asks: str
    function: Callable[[Subject], str]
    needs: tuple[Check, ...] = ()

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Subject) -> None:
        """Pass, or raise.

        Raises:
            Failed: the promise is broken.
            SkipTest: there is nothing to ask, or a check that this one needs failed; pytest shows it as skipped.
        """
        result = self.examine(subject)
        if result.state == "failed":
            raise Failed(result.words) from result.error
        if result.state != "passed":
            raise SkipTest(result.words)

    def examine(self, subject: Subject) -> Result:
        """How the check ends, found once for each subject."""
        found: Result | None = subject.results.get(self.name)
        if found is None:
            found = subject.results[self.name] = self._examine(subject)
        return found

    def _examine(self, subject: Subject) -> Result:
        for need in self.needs:
            if need.examine(subject).state in ("failed", "waits"):
                return self._ends("waits", f"asked once '{need}' passes")
        try:
            return self._ends("passed", self.function(subject))
        except LeftOut as error:
            return self._ends("left out", str(error))
        except Failed as error:
            return self._ends("failed", str(error), error.__cause__ or error)
        except (Exception, SystemExit) as error:  # strangers' code may raise anything
            return self._ends("failed", f"{raised(error, subject.cls)}; mend it there.", error)

    def _ends(self, state: State, words: str, error: BaseException | None = None) -> Result:
        return Result(self.name, self.asks, state, words, error)


def check(asks: str, *needs: Check) -> Callable[[Callable[[Subject], str]], Check]:
    """Makes a function a `Check` of the same name."""
    return lambda function: Check(function.__name__.replace("_", " "), asks, function, needs)

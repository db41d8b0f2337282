"""A check of a router: the promise, the checks that have to pass first, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from unittest import SkipTest

from buddy.testing.subject import Subject, describe, seeded

State = Literal["passed", "failed", "skipped", "blocked"]


class Failed(AssertionError):
    """The router breaks a promise; the message is a sentence that says what to change."""


class Skipped(Exception):
    """The check does not apply to this router; the message says why."""


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        check: its name.
        promise: what routers promise.
        state: "skipped" where the check does not apply to the router, "blocked" where a check that it needs failed.
        message: what was measured, or for "failed" what to change.
        error: the exception, for "failed".
    """

    check: str
    promise: str
    state: State
    message: str
    error: BaseException | None = None

    @property
    def line(self) -> str:
        """Promise and message; for a failure the message alone."""
        return self.message if self.error else f"{self.promise} ({self.message})"


@dataclass(frozen=True)
class Check:
    """One promise of routers. Call it with a `Subject` in a test of your own.

    Attributes:
        name: one or two words.
        promise: a phrase.
        function: raises `Failed`, or returns what it measured.
        needs: checks that have to pass first, so that one fault fails one check.
    """

    name: str
    promise: str
    function: Callable[[Subject], str]
    needs: tuple[Check, ...] = ()

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Subject) -> None:
        """Pass, or raise.

        Raises:
            Failed: the promise is broken.
            SkipTest: the check does not apply, or a check that it needs failed; pytest shows it as skipped.
        """
        result = self.examine(subject)
        if result.state == "failed":
            raise Failed(result.message) from result.error
        if result.state != "passed":
            raise SkipTest(result.message)

    def examine(self, subject: Subject) -> Result:
        """The result, computed once for each subject."""
        if self.name not in subject.results:
            subject.results[self.name] = self._examine(subject)
        result: Result = subject.results[self.name]
        return result

    def _examine(self, subject: Subject) -> Result:
        for need in self.needs:
            if need.examine(subject).state in ("failed", "blocked"):
                return self._result("blocked", f"needs '{need}' to pass first")
        try:
            with seeded(0):  # restores the caller's generators
                return self._result("passed", self.function(subject))
        except Skipped as error:
            return self._result("skipped", str(error))
        except Failed as error:
            return self._result("failed", str(error), error.__cause__ or error)
        except (Exception, SystemExit) as error:  # a router may raise anything
            return self._result("failed", f"{describe(error, subject.cls)}; fix it there.", error)

    def _result(self, state: State, message: str, error: BaseException | None = None) -> Result:
        return Result(self.name, self.promise, state, message, error)


def check(promise: str, *needs: Check) -> Callable[[Callable[[Subject], str]], Check]:
    """Makes a function a `Check` of the same name."""
    return lambda function: Check(function.__name__.replace("_", " "), promise, function, needs)

"""A check of a router: the promise, the checks that have to pass first, and its result; all checks of one router."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import SkipTest

from buddy.backbone.load import Backbone
from buddy.errors import raised
from buddy.router import AnyRouter
from buddy.testing.subject import Subject, seeded

State = Literal["passed", "failed", "skipped", "blocked"]


class Failed(AssertionError):
    """The router breaks a promise; the message is a sentence that says what to change."""


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
        name: one word.
        promise: a phrase.
        function: raises `Failed`, or `SkipTest` where the check does not apply, or returns what it measured.
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
            subject.results[self.name] = Result(self.name, self.promise, *self._examine(subject))
        result: Result = subject.results[self.name]
        return result

    def _examine(self, subject: Subject) -> tuple[State, str] | tuple[State, str, BaseException]:
        for need in self.needs:
            if need.examine(subject).state in ("failed", "blocked"):
                return "blocked", f"needs '{need}' to pass first"
        try:
            with seeded(0):  # restores the caller's generators
                return "passed", self.function(subject)
        except SkipTest as error:
            return "skipped", str(error)
        except Failed as error:
            return "failed", str(error), error.__cause__ or error
        except (Exception, SystemExit) as error:  # a router may raise anything
            return "failed", f"{raised(error, subject.cls)}; fix it there.", error


CHECKS: list[Check] = []  # all, each after those that it needs


def check(promise: str, *needs: Check) -> Callable[[Callable[[Subject], str]], Check]:
    """Makes a function the next of `CHECKS`, under its name."""

    def add(function: Callable[[Subject], str]) -> Check:
        CHECKS.append(Check(function.__name__, promise, function, needs))
        return CHECKS[-1]

    return add


@contextmanager
def explained(subject: Subject, advice: str) -> Iterator[None]:
    """Turns an error of the router into `Failed`: the error, then the advice."""
    try:
        yield
    except Exception as error:  # a router may raise anything
        raise Failed(f"{raised(error, subject.cls)} {advice}") from error


def check_router(
    router: type[AnyRouter] | str,
    *,
    options: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> list[Result]:
    """All checks of one router; all failures are raised together.

    Args:
        router: a class, an installed name, or "my_module:MyRouter".
        options: keyword arguments of the class, as in `router.options` of a recipe.
        backbone: a model in float32 with no router attached; by default a tiny random one.

    Raises:
        Failed: an AssertionError with a sentence for each check that failed, which says what to change.
        RegistryError: no such router, or its options do not fit.
    """
    subject = Subject(router, options, backbone)
    results = [check.examine(subject) for check in CHECKS]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        lines = "".join(f"\n- {result.check}: {result.message}" for result in failed)
        raise Failed(f"{subject.name} fails {len(failed)} of {len(CHECKS)} checks:{lines}") from failed[0].error
    return results

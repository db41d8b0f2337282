"""What routers promise, as checks: for `buddy routers check`, and for the tests of whoever writes a router.

    from buddy.testing import check_router

    def test_my_router():
        check_router(MyRouter, options={"hidden": 8})

or, one test for each check, where a check that does not apply shows as skipped:

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    def test_my_router(check, subject):  # a fixture of scope "module" that gives Subject(MyRouter)
        check(subject)
"""

from collections.abc import Mapping
from typing import Any

from buddy.backbone.load import Backbone
from buddy.router import AnyRouter
from buddy.testing import answers, engine, state
from buddy.testing.check import Check, Failed, Result
from buddy.testing.subject import Subject, tiny_backbone

__all__ = ["CHECKS", "Check", "Failed", "Result", "Subject", "check_router", "tiny_backbone"]

CHECKS: tuple[Check, ...] = (
    answers.description,
    answers.calibration,
    answers.shape,
    answers.dtype,
    answers.budgets,
    answers.finite,
    answers.context,
    answers.repeatable,
    answers.mixed,
    answers.stable,
    answers.causal,
    answers.rows,
    answers.alone,
    answers.kind,
    state.seed,
    state.seeded,
    state.saved,
    state.geometry,
    engine.device,
    engine.bfloat16,
    engine.counts,
    engine.decoding,
    engine.speed,
    state.groups,
    state.weights,
    state.gradients,
)


def check_router(
    router: type[AnyRouter] | str,
    *,
    options: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> list[Result]:
    """All checks of one router; what failed is raised together.

    Args:
        router: a class, an installed name, or "my_module:MyRouter".
        options: keyword arguments of the class, as in `router.options` of a recipe.
        backbone: a model in float32 that nobody else routes; by default a tiny random one.

    Raises:
        Failed: an AssertionError with a sentence for each check that failed, which says what to change.
        RegistryError: no such router, or its options do not fit.
    """
    subject = Subject(router, options, backbone)
    results = [check.examine(subject) for check in CHECKS]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        lines = "".join(f"\n- {result.check}: {result.words}" for result in failed)
        raise Failed(f"{subject.name} fails {len(failed)} of {len(CHECKS)} checks:{lines}") from failed[0].error
    return results

"""Conformance checks for routers: for `buddy routers check`, and for the tests of router packages.

    from buddy.testing import check_router

    def test_my_router():
        check_router(MyRouter, options={"hidden": 8})

or, one test for each check, where a check that does not apply shows as skipped:

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    def test_my_router(check, subject):  # a fixture of scope "module" that returns Subject(MyRouter)
        check(subject)
"""

from buddy.testing import behaviour, outputs  # noqa: F401  # they fill CHECKS
from buddy.testing.check import CHECKS, Check, Failed, Result, check_router
from buddy.testing.subject import Subject, tiny_backbone

__all__ = ["CHECKS", "Check", "Failed", "Result", "Subject", "check_router", "tiny_backbone"]

"""What the tests of the engine share."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def small_selections():
    """Tests have few tokens, where the engine would select none: it computes a layer whole if few skip it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buddy.engine.selection.MIN_SKIPPED", 2)
        yield

import pytest


@pytest.fixture(scope="module")
def no_pictures(finished):
    """Fits draw none, once the runs are there that all tests share: others look at pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buddy.fit.draw_run", lambda *_: None)
        yield

"""A finished run with a budget predictor of each kind."""

import pytest

from buddy.compare import fit


@pytest.fixture(scope="session")
def predicting(small, tmp_path_factory):
    """The folders of two runs of a static router, by the name of their predictor; read them, never write into them."""
    folders = {}
    for name in ("regress", "grpo"):
        output = tmp_path_factory.mktemp(name)
        options = ["predictor.windows=10", "predictor.steps=20", "predictor.lr=1e-3", "predictor.epsilon=0.3"]
        fit(small(output, "router=shortgpt", f"predictor.name={name}", *options), "small")
        folders[name] = output / "small" / "shortgpt" / "seed-0"
    return folders

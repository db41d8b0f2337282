"""The run that is damaged, copied and planted in."""

from pathlib import Path

import pytest

from buddy.compare import fit

TRAINED = ["rivals=[]", "router.options.prior=none", "trainer.max_steps=6", "checkpoint_every=2"]


@pytest.fixture(scope="session")
def run(small, tmp_path_factory) -> Path:
    """A complete run of a trained router, fitted with the overrides `TRAINED`; read it, never write into it."""
    output = tmp_path_factory.mktemp("run")
    fit(small(output, *TRAINED), "small")
    return output / "small" / "buddy" / "seed-0"

"""A smaller set of the fuzzed uses of the engine; `python -m tests.engine.fuzz` runs as many as asked."""

import pytest

from tests.engine.fuzz import TOLERANCE, draw, worst


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_random_uses_agree_with_brute_force(block):
    for seed in range(16 * block, 16 * block + 16):
        assert worst(draw(seed)) <= TOLERANCE, f"python -m tests.engine.fuzz --first {seed} --cases 1"

"""A failed allocation ends in a sentence, anything else is left alone."""

import pytest
import torch

from buddy.errors import RunError
from buddy.io import within_memory


def test_the_cpus_allocator():
    with (
        pytest.raises(RunError, match="does not suffice for 2 petabytes; ask for less"),
        within_memory("2 petabytes", "ask for less"),
    ):
        torch.empty(2**51, dtype=torch.uint8)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError()])
def test_what_others_raise(error):
    with pytest.raises(RunError, match="does not suffice for it"), within_memory("it", "ask for less"):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), within_memory("it", "ask for less"):
        raise RuntimeError("shapes differ")

"""Running out of memory, as a sentence with the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from buddy.errors import RunError


@contextmanager
def within_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into a `RunError`; torch says it in three ways.

    Args:
        what: the sizes that did not fit, as in "a batch of 8 × 512 tokens".
        advice: what to do next.

    Raises:
        RunError: memory did not suffice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(f"Memory does not suffice for {what}; {advice}.") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # the CPU's allocator has no exception of its own
            raise
        raise RunError(f"Memory does not suffice for {what}; {advice}.") from error

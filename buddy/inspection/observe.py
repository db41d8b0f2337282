"""Text → the plans that really ran for its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from buddy.engine.model import Output, RoutedLM
from buddy.inspection.domains import Domain
from buddy.inspection.routing import Routing

Track = Callable[[Sequence[Any]], Iterable[Any]]


@torch.no_grad()
def observe(
    routed: RoutedLM, domains: Sequence[Domain], counts: Iterable[int], *, batch_size: int = 4, track: Track = iter
) -> dict[tuple[str, int], Routing]:
    """What ran, by domain label and executed layers K.

    Args:
        routed: model and router.
        domains: the texts.
        counts: the K's to run at.
        batch_size: windows a forward.
        track: wraps the list of forwards to show progress.
    """
    jobs = [
        (domain, count, rows)
        for domain in domains
        for rows in torch.arange(len(domain.windows)).split(batch_size)
        for count in dict.fromkeys(counts)
    ]
    found: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for domain, count, rows in track(jobs):
        ids = domain.windows.input_ids[rows].to(routed.backbone.device)
        output = routed(ids, executed=torch.full((len(ids),), count), prompt=domain.prompt, logits_to_keep=1)
        found[domain.label, count].append(_ran(output, routed.sink_tokens))
    return {key: Routing(np.concatenate(parts), routed.sink_tokens) for key, parts in found.items()}


def _ran(output: Output, sinks: int) -> np.ndarray:
    """(B, T, L) bool, the plans; by the layers' own records each token ran as many layers as its plan has."""
    if not torch.equal(output.runs.sum(-1), output.executed):
        raise RuntimeError("The layers that ran are not those of the plan.")
    if not bool(output.sinks[:, :sinks].all()) or bool(output.sinks[:, sinks:].any()):
        raise RuntimeError(f"The tokens at full depth are not the first {sinks}.")
    return output.runs.cpu().numpy()

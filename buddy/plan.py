"""Scores → a plan of exactly K executed layers, or of K in the mean over tokens: the only place where K is enforced.

Each rule has a tensor form and, for one new token or one layer, the form that is quick enough for decoding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.errors import BudgetError

CHUNK = 512  # tokens whose competition is sorted at once: 50 MB for 64 tokens of 30 layers
# Each layer run beyond the budget lowers the number of scores selected among W tokens by this many, so that after about
# W / 4 tokens the mean is back at the budget.
FEEDBACK_GAIN = 4


def top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Exactly k of R layers for each score vector; ties go to the lower layer index.

    Args:
        scores: (..., R), larger = more worth running. Must be finite.
        k: (...) long, broadcast against the leading dimensions of `scores`, 0 ≤ k ≤ R.

    Returns:
        (..., R) bool with exactly k true in the last dimension.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return rank < k.unsqueeze(-1)


def counts_over(
    scores: Tensor, k: Tensor, over: int, before: Tensor | None = None, excess: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many layers each token runs where W tokens run k layers in the mean, and each as many as its scores win.

    The scores of a token compete with those of the W − 1 tokens before it. If n of these W tokens are there, the token
    runs those of its layers whose scores are among the best k · n, less `FEEDBACK_GAIN` for each layer that all tokens
    so far ran beyond k a token: so the mean stays near k whatever the scores do. Nothing depends on later tokens. Ties
    go to the lower layer, then to the earlier token, so that each token runs exactly k layers where all have the same
    scores.

    Args:
        scores: (B, T, R); −inf in all layers of a token that does not take part, such as padding.
        k: (B, T) long, 0 ≤ k ≤ R.
        over: W ≥ 1.
        before: (B, P, R), scores of the last P < W tokens before these; none by default.
        excess: (B,) long, layers that the tokens before these ran beyond k a token; none by default.

    Returns:
        The counts, (B, T) long; and the excess after these tokens, (B,) long.
    """
    earlier = 0 if before is None else before.shape[1]
    over = min(over, earlier + scores.shape[1])
    every = scores if before is None else torch.cat([before, scores], 1)
    every = F.pad(every, (0, 0, over - 1 - earlier, 0), value=-math.inf)
    excess = torch.zeros_like(k[:, 0]) if excess is None else excess
    counts = []
    for start in range(0, scores.shape[1], CHUNK):
        length = min(CHUNK, scores.shape[1] - start)
        windows = every[:, start : start + length + over - 1].unfold(1, over, 1)  # (B, T', R, W)
        present = windows[..., 0, :].isfinite().sum(-1)
        ranked = F.pad(windows.flatten(2).sort(-1, descending=True).values, (1, 0), value=math.inf)
        for at in range(length):
            asked, own, window = k[:, start + at], scores[:, start + at], windows[:, at]
            places = asked * present[:, at] - present[:, at].clamp(max=FEEDBACK_GAIN) * excess
            wins = places.clamp(min=0).minimum(present[:, at] * scores.shape[2])
            last = ranked[:, at].gather(1, wins[:, None])
            # Scores equal to the last one that wins: as many as there is room for, in the order of layers.
            room = wins - (window > last[..., None]).sum((1, 2))
            equal = (window == last[..., None]).sum(-1).cumsum(-1)
            count = ((own > last) | ((own == last) & (equal <= room[:, None]))).sum(-1)
            excess = excess + (count - asked) * own[:, 0].isfinite()
            counts.append(count)
    return torch.stack(counts, 1), excess


def _top_k_on_host(scores: Sequence[float], k: int) -> list[bool]:
    """`top_k` of one score vector in plain Python: for the few scores of one token that is quicker than tensors."""
    runs = [False] * len(scores)
    for index in sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:k]:  # stable, so ties by index
        runs[index] = True
    return runs


def gate_order(open_gates: Tensor) -> Tensor:
    """Scores whose top k are the layers that `clamp_gate` would run, one layer after the other.

    Open gates come first, the earlier before the later; then closed ones, the later before the earlier.

    Args:
        open_gates: (..., R) bool.

    Returns:
        (..., R) float32; those of open gates are at least R, those of closed ones below it.
    """
    routable = open_gates.shape[-1]
    index = torch.arange(routable, dtype=torch.float32, device=open_gates.device)
    return torch.where(open_gates, 2 * routable - index, index)


def clamp_gate(open_gate: Tensor, remaining: Tensor, layers_left: int) -> Tensor:
    """Whether one layer runs when gates are asked one layer after the other and held to exactly k layers.

    A layer runs where its gate is open until k layers are spent, and whatever its gate says once all layers that are
    left must run to reach k.

    Args:
        open_gate: (...) bool, the gate of this layer.
        remaining: (...) long, how many routable layers each token has still to run.
        layers_left: routable layers from this one on.
    """
    return (open_gate & (remaining > 0)) | (remaining == layers_left)


@dataclass(frozen=True)
class Plan:
    """Which layers run for which token.

    Attributes:
        runs: (..., L) bool over all layers of the backbone, always-on layers included.
    """

    runs: Tensor

    @classmethod
    def from_scores(cls, scores: Tensor, executed: Tensor, layers: int) -> "Plan":
        """The plan that runs exactly `executed` layers: the first L − R − 1, the last, and the best-scored between.

        Args:
            scores: (..., R).
            executed: (...) long, broadcast against the leading dimensions; K with always-on layers included.
            layers: L.

        Raises:
            BudgetError: K is below the always-on layers or above L.
        """
        routable = scores.shape[-1]
        first = layers - routable - 1
        k = executed - (first + 1)
        if bool(((k < 0) | (k > routable)).any()):
            check_counts(sorted(set(executed.flatten().tolist())), first + 1, layers)
        runs = torch.ones(*scores.shape[:-1], layers, dtype=torch.bool, device=scores.device)
        runs[..., first : first + routable] = top_k(scores, k)
        return cls(runs)

    @property
    def executed(self) -> Tensor:
        """(...) long, the number of layers that run."""
        return self.runs.sum(-1)


def check_counts(executed: Sequence[int], always_on: int, layers: int) -> None:
    """Raises BudgetError where a K is below the always-on layers or above L."""
    if min(executed) < always_on or max(executed) > layers:
        raise BudgetError(f"A plan runs from {always_on} to {layers} layers; {list(executed)} were asked for.")


def plan_rows_on_host(scores: Sequence[Sequence[float]], executed: Sequence[int], layers: int) -> list[list[bool]]:
    """`Plan.from_scores` for one new token of each row, in plain Python.

    Args:
        scores: B lists of R.
        executed: K of each row, or one for all.
        layers: L.

    Returns:
        L lists of B: by layer, whether each row runs it.

    Raises:
        BudgetError: as `Plan.from_scores`.
    """
    first = layers - len(scores[0]) - 1
    check_counts(executed, first + 1, layers)
    each = executed if len(executed) > 1 else [executed[0]] * len(scores)
    chosen = [_top_k_on_host(row, count - first - 1) for row, count in zip(scores, each, strict=True)]
    always = [True] * len(scores)
    return [always] * first + [list(layer) for layer in zip(*chosen, strict=True)] + [always]


def deciding_tokens(
    length: int, first: int, every: int | None, shared: int = 0, device: torch.device | None = None
) -> Tensor:
    """(T,) long: for each of `length` tokens the index of the token whose decision it follows.

    Args:
        first: index of the prompt's last token among them; negative where it precedes them, and so may the results be.
        every: after the prompt every `every`-th token decides; None: none does.
        shared: so many tokens at the start follow the last of them.
    """
    since = torch.arange(length, device=device) - first  # tokens since the last one of the prompt
    at = first + torch.where(since > 0, since - (since % every if every else since), since)
    at[:shared] = at[shared - 1].clone() if shared else 0
    return at


def hold_scores(scores: Tensor, first: int, every: int | None, shared: int = 0, before: Tensor | None = None) -> Tensor:
    """Scores (B, T, R) with those of each token replaced by those of the token whose decision it follows.

    Args:
        first, every, shared: see `deciding_tokens`.
        before: (B, 1, R), the scores that hold from before these tokens.
    """
    if every == 1 and not shared:
        return scores
    at = deciding_tokens(scores.shape[1], first, every, shared, scores.device)
    held = scores[:, at.clamp(min=0)]
    return held if before is None else torch.where((at < 0)[None, :, None], before, held)

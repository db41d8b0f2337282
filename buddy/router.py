"""The interface of routers: a `Context` in, scores out.

Every router, static, random or learned, answers one question: how much is each routable layer worth here? The engine
alone turns the scores into a plan of exactly K layers, or of K in the mean over tokens (`mean_over` of `RoutedLM`). A
`LayerwiseRouter` answers it layer by layer from the hidden state that arrives at each; the engine enforces exactly K
layers there too, or lets the gates decide alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from buddy.errors import BuddyError, BudgetError

Criterion = Literal["ce", "kl"]  # next-token cross-entropy, or KL to the dense model


@dataclass(frozen=True)
class Geometry:
    """The sizes of a backbone that a router needs to know.

    Layers 0 … context_layer − 1 and the last one always run; the R = layers − context_layer − 1 layers between are
    routable, and score i belongs to layer `context_layer + i`.
    """

    layers: int
    context_layer: int
    hidden: int
    features: int

    def __post_init__(self) -> None:
        if self.layers < 3:
            raise BudgetError(f"A backbone of {self.layers} layers has none to skip; take one of 3 layers or more.")
        if not 1 <= self.context_layer <= self.layers - 2:
            raise BudgetError(
                f"context_layer is {self.context_layer}, but a backbone of {self.layers} layers routes only with a "
                f"context_layer from 1 to {self.layers - 2}; choose one of those."
            )

    @property
    def routable(self) -> int:
        """R, the number of layers that a plan may skip."""
        return self.layers - self.context_layer - 1

    @property
    def always_on(self) -> int:
        """Layers that every token runs: the context layers and the last one."""
        return self.context_layer + 1


@dataclass(frozen=True)
class Context:
    """All that a router may look at when it plans for a token. Nothing in it comes from a later position.

    Leading dimensions are free: (B, T) in a forward, T = 1 in a decode step; (B,) for one token of each prompt.

    Attributes:
        pooled: (..., F) float32, mean over the positions so far of the context layer's cached states.
        newest: (..., F) float32, those states of the newest token only.
        hidden: (..., D) float32, the newest token's hidden state as it leaves the context layer.
        executed: (...) long, the requested number of executed layers K, including always-on layers.
        tokens: (...) long, the newest token's id; None where the model was given embeddings.
    """

    pooled: Tensor
    newest: Tensor
    hidden: Tensor
    executed: Tensor
    tokens: Tensor | None = None

    def __getitem__(self, index: Any) -> Context:
        """The context of some tokens, selected by the leading dimensions."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Context(**{name: part if part is None else part[index] for name, part in parts.items()})  # type: ignore[arg-type]


class Probe(Protocol):
    """Measurements of the frozen model on N calibration windows of W tokens, for `AnyRouter.calibrate`.

    All routers of a recipe share one probe. It measures nothing twice, and keeps what it measured on disk, so that a
    search that was interrupted resumes when it asks the same questions again.

    Attributes:
        geometry: sizes of the model.
        layer_counts: each K below full depth of the recipe's budgets, deepest first.
        seed: the recipe's seed, for searches with randomness.
        count: N, the number of windows.
        bridge_windows: how many of them, from the last one, `losses(…, bridged=True)` fits bridges on: 24, or three
            quarters of fewer than 32; 0 where the recipe has no bridges.
        prompt: tokens of a window that count as its prompt.
        windows: (N, W) long, the token ids.
        model: the frozen transformers model, for a measure of your own, which is not kept on disk. Its layers are the
            engine's, which run whole while no budget is set. Remove hooks, and leave the weights as they are.
    """

    geometry: Geometry
    layer_counts: tuple[int, ...]
    seed: int
    count: int
    bridge_windows: int
    prompt: int
    windows: Tensor
    model: nn.Module

    @property
    def block_influence(self) -> Tensor:
        """(R,) float32: 1 − E[cos(h_in, h_out)] over tokens (ShortGPT, 2403.03853, eq. 1), without the sinks."""

    @property
    def angular_distance(self) -> Tensor:
        """(R + 1, R + 1) float32: arccos(cos) / π between states of the windows' last tokens (2403.17887, eq. 6–7).

        Entry [i, j], i < j, is the mean distance between the inputs of routable layers i and j; j = R stands for the
        output of the last routable layer. Other entries are 0.
        """

    @property
    def loss_increase(self) -> Tensor:
        """(R,) float32: rise of the perplexity when one layer is skipped (Shortened LLaMA, 2402.02834, section 3.1)."""

    @property
    def taylor(self) -> Tensor:
        """(R,) float32: Σ |w · ∂L/∂w| over a layer's linear weights (Shortened LLaMA, 2402.02834, section 3.1)."""

    def losses(
        self,
        runs: Tensor,
        criterion: Criterion = "ce",
        windows: int | Sequence[int] | None = None,
        *,
        bridged: bool = False,
        what: str | None = None,
    ) -> Tensor:
        """Mean nats per token of each window under each plan, (P, N') float64.

        Plans share the work up to the first layer where they differ, so one call with many plans is cheaper than many
        calls.

        Args:
            runs: (P, L) bool, a plan in each row for all tokens; sinks run every layer.
            criterion: "ce", next-token cross-entropy, or "kl", KL(dense ‖ plan), over positions 0 … W − 2.
            windows: N', the first so many windows; or the numbers of some windows, ascending; all by default.
            bridged: with a bridge in each skipped layer, fitted for this plan on the last `bridge_windows` windows,
                where the recipe has bridges.
            what: label of the progress bar.

        Raises:
            ValueError: a plan skips a layer that always runs, or an argument is out of range.
        """

    def plan_without(self, removed: Iterable[int]) -> Tensor:
        """(L,) bool, the plan that skips some routable layers, counted from 0 to R − 1."""

    def contexts(self) -> Context:
        """What a router sees at the last token of each window's prompt, leading dimension (N,); K is full depth."""

    def track(self, items: Sequence[Any], words: str) -> Iterator[Any]:
        """Iterate over items with a progress bar labelled `words`, unless one is shown already."""


class AnyRouter(nn.Module, ABC):
    """The common part of `Router` and `LayerwiseRouter`.

    `buddy fit` calibrates every router, and then trains one with parameters that require gradients. All its
    parameters and buffers are saved in `router.safetensors`.

    Class attributes:
        kind: "static" (one order for all inputs), "learned" (depends on the context) or "random".
        source: where the method was published, shown by `buddy routers`.
        full_depth: True for a router that only ever runs every layer.
        seeded: whether another seed of the recipe gives another router, so that a comparison repeats it. By default
            every kind but "static"; a static router whose search draws random numbers sets it to True.
        scope: what a plan of a dynamic router is for. "token": each token has its own, subject to the recipe's routing
            section. "prompt": one plan for an input, from its prompt's last token, shared by the whole prompt and held
            while decoding, whatever the recipe says. An instance may set its own, from an option. Where scores do not
            depend on the token, leave it at "token".
    """

    kind: ClassVar[Literal["static", "learned", "random"]] = "static"
    source: ClassVar[str] = "–"
    full_depth: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    scope: Literal["token", "prompt"] = "token"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__ and "seeded" not in cls.__dict__:
            cls.seeded = cls.kind != "static"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def calibrate(self, probe: Probe) -> None:
        """Measure what the router needs before use; buffers set here are saved with the run."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters to train: dicts of "params" and "scale" (1 by default), a factor on the recipe's learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "scale": 1.0}]

    @property
    def trainable(self) -> bool:
        """Whether any parameter asks for gradients."""
        return any(parameter.requires_grad for parameter in self.parameters())


class Router(AnyRouter):
    """Scores all routable layers at once, before they run.

    A registered router never inherits from another registered one.
    """

    @abstractmethod
    def score(self, context: Context) -> Tensor:
        """Scores (..., R) float32, larger = more worth running; ties break by layer index."""


class LayerwiseRouter(AnyRouter):
    """Decides on each routable layer when the hidden state arrives at it, so after the layers before it have run.

    A layer runs where its gate is open until K layers have run; where all layers that are left are needed to reach K,
    they run regardless of their gates. So every token runs exactly K layers here too, unless the gates decide alone
    (`mean_over` of `RoutedLM`). Decoding synchronises with the host at each layer.

    It is trained by gradients through gates: what a layer adds to the hidden state is multiplied by a weight.
    """

    @abstractmethod
    def gate(self, index: int, hidden: Tensor, executed: Tensor) -> Tensor:
        """Logits (...) float32 of one routable layer; above 0 its gate is open.

        Args:
            index: 0 … R − 1; the layer is `context_layer + index`.
            hidden: (..., D) float32, the state arriving at it, of a token alone.
            executed: (...) long, K.
        """

    def weigh(self, logits: Tensor) -> Tensor:
        """(...) in [0, 1], the factor of what a layer adds, in training; by default the probability of an open gate.

        It may draw noise from torch's generator, which training seeds at each step.
        """
        return logits.sigmoid()

    def penalty(self, weights: Tensor, executed: Tensor) -> Tensor:
        """(B,) what training adds to the objective of each row; nothing by default.

        Args:
            weights: (B, T, R) in [0, 1], those of all routable layers, with gradients.
            executed: (B,) long, K of each row.
        """
        return weights.new_zeros(len(weights))


def scores_of(router: Router, context: Context) -> Tensor:
    """(..., R) float32: a router's scores for contexts (...).

    Raises:
        BuddyError: scores of another shape.
    """
    with in_float32(context.hidden.device):
        scores = router.score(context)
    shape = (*context.executed.shape, router.geometry.routable)
    if scores.shape != shape:
        raise BuddyError(
            f"{type(router).__name__} gives scores of shape {(*scores.shape,)}, not {shape}; correct its score, which "
            "`buddy routers check` tests."
        )
    return scores


def in_float32(device: torch.device) -> AbstractContextManager[Any]:
    """Within this block mixed precision is off: routers compute in float32, since near ties decide plans."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def available_budgets(router: AnyRouter, budgets: Iterable[float]) -> list[float]:
    """The budgets that a router can serve: full depth alone for one that runs every layer, else all of them."""
    return [1.0] if router.full_depth else list(budgets)

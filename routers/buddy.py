"""The Buddy Decision Module: a plan for each token from the context layer's cached states (2606.09514)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Context, Geometry, Probe, Router
from routers.gates import check_least, normalised
from routers.greedy import BridgedRemoval

PRIORS = ("greedy", "block-influence", "taylor", "loss", "none")
PARTS = ("pooled", "newest", "hidden")


class PriorRouter(Router):
    """Learned scores over a static prior: s' = s + ω · p̂ (section 3); a subclass has `learned`, which gives s.

    Args:
        geometry: sizes of the backbone.
        prior, prior_windows, prior_weight, bound: as for `BuddyRouter`.

    Raises:
        ValueError: an unknown prior, or a number out of range.
    """

    kind = "learned"

    def __init__(
        self, geometry: Geometry, prior: str, prior_windows: int, prior_weight: float, bound: float | None
    ) -> None:
        super().__init__(geometry)
        if prior not in PRIORS:
            raise ValueError(f"prior is {prior!r}; choose one of {', '.join(PRIORS)}")
        check_least(1, prior_windows=prior_windows)
        check_least(0, prior_weight=prior_weight)
        if bound is not None and bound <= 0:
            raise ValueError(f"bound is {bound}; give a number above 0, or null for none")
        self.prior_name, self.prior_windows = prior, prior_windows
        self.prior_weight, self.bound = float(prior_weight), bound
        self.register_buffer("prior", torch.zeros(geometry.routable + 1, geometry.routable))  # for each K
        self.register_load_state_dict_pre_hook(_read_one_prior)

    def calibrate(self, probe: Probe) -> None:
        """Measure the prior's indicator and turn it into standardised ranks (section 3, prior pipeline)."""
        if self.prior_name == "none":
            return
        if self.prior_name == "greedy":
            self.prior.copy_(self._searched(probe))
            return
        if self.prior_name == "block-influence":
            indicator = probe.block_influence
        else:
            raw = probe.taylor if self.prior_name == "taylor" else probe.loss_increase
            indicator = raw.clamp(min=0).log1p()
        self.prior.copy_(_standardised(indicator))

    def _searched(self, probe: Probe) -> Tensor:
        """(R + 1, R): the ranks for each K after each round of the search; a K that it does not reach has the last."""
        search = BridgedRemoval(probe, self.prior_windows)
        ranks = torch.zeros_like(self.prior)
        for number in probe.track(range(search.rounds), "removing layers"):
            search.remove_one()
            ranks[: self.geometry.routable - number] = _standardised(search.rank())
        return ranks

    def score(self, context: Context) -> Tensor:
        """(..., R) float32: the learned scores, bounded, plus ω times the prior."""
        scores = self.learned(context)
        if self.bound is not None:
            scores = self.bound * torch.tanh(scores / self.bound)
        return scores + self.prior_weight * self.prior[context.executed - self.geometry.always_on]

    def learned(self, context: Context) -> Tensor:
        """(..., R) float32: s."""
        raise NotImplementedError


class BuddyRouter(PriorRouter):
    """Learned: a small network scores the layers for each token from the states after the context layer.

    Linear(F, hidden) – SiLU – Linear(hidden, R), fused with a static prior: s' = s + ω · p̂ (section 3). The last
    linear layer starts at zero, so training starts from the prior's order.

    Deviations from the paper: the pooled states of the prefix and those of the newest token are separate inputs, each
    normalised, beside the token's hidden state; the network's scores can be bounded, A · tanh(s / A), so that
    training cannot diverge; the default prior is the order of a greedy search.

    Args:
        geometry: sizes of the backbone.
        hidden: r, width of the network; the paper's overhead example has 32.
        prior: "greedy" (for each K the layers in the order in which a search removes them, each time the one without
            which KL to the dense model is least, with bridges where the recipe has them; the others follow by how
            much they would raise it), or one of the paper's, the same for every K:
            "block-influence" (cosine dissimilarity), "taylor", "loss" (rise of the perplexity), or "none".
        prior_windows: how many calibration windows the greedy search measures on, from the first one; with bridges
            at most those that no bridge is fitted on (`Probe.bridge_windows`).
        prior_weight: ω; the prior is standardised over the layers. The paper has 0.1.
        bound: A, or null for none, as in the paper.
        context: which parts the network sees, of "pooled", "newest" and "hidden". None alone is the paper's.
        budget_aware: make K / L an input; in the paper the budget acts through top-k alone.

    Raises:
        ValueError: an unknown prior or part, or a size or weight out of range.
    """

    source = "arXiv 2606.09514"

    def __init__(
        self,
        geometry: Geometry,
        *,
        hidden: int = 128,
        prior: str = "greedy",
        prior_windows: int = 8,
        prior_weight: float = 0.3,
        bound: float | None = 2.0,
        context: Sequence[str] = PARTS,
        budget_aware: bool = False,
    ) -> None:
        super().__init__(geometry, prior, prior_windows, prior_weight, bound)
        if not isinstance(context, list | tuple) or not context or not all(part in PARTS for part in context):
            raise ValueError(f"context is {context!r}; give a list of one or more of {', '.join(PARTS)}")
        if len({*context}) < len(context):
            raise ValueError(f"context is {context!r}; name each part once")
        check_least(1, hidden=hidden)
        sizes = {"pooled": geometry.features, "newest": geometry.features, "hidden": geometry.hidden}
        self.parts, self.budget_aware = tuple(context), budget_aware
        self.input = nn.Linear(sum(sizes[part] for part in self.parts) + int(budget_aware), hidden)
        self.output = nn.Linear(hidden, geometry.routable)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def learned(self, context: Context) -> Tensor:
        """(..., R) float32: the network's scores."""
        seen = [normalised(getattr(context, part)) for part in self.parts]
        if self.budget_aware:
            seen.append((context.executed / self.geometry.layers).float()[..., None])
        return self.output(F.silu(self.input(torch.cat(seen, -1))))

    def parameter_groups(self) -> list[dict]:
        """Step sizes by fan-in: the first layer a quarter, the last bias three times the recipe's learning rate."""
        return [
            {"params": list(self.input.parameters()), "scale": 0.25},
            {"params": [self.output.weight], "scale": 1.0},
            {"params": [self.output.bias], "scale": 3.0},
        ]


def _standardised(indicator: Tensor) -> Tensor:
    """(R,): the ranks of an indicator, with mean 0 and standard deviation 1; zeros for a single layer."""
    rank = (1 + indicator.argsort(stable=True).argsort().float()) / (len(indicator) + 1)
    return (rank - rank.mean()) / rank.std() if len(rank) > 1 else torch.zeros_like(rank)


def _read_one_prior(router: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Routers of before 0.2 have one prior for every K."""
    prior = state.get(f"{prefix}prior")
    if prior is not None and prior.dim() == 1:
        state[f"{prefix}prior"] = prior.expand_as(router.prior)

"""What is checked: a router with its options, on a backbone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from buddy.backbone.load import Backbone
from buddy.calibration.probe import Probe
from buddy.engine.model import PoolKind, RoutedLM, geometry_of
from buddy.errors import BuddyError, RegistryError
from buddy.registry import load, make
from buddy.router import AnyRouter, Router
from buddy.testing.check import Result, raised
from buddy.testing.model import tiny_backbone
from buddy.testing.sight import Sight

ROWS, LENGTH, PROMPT = 3, 12, 5  # of the windows that routers are shown
WINDOWS, WIDTH = 4, 16  # for calibration
FIRST_TOKEN = 3  # those before it may be special


class Subject:
    """A router under examination; every check gets one made anew, so that none sees what another did.

    Args:
        router: a class, an installed name, or "my_module:MyRouter".
        options: keyword arguments of the class, as in `router.options` of a recipe.
        backbone: not routed by anybody else; by default a tiny random model, so that a check takes a fraction of a
            second. In float32: in 16 bits rounding alone changes plans.
        context_layer: as in `routing` of a recipe.
        pool: likewise.

    Attributes:
        geometry: sizes of the backbone.
        results: of the checks so far, by name.

    Raises:
        RegistryError: no such router, or its options do not fit.
    """

    def __init__(
        self,
        router: type[AnyRouter] | str,
        options: Mapping[str, Any] | None = None,
        backbone: Backbone | None = None,
        *,
        context_layer: int = 1,
        pool: PoolKind = "value",
    ) -> None:
        self.cls = load(router) if isinstance(router, str) else router
        self.name = router if isinstance(router, str) else getattr(router, "__name__", repr(router))
        self.options, self.results = dict(options or {}), dict[str, Result]()
        self.pool: PoolKind = pool
        self.backbone = tiny_backbone() if backbone is None else backbone
        self.geometry = geometry_of(self.backbone, context_layer, pool)
        self._probe: Probe | None = None
        self._try()

    @property
    def asked(self) -> str:
        """The method that the engine asks."""
        return "score" if issubclass(self.cls, Router) else "gate"

    @property
    def depths(self) -> list[int]:
        """Each K that may be asked for, from the least."""
        layers = self.geometry.layers
        return [layers] if self.cls.full_depth else [*range(self.geometry.always_on, layers + 1)]

    @property
    def middle(self) -> int:
        """A K between the least and the most."""
        return self.depths[len(self.depths) // 2]

    @cached_property
    def windows(self) -> Tensor:
        """(ROWS, LENGTH) long, random tokens."""
        return self._tokens(ROWS, LENGTH, seed=0)

    def made(self, seed: int = 0) -> AnyRouter:
        """A router as its class makes it, in evaluation mode."""
        with seeded(seed):
            router = make(self.cls, self.name, self.geometry, self.options)
            router.eval()
            return router

    def calibrated(self, seed: int = 0) -> AnyRouter:
        """A router that `buddy fit` with this seed would go on to train."""
        with seeded(seed):
            router = self.made(seed=seed)
            with self.attached(router) as routed:
                probe = self._serving(routed, seed)
                router.calibrate(probe)
                probe.release()
        router.eval()
        return router

    def router(self, seed: int = 0) -> AnyRouter:
        """A calibrated router whose parameters are no longer at their start, as training would leave it."""
        return awake(self.calibrated(seed))

    @contextmanager
    def attached(self, router: AnyRouter, **settings: Any) -> Iterator[RoutedLM]:
        """The backbone with a router on it, and without it afterwards."""
        routed = RoutedLM(self.backbone, router, pool=self.pool, **settings)
        try:
            yield routed
        finally:
            routed.detach()

    @cached_property
    def seen(self) -> Sight:
        """What a router is shown of the windows, (ROWS, LENGTH), at the middle K."""
        return self._sight(self.windows)

    @cached_property
    def unlike(self) -> Sight:
        """What it is shown of others."""
        return self._sight(self._tokens(ROWS, LENGTH, seed=1))

    def elsewhere(self, layers: int, context_layer: int, pool: PoolKind) -> Subject:
        """The same router on a tiny model of other sizes."""
        return Subject(self.cls, self.options, tiny_backbone(layers), context_layer=context_layer, pool=pool)

    @torch.no_grad()
    def _sight(self, windows: Tensor) -> Sight:
        """At full depth no router is asked, so any will do."""
        first, routable = self.geometry.context_layer, self.geometry.routable
        with self.attached(self.made()) as routed:
            context = routed(windows).context
            states = self.backbone.model(windows, output_hidden_states=True, use_cache=False).hidden_states
        arriving = torch.stack(states[first : first + routable]).float()
        return Sight(context, arriving).at(self.middle).copy()

    def _try(self) -> None:
        try:
            self.made()
        except BuddyError:
            raise
        except (Exception, SystemExit) as error:  # strangers' code may raise anything
            raise RegistryError(f"The router {self.name!r} cannot be made: {raised(error, self.cls)}.") from error

    def _serving(self, routed: RoutedLM, seed: int) -> Probe:
        """One probe for all routers: what one measured, the next need not."""
        asked = [self.middle, self.depths[0]]
        if self._probe is None:
            self._probe = Probe(routed, self._tokens(WINDOWS, WIDTH, seed=2))
        self._probe.seed = seed
        self._probe.serve(routed, asked)
        return self._probe

    def _tokens(self, rows: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        words = self.backbone.model.config.vocab_size
        return torch.randint(FIRST_TOKEN, words, (rows, length), generator=generator).to(self.backbone.device)


def awake(router: AnyRouter) -> AnyRouter:
    """The router with noise on its parameters: what starts at nought would make every comparison pass."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter))
    return router


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators seeded as `buddy fit` seeds them, and as they were afterwards."""
    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])

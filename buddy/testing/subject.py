"""What is checked: a router with its options on a tiny model, what it is shown, and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from buddy.backbone.load import Backbone, fingerprint
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import PoolKind, RoutedLM, geometry_of
from buddy.errors import BuddyError, RegistryError
from buddy.registry import load, make
from buddy.router import AnyRouter, Context, Router
from buddy.testing.check import Result, raised

SPECIALS = ["<pad>", "<bos>", "<eos>"]  # ids 0, 1, 2
VOCABULARY = len(SPECIALS) + 256  # then one token for each byte
CONTEXT = 512


def tiny_backbone(layers: int = 8, seed: int = 0) -> Backbone:
    """A frozen float32 Llama of hidden size 64 with random weights; two calls with one seed give the same."""
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = random_model(settings, seed)
    return Backbone("a tiny random model", model, byte_tokenizer(), fingerprint(model))


def random_model(settings: PreTrainedConfig, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A frozen float32 causal LM of a configuration; the state of torch's generator stays as it was.

    Weights are larger than a fresh model's and norms differ from one, so that a skipped layer shows in the logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif parameter.ndim == 2 and "embed" not in name:
                    parameter.mul_(4)
    return model.eval().requires_grad_(False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Any text is its UTF-8 bytes, decoded back exactly; adds no special tokens."""
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)


PARTS = ("pooled", "newest", "hidden", "executed")


@dataclass(frozen=True)
class Sight:
    """What routers see of some tokens, leading dimensions (...).

    Attributes:
        context: for a `Router`.
        arriving: (R, ..., D) float32, the states that arrive at the routable layers, for a `LayerwiseRouter`.
    """

    context: Context
    arriving: Tensor

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.context.executed.shape)

    def __getitem__(self, index: Any) -> Sight:
        """Some of the tokens, picked by the leading dimensions."""
        index = index if isinstance(index, tuple) else (index,)
        parts = (getattr(self.context, name)[index] for name in PARTS)
        return Sight(Context(*parts), self.arriving[(slice(None), *index)])

    def at(self, executed: int | Tensor) -> Sight:
        """The same tokens with another K, one for all or one for each."""
        asked = torch.as_tensor(executed, device=self.context.executed.device).expand(self.leading)
        return replace(self, context=replace(self.context, executed=asked))

    def map(self, change: Callable[[Tensor], Tensor]) -> Sight:
        """`change` made to all floating-point tensors."""
        pooled, newest, hidden = (change(getattr(self.context, name)) for name in PARTS[:3])
        return Sight(Context(pooled, newest, hidden, self.context.executed), change(self.arriving))

    def blend(self, other: Sight, where: Tensor) -> Sight:
        """`other` in the place of the tokens where `where` (...) says so."""
        pairs = [(getattr(self.context, name), getattr(other.context, name)) for name in PARTS[:3]]
        parts = [torch.where(where[..., None], two, one) for one, two in [*pairs, (self.arriving, other.arriving)]]
        pooled, newest, hidden, arriving = parts
        return Sight(Context(pooled, newest, hidden, self.context.executed), arriving)

    def to(self, device: str | torch.device) -> Sight:
        """A copy on a device."""
        moved = self.map(lambda x: x.to(device))
        return replace(moved, context=replace(moved.context, executed=self.context.executed.to(device)))

    def copy(self) -> Sight:
        """Tensors of its own, one beside the other in memory, as the engine's are."""
        copied = self.map(lambda x: x.contiguous().clone())
        return replace(copied, context=replace(copied.context, executed=self.context.executed.contiguous().clone()))


def outputs(router: AnyRouter, sight: Sight) -> list[Any]:
    """What the router gives: its scores alone, or the logits of one gate after the other."""
    if isinstance(router, Router):
        return [router.score(sight.context)]
    executed = sight.context.executed
    return [router.gate(index, hidden, executed) for index, hidden in enumerate(sight.arriving)]


@torch.no_grad()
def answer(router: AnyRouter, sight: Sight) -> Tensor:
    """(..., R): scores, or the logits of all gates beside each other; the router gets copies."""
    given = outputs(router, sight.copy())
    return given[0] if isinstance(router, Router) else torch.stack(given, -1)


def decisions(router: AnyRouter, answers: Tensor) -> Tensor:
    """(..., R): the order of the layers by their scores, or which gates are open."""
    if isinstance(router, Router):
        return answers.argsort(dim=-1, descending=True, stable=True)
    return answers > 0


def alike(one: Tensor, two: Tensor) -> Tensor:
    """(...) bool: tokens whose answers (..., R) differ by no more than rounding.

    Measured by how far the layers' numbers lie apart, so that a large number common to all hides nothing.
    """
    spread = (one - one.mean(-1, keepdim=True)).abs().amax()
    return ((one - two).abs() <= 1e-4 * spread + 1e-5 * one.abs().amax()).all(-1)


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
        self._probe: CalibrationProbe | None = None
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

    def _serving(self, routed: RoutedLM, seed: int) -> CalibrationProbe:
        """One probe for all routers: what one measured, the next need not."""
        asked = [self.middle, self.depths[0]]
        if self._probe is None:
            self._probe = CalibrationProbe(routed, self._tokens(WINDOWS, WIDTH, seed=2))
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

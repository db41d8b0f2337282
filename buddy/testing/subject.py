"""The router that is checked: with its options, on a tiny model, with inputs to score."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from buddy.backbone.load import Backbone, fingerprint
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import PoolKind, RoutedLM, geometry_of
from buddy.errors import BackboneError, BuddyError, RegistryError, raised
from buddy.measurements import Measurements
from buddy.registry import load, make
from buddy.router import AnyRouter, Context, Router

SPECIALS = ["<pad>", "<bos>", "<eos>"]  # ids 0, 1, 2
VOCABULARY = len(SPECIALS) + 256  # then one token for each byte
CONTEXT = 512
FIRST_TOKEN = 3  # lower ids may be special tokens
WINDOWS, WIDTH = 4, 16  # for calibration
ROWS, LENGTH, PROMPT = 3, 12, 5  # of the windows whose contexts routers score


def tiny_backbone(layers: int = 8, seed: int = 0) -> Backbone:
    """A frozen float32 Llama of hidden size 64 with random weights; two calls with one seed give the same."""
    model = random_model(tiny_config(num_hidden_layers=layers), seed)
    return Backbone("a tiny random model", model, byte_tokenizer(), fingerprint(model))


def tiny_config(model_type: str = "llama", **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model for `byte_tokenizer`."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": CONTEXT}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**{**sizes, **heads, **tokens, **changes})
    return config


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


@dataclass(frozen=True)
class Inputs:
    """What routers see of some tokens, leading dimensions (...).

    Attributes:
        context: for a `Router`.
        arriving: (R, ..., D) float32, the hidden states that arrive at the routable layers, for a `LayerwiseRouter`.
    """

    context: Context
    arriving: Tensor

    def __getitem__(self, index: tuple[int | slice, ...]) -> Inputs:
        """Some of the tokens, selected by the leading dimensions."""
        return Inputs(self.context[index], self.arriving[(slice(None), *index)])

    def at(self, executed: int | Tensor) -> Inputs:
        """The same tokens with another K, one for all or one for each."""
        counts = torch.as_tensor(executed, device=self.arriving.device).expand(self.context.executed.shape)
        return replace(self, context=replace(self.context, executed=counts))

    def map(self, change: Callable[..., Tensor], *others: Inputs) -> Inputs:
        """`change` applied to each tensor, and the same tensors of `others`."""
        each = (self, *others)
        parts = {f.name: change(*(getattr(inputs.context, f.name) for inputs in each)) for f in fields(Context)}
        return Inputs(Context(**parts), change(*(inputs.arriving for inputs in each)))

    def vary(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """`change` applied to each floating-point tensor."""
        return self.map(lambda x: change(x) if x.is_floating_point() else x)

    def blend(self, other: Inputs, where: Tensor) -> Inputs:
        """`other`, with its K, in place of the tokens where `where` (...) is true."""
        wide = where[..., None]
        return self.map(lambda x, y: torch.where(wide if x.is_floating_point() else where, y, x), other)

    def to(self, device: torch.device) -> Inputs:
        """A copy in contiguous tensors, as the engine's are, on a device."""
        return self.map(lambda x: x.to(device, copy=True, memory_format=torch.contiguous_format))

    def copy(self) -> Inputs:
        """A copy on the same device."""
        return self.to(self.arriving.device)


def raw_outputs(router: AnyRouter, inputs: Inputs) -> list[Any]:
    """The outputs of the router: its scores, or the logits of each gate."""
    if isinstance(router, Router):
        return [router.score(inputs.context)]
    executed = inputs.context.executed
    return [router.gate(index, hidden, executed) for index, hidden in enumerate(inputs.arriving)]


@torch.no_grad()
def output_of(router: AnyRouter, inputs: Inputs) -> Tensor:
    """(..., R): scores, or the logits of all gates; the router gets copies of the inputs."""
    given = raw_outputs(router, inputs.copy())
    return given[0] if isinstance(router, Router) else torch.stack(given, -1)


class Subject:
    """A router to check. Every check gets a new instance, so that none sees what another did.

    Args:
        router: a class, an installed name, or "my_module:MyRouter".
        options: keyword arguments of the class, as in `router.options` of a recipe.
        backbone: in float32 (in 16 bits rounding alone changes plans), with no router attached; by default a tiny
            random model, so that a check takes a fraction of a second.
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
        self.options, self.results = dict(options or {}), dict[str, Any]()
        self.pool: PoolKind = pool
        self.backbone = tiny_backbone() if backbone is None else backbone
        self.geometry = geometry_of(self.backbone, context_layer, pool)
        if self.geometry.routable < 2:
            raise BackboneError(
                "Routers are checked on a backbone with two or more routable layers; take a deeper one."
            )
        self._measured: Measurements | None = None
        try:
            self.new_router()
        except BuddyError:
            raise
        except (Exception, SystemExit) as error:  # a router may raise anything
            raise RegistryError(f"The router {self.name!r} cannot be made: {raised(error, self.cls)}.") from error

    @property
    def method(self) -> str:
        """The method that the engine calls."""
        return "score" if issubclass(self.cls, Router) else "gate"

    @property
    def depths(self) -> list[int]:
        """Each possible K, ascending."""
        layers = self.geometry.layers
        return [layers] if self.cls.full_depth else [*range(self.geometry.always_on, layers + 1)]

    @property
    def middle(self) -> int:
        """The K in the middle of `depths`."""
        return self.depths[len(self.depths) // 2]

    def new_router(self, seed: int = 0) -> AnyRouter:
        """A new router, not calibrated, in evaluation mode."""
        with seeded(seed):
            router = make(self.cls, self.name, self.geometry, self.options)
        router.eval()
        return router

    def router(self, seed: int = 0) -> AnyRouter:
        """A router calibrated as by `buddy fit` with this seed, with noise on its parameters as after training.

        Without noise, parameters that start at 0 would make every comparison pass.
        """
        router = self.new_router(seed)
        self.calibrate(router, seed)
        router.eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        return router

    def calibrate(self, router: AnyRouter, seed: int = 0) -> None:
        """Calibrate a router as `buddy fit` does with this seed."""
        with seeded(seed), self.attached(router) as routed:
            windows, asked = self._tokens(WINDOWS, WIDTH, seed=2), [self.middle, self.depths[0]]
            probe = CalibrationProbe(routed, windows, 4, layer_counts=asked, seed=seed, measured=self._measured)
            router.calibrate(probe)
            self._measured = probe.measured  # nothing is measured twice

    @contextmanager
    def attached(self, router: AnyRouter) -> Iterator[RoutedLM]:
        """The backbone with a router attached, and detached afterwards."""
        routed = RoutedLM(self.backbone, router, pool=self.pool)
        try:
            yield routed
        finally:
            routed.detach()

    @cached_property
    def windows(self) -> Tensor:
        """(ROWS, LENGTH) long, random tokens."""
        return self._tokens(ROWS, LENGTH, seed=0)

    @cached_property
    def inputs(self) -> Inputs:
        """What a router sees of `windows`, (ROWS, LENGTH), at the middle K."""
        return self._inputs_of(self.windows).at(self.middle)

    @cached_property
    def other_inputs(self) -> Inputs:
        """What a router sees of other windows, each token at another K than the middle one, if there is another."""
        inputs = self._inputs_of(self._tokens(ROWS, LENGTH, seed=1))
        others = torch.tensor([depth for depth in self.depths if depth != self.middle] or self.depths)
        return inputs.at(others[torch.arange(ROWS * LENGTH) % len(others)].reshape(ROWS, LENGTH))

    @torch.no_grad()
    def _inputs_of(self, windows: Tensor) -> Inputs:
        """What routers see of windows (B, T): at full depth, where no router is called."""
        first, routable = self.geometry.context_layer, self.geometry.routable
        with self.attached(self.new_router()) as routed:
            context = routed(windows).context
            states = self.backbone.model(windows, output_hidden_states=True, use_cache=False).hidden_states
        return Inputs(context, torch.stack(states[first : first + routable]).float())

    def _tokens(self, rows: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.backbone.model.config.vocab_size
        return torch.randint(FIRST_TOKEN, vocabulary, (rows, length), generator=generator).to(self.backbone.device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds all generators as `buddy fit` does, and restores them afterwards."""
    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])

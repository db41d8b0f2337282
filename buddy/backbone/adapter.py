"""A LoRA adapter (2106.09685, by peft) on the linear modules of a backbone's layers after the context layers.

A router sees the same context with and without the adapter, so a router with no other input computes the same plans.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone.load import Backbone
from buddy.errors import DamagedError, RunError, TrainingError, did_you_mean, reason
from buddy.io import load_tensors, read_json, save_tensors, write_json, writing

if TYPE_CHECKING:
    from peft import LoraConfig

    from buddy.schema import AdapterSection

CONFIG, WEIGHTS, MADE_FOR = "adapter_config.json", "adapter_model.safetensors", "backbone.json"
FILES = (CONFIG, WEIGHTS, MADE_FOR)
ALL = "all-linear"
NAME = "default"  # peft's name for the only adapter of a model
# Attributes by which a module of peft's, Buddy's or a user's, chooses and scales its adapters.
STATE = ("_disable_adapters", "_active_adapter", "scaling", "merged_adapters")


def adapter_state(module: nn.Module) -> str:
    """Which adapters of peft's a module uses, and how strongly; empty for other modules."""
    own = module.__dict__
    if "_disable_adapters" not in own and "_active_adapter" not in own:
        return ""
    return str([own.get(name) for name in STATE])  # a copy: peft changes these objects in place


def check_targets(targets: Sequence[str], backbone: Backbone) -> list[str]:
    """The module names in `targets`; for "all-linear" those of all linear modules of the decoder layers, in order.

    Raises:
        TrainingError: a name that no linear module of a layer has.
    """
    modules = backbone.layers.named_modules()
    linear = (name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear))
    known = list(dict.fromkeys(linear))
    for name in targets:
        if name not in (ALL, *known):
            hint = did_you_mean(name, known) or "; choose from these, or all-linear."
            raise TrainingError(
                f"adapter.targets holds {name!r}, but the linear modules in a layer of {backbone.name} are "
                f"{', '.join(known)}{hint}"
            )
    return known if ALL in targets else list(targets)


class Adapter:
    """An adapter on a backbone, in place, until `remove` or `merge`; `new` and `load` create it.

    Attributes:
        parts: the trainable modules, by the name of the module that they adapt.
    """

    def __init__(self, backbone: Backbone, config: LoraConfig) -> None:
        from peft import get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config.base_model_name_or_path = None  # peft warns of another name than the model's own
        self._backbone, self._trains = backbone, not config.inference_mode
        with warnings.catch_warnings():  # peft asks transformers by an old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            self._peft, self._is_off = get_peft_model(backbone.model, config, NAME), False
        config.base_model_name_or_path = backbone.name
        self._tuned: list[Any] = []
        self.parts = nn.ModuleDict()
        for name, layer in backbone.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                down, up = layer.lora_A[NAME], layer.lora_B[NAME]
                down.__class__ = up.__class__ = _Factor
                own = {"A": down, "B": up, "dropout": layer.lora_dropout[NAME]}
                self.parts[name.replace(".", "-")] = nn.ModuleDict(own)
                self._tuned.append(layer)
        self.parts.eval()

    @classmethod
    def new(cls, backbone: Backbone, section: AdapterSection, *, first: int, seed: int) -> Adapter:
        """A new adapter without effect: the second factors are zero, the first depend only on the seed.

        Args:
            backbone: without an adapter.
            section: of a recipe; its rank, alpha, dropout and targets are read.
            first: the first adapted layer, the number of context layers.
            seed: of the first factors.

        Raises:
            TrainingError: a name that no linear module of a layer has.
        """
        from peft import LoraConfig

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=check_targets(section.targets, backbone),
            layers_to_transform=list(range(first, backbone.num_layers)),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(backbone, config)

    @classmethod
    def load(cls, backbone: Backbone, folder: Path) -> Adapter:
        """The adapter in a folder, frozen, on a backbone without one.

        Raises:
            RunError: a file is missing or damaged, or belongs to another backbone.
        """
        from peft import LoraConfig

        made = read_json(folder / MADE_FOR)
        if made.get("fingerprint") != backbone.fingerprint:
            raise RunError(
                f"The adapter in {folder} was made for another backbone ({made.get('name')}, fingerprint "
                f"{made.get('fingerprint')}, not {backbone.fingerprint}); load that one, or heal this one with "
                "`buddy fit`."
            )
        if read_json(folder / CONFIG).get("peft_type") != "LORA":
            raise DamagedError(folder / CONFIG, "it does not describe a LoRA adapter")
        tensors = load_tensors(folder / WEIGHTS)
        try:
            adapter = cls(backbone, LoraConfig.from_pretrained(str(folder)))
        except (TypeError, ValueError, KeyError, RuntimeError) as error:  # wrong keys, types or sizes, no such module
            raise DamagedError(folder / CONFIG, reason(error)) from error
        try:
            adapter._load_state(tensors, folder / WEIGHTS)
        except BaseException:
            adapter.remove()
            raise
        return adapter

    @property
    def size(self) -> int:
        """Number of added parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """The factors of all modules."""
        return list(self.parts.parameters())

    def train(self) -> None:
        """Switch to training: dropout, and products in the backbone's dtype; the factors stay in float32.

        By default peft casts the inputs of every module to float32, which takes as long as the module itself.
        """
        self.parts.train()
        self._in_float32(False)

    def freeze(self) -> None:
        """End training: no gradients, no dropout, products in float32; on the backbone's device."""
        self._trains = False
        self._in_float32(True)
        self.parts.to(self._backbone.device).eval().requires_grad_(False)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this block the adapter is disabled."""
        if self._is_off:
            yield
            return
        self._is_off = True
        for layer in self._tuned:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            self._is_off = False
            for layer in self._tuned:
                layer.enable_adapters(True)
            if not self._trains:  # peft makes enabled adapters trainable
                self.parts.requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write it in peft's format, as for `PeftModel.from_pretrained`, with the backbone's fingerprint."""
        with writing(folder):
            folder.mkdir(exist_ok=True)
        config = {**self._peft.peft_config[NAME].to_dict(), "inference_mode": True}
        write_json(folder / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()})
        write_json(folder / MADE_FOR, {"name": self._backbone.name, "fingerprint": self._backbone.fingerprint})
        save_tensors(folder / WEIGHTS, self._state())

    def remove(self) -> None:
        """Restore the stock modules."""
        self._peft.unload()

    def merge(self) -> None:
        """Add it to the weights permanently: the same function up to rounding, at the stock model's cost.

        Raises:
            RunError: a weight is not finite.
        """
        try:
            self._peft.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise RunError("The adapter has weights that are not finite; heal the run again.") from error

    def _in_float32(self, yes: bool) -> None:
        for layer in self._tuned:
            layer.cast_input_dtype_enabled = yes

    def _state(self) -> dict[str, Tensor]:
        """The factors under their names in a file; they share memory with the adapter."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self._peft, adapter_name=NAME, save_embedding_layers=False)

    @torch.no_grad()
    def _load_state(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        state = self._state()
        wrong = {*state} ^ {*tensors} | {k for k in {*state} & {*tensors} if state[k].shape != tensors[k].shape}
        if wrong:
            raise DamagedError(path, f"it differs from its configuration in {', '.join(sorted(wrong)[:3])}")
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


class _Factor(nn.Linear):
    """A factor that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

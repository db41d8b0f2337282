"""Load, freeze and describe a causal language model: the backbone whose layers a router may skip.

A backbone is named by `smollm2-135m` (the embedded SmolLM2-135M-Instruct, no network), by a local folder in the hub's
layout (config.json, safetensors, tokenizer) or by a name on the hub. Its architecture is read from the configuration
and refused, before any weight is loaded, unless `FAMILIES` lists it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from buddy.backbone import embedded
from buddy.errors import BackboneError, nearest, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Family(NamedTuple):
    """A family of models that can be routed.

    Attributes:
        causal_lm: name of its causal-LM class in transformers.
        attention: the implementation of attention that computes it exactly.
    """

    causal_lm: str
    attention: str = "sdpa"


# By `model_type`. What they share: an inner `model.layers` of plain residual layers, each with a `self_attn` whose keys
# and values are the layer's only state between tokens. A new family is a line here and one in `tests/tiny.py`.
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", attention="eager"),  # sdpa cannot cap attention scores
    "gemma3_text": Family("Gemma3ForCausalLM"),
    "phi3": Family("Phi3ForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
}
CHOICES = f"a folder in the hub's layout, owner/name on the hub, or {embedded.NAME!r}"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_LAYERS = 3  # a context layer, a last layer, and one between that may be skipped
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
SIGNS = 1024  # weights of each parameter whose signs enter the fingerprint


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen causal language model in evaluation mode, its tokenizer, and the sizes others need.

    Attributes:
        name: the recipe's name of it, saved in runs; "smollm2-135m" for the embedded model.
        model: the transformers model; no parameter requires a gradient.
        tokenizer: always has a padding token; where a model has none of its own it is the end token, so padding needs
            an attention mask.
        fingerprint: 16 hexadecimal digits, equal for the same weights in any dtype; see `fingerprint`.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def title(self) -> str:
        """What the model is called in texts and tables: the name, or the embedded model's full name."""
        return title_of(self.name)

    @property
    def base(self) -> PreTrainedModel:
        """The inner decoder: embeddings, layers and the last norm, without the next-token head."""
        return self.model.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.base.layers

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden state."""
        return self.model.config.hidden_size

    @property
    def kv_size(self) -> int:
        """Width of one layer's keys (or values) for one token: key/value heads × head size."""
        return self.model.config.num_key_value_heads * self.layers[0].self_attn.head_dim

    @property
    def context_length(self) -> int:
        """Positions that the model was made for, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.model.dtype


def title_of(name: str) -> str:
    """What a backbone is called in texts and tables: `name`, or the embedded model's full name."""
    return embedded.TITLE if name in embedded.NAMES else name


def load_backbone(
    name: str, dtype: str = "bfloat16", *, revision: str | None = None, trust_remote_code: bool = False
) -> Backbone:
    """Load a frozen backbone onto the CPU; weights come from safetensors only, never from pickle files.

    Args:
        name: `smollm2-135m` or `smollm2-135m-instruct`, a local folder in the hub's layout, or a hub name, for which
            HF_HUB_OFFLINE is honoured.
        dtype: float32, bfloat16 or float16.
        revision: a branch, tag or commit; for hub names only.
        trust_remote_code: let a repository's own Python make its tokenizer; the model is always transformers' own.

    Raises:
        BackboneError: the model cannot be found, is damaged or incomplete, or cannot be routed; unknown dtype.
    """
    if dtype not in DTYPES:
        hint = nearest(dtype, DTYPES) or f"; choose one of {', '.join(DTYPES)}."
        raise BackboneError(f"The backbone's dtype is {dtype!r}, which is not known{hint}")
    source = locate(name, revision)
    revision = revision or "main"
    with embedded.quiet_transformers():
        config = read_config(name, source, revision)
        check_routable(name, config)
        attention = FAMILIES[config["model_type"]].attention
        model = _load_model(name, source, revision=revision, dtype=DTYPES[dtype], attn_implementation=attention)
        tokenizer = _load_tokenizer(name, source, revision=revision, trust_remote_code=trust_remote_code)
    return Backbone(embedded.NAME if name in embedded.NAMES else name, model, tokenizer, fingerprint(model))


def check_routable(name: str, config: dict) -> None:
    """Refuse, by name, a model whose configuration (the content of config.json) says that it cannot be routed.

    Raises:
        BackboneError: the architecture is not in `FAMILIES`, has no next-token head, reads later tokens, or is too
            shallow to skip a layer.
    """
    kind = str(config.get("model_type"))
    architectures = config.get("architectures") or []
    called = " or ".join(map(str, architectures)) or f"of the kind {kind}"
    if kind not in FAMILIES:
        raise BackboneError(f"{name!r} is {called}, which Buddy cannot route; choose one of {', '.join(FAMILIES)}.")
    if architectures and FAMILIES[kind].causal_lm not in architectures:
        raise BackboneError(f"{name!r} is {called}, which predicts no next token; choose a {FAMILIES[kind].causal_lm}.")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise BackboneError(f"{name!r} is {called} that attends to later tokens; choose a causal model.")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers < MIN_LAYERS:
        raise BackboneError(f"{name!r} has {layers} layers; choose a model of at least {MIN_LAYERS} layers.")


def fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell one backbone's weights from another's, whatever dtype they were loaded in.

    Hashes the sizes and the signs of weights sampled evenly from every parameter: rounding to another
    floating-point type never turns a sign (zero keeps its own), while values do change.
    """
    digest = hashlib.sha256(repr([getattr(model.config, key, None) for key in ("model_type", *SIZES)]).encode())
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SIGNS)]
        digest.update(torch.signbit(sample).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def locate(name: str, revision: str | None = None) -> str:
    """The folder, or the hub's name, that `name` stands for.

    Raises:
        BackboneError: it can be neither, the folder cannot be a model, or something local is given a revision.
    """
    folder = Path(os.path.expanduser(name))  # os.path, unlike Path, answers for any text: "~nobody", 300 letters
    if name in embedded.NAMES:
        folder = embedded.smollm2_folder()
    elif not name.strip():
        raise BackboneError(f"The backbone's name is empty; give {CHOICES}.")
    elif os.path.isdir(folder):
        _check_folder(name, folder)
    elif os.path.exists(folder):
        raise BackboneError(f"{name!r} is a file; name the folder that holds config.json and the weights.")
    elif name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise BackboneError(f"There is no folder {name!r}; check the path, or give {CHOICES}.")
    elif "/" not in name:  # none of the hub's models that can be routed has a name without an owner
        raise BackboneError(f"No model is named {name!r}{nearest(name, embedded.NAMES) or f'; give {CHOICES}.'}")
    else:
        return name
    if revision is not None:
        raise BackboneError(f"{name!r} is not on the hub and has no revisions; leave out revision {revision!r}.")
    return str(folder)


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that cannot be a model before transformers looks for it elsewhere."""
    if not (folder / "config.json").is_file():
        raise BackboneError(f"The folder {name!r} has no config.json; name a folder made by save_pretrained.")
    if not list(folder.glob("*.safetensors")):
        raise BackboneError(f"The folder {name!r} has no weights in safetensors format; save them there as such.")


def read_config(name: str, source: str, revision: str = "main") -> dict:
    """The content of config.json in a source of `locate`, read without running or importing any model's code."""
    from huggingface_hub.constants import is_offline_mode
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not isinstance(config, dict):
            raise ValueError("config.json holds no mapping")
        return config
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        if os.path.isdir(source):
            raise _damaged(repr(name), error) from error
        why = "HF_HUB_OFFLINE is set and the hub's cache lacks it" if is_offline_mode() else reason(error)
        raise BackboneError(f"No model {name!r} was found ({why}); check the name, or give {CHOICES}.") from error


def _load_model(name: str, source: str, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    # Without this, a hub model that has only pickle files makes transformers ask a public service to convert it.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    how = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **how, **options)
    except Exception as error:  # impossible sizes and cut files show as a dozen kinds of error, all the user's
        raise _damaged(repr(name), error) from error
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if absent:  # transformers would leave them random
        trouble = f"The weights of {name!r} lack {min(absent)} in the size that config.json gives"
        raise BackboneError(f"{trouble}; download the model again.")
    return model.eval().requires_grad_(False)


def _load_tokenizer(name: str, source: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise _damaged(f"The tokenizer of {name!r}", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _damaged(what: str, error: Exception) -> BackboneError:
    return BackboneError(f"{what} cannot be loaded ({reason(error)}); correct that, or download the model again.")

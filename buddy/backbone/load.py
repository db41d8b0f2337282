"""Load, freeze and describe a causal language model: the backbone whose layers a router may skip.

The name of a backbone is that of an embedded model (`smollm2-135m`, `gemma3-270m`; no network), a local folder in the
hub's layout (config.json, safetensors, tokenizer) or a name on the hub. `FAMILIES` lists the supported architectures;
others are refused before any weight is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from buddy import distributed
from buddy.backbone import embedded
from buddy.errors import BackboneError, did_you_mean, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# `model_type` → an implementation of attention that is exact for it. All have an inner `model.layers` of plain residual
# layers, each with a `self_attn` whose keys and values are the layer's only state between tokens. A new family is a
# line here and one in `tests/tiny.py`.
FAMILIES = {
    "llama": "sdpa",
    "qwen2": "sdpa",
    "qwen3": "sdpa",
    "mistral": "sdpa",
    "gemma2": "eager",  # sdpa cannot cap attention scores
    "gemma3_text": "sdpa",
    "phi3": "sdpa",
    "smollm3": "sdpa",
}
CHOICES = f"a folder in the hub's layout, owner/name on the hub, {' or '.join(repr(m.name) for m in embedded.MODELS)}"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NATIVE_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # as torch.cpu.get_capabilities names them; the last one on ARM
MIN_LAYERS = 3  # a context layer, a routable layer and the last layer
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
SAMPLE = 1024  # values of each parameter that digests look at


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen causal language model in evaluation mode, its tokenizer, and its sizes.

    Attributes:
        name: its name in recipes and runs; the short name of an embedded model.
        model: the transformers model; no parameter requires a gradient.
        tokenizer: always has a padding token, by default the end token, so padding needs an attention mask.
        fingerprint: 16 hexadecimal digits, equal for the same weights in any dtype; see `fingerprint`.
        details: 16 hexadecimal digits of the configuration and of more weights than `fingerprint` reads (see
            `details`); empty where it is not known.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    details: str = ""

    @property
    def base(self) -> PreTrainedModel:
        """The inner decoder: embeddings, layers and the last norm, without the next-token head."""
        return self.model.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.base.layers

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of every layer (FSDP2), so that all must call the same layers."""
        return hasattr(self.layers[0], "unshard")

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
        """The largest number of positions, in tokens.

        With longrope (Phi-3) those of the first training: beyond them the model takes other rotary frequencies, also
        for earlier positions, whose keys are in the cache.
        """
        rope = self.model.config.rope_parameters or {}
        whole: int = self.model.config.max_position_embeddings
        return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else whole

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.model.dtype


def is_local(name: str) -> bool:
    """Whether a backbone of this name is a local folder."""
    if embedded.find(name):
        return False
    return "/" not in name or name.startswith(("/", ".", "~")) or os.path.isdir(name)


def title_of(name: str) -> str:
    """The name of a backbone in texts and tables: `name`, or an embedded model's full name."""
    model = embedded.find(name)
    return model.title if model else name


def load_backbone(
    name: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    accept_license: bool = False,
) -> Backbone:
    """Load a frozen backbone onto the CPU; weights come from safetensors only, never from pickle files.

    Args:
        name: an embedded model, a local folder in the hub's layout, or a name on the hub (HF_HUB_OFFLINE is honoured).
        dtype: float32, bfloat16, float16, or auto (`fastest_dtype`).
        revision: a branch, tag or commit; for hub names only.
        trust_remote_code: use a repository's own Python for its tokenizer; the model is always transformers' own.
        accept_license: accept the licence of an embedded model; those on the hub are accepted there.

    Raises:
        BackboneError: the model cannot be found, its licence is not accepted, it is damaged or incomplete, or cannot
            be routed; unknown dtype.
    """
    dtype = fastest_dtype() if dtype == "auto" else dtype
    if dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES) or f"; choose one of auto, {', '.join(DTYPES)}."
        raise BackboneError(f"The backbone's dtype is {dtype!r}, which is not known{hint}")
    name = os.fspath(name)
    source = locate(name, revision, accept_license=accept_license)
    revision = revision or "main"
    with embedded.quiet_transformers():
        config = read_config(name, source, revision)
        check_routable(name, config)
        attention = FAMILIES[config["model_type"]]
        model = _load_model(name, source, revision=revision, dtype=DTYPES[dtype], attn_implementation=attention)
        tokenizer = _load_tokenizer(name, source, revision=revision, trust_remote_code=trust_remote_code)
    known = embedded.find(name)
    return Backbone(known.name if known else name, model, tokenizer, fingerprint(model), details(model))


def fastest_dtype(accelerator: str = "auto") -> str:
    """bfloat16 where this process's device computes in it, else float32.

    A CPU without instructions for bfloat16 multiplies matrices in it at a fifth of the speed of float32.

    Args:
        accelerator: as in `trainer.accelerator`.
    """
    kind = distributed.device(accelerator).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an older torch does not tell
        return "bfloat16"
    return "bfloat16" if any(map(torch.cpu.get_capabilities().get, NATIVE_BFLOAT16)) else "float32"


def check_routable(name: str, config: dict) -> None:
    """Refuse a model that cannot be routed, by the content of its config.json.

    Raises:
        BackboneError: the architecture is not in `FAMILIES`, has no next-token head, attends to later tokens, or has
            too few layers.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(config.get("model_type"))
    named = config.get("architectures")
    architectures = named if isinstance(named, list) else []
    called = " or ".join(map(str, architectures)) or f"of the kind {kind}"
    if kind not in FAMILIES:
        raise BackboneError(f"{name!r} is {called}, which Buddy cannot route; choose one of {', '.join(FAMILIES)}.")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    if architectures and causal not in architectures:
        raise BackboneError(f"{name!r} is {called}, which predicts no next token; choose a {causal}.")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise BackboneError(f"{name!r} is {called} that attends to later tokens; choose a causal model.")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers < MIN_LAYERS:
        raise BackboneError(f"{name!r} has {layers} layers; choose a model of at least {MIN_LAYERS} layers.")


def fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that depend on the weights of a backbone, and not on their dtype.

    A hash of the sizes and of the signs of weights sampled evenly from every parameter: rounding to another
    floating-point type keeps each sign, also of zero.
    """
    digest = hashlib.sha256(repr([getattr(model.config, key, None) for key in ("model_type", *SIZES)]).encode())
    for parameter in model.parameters():
        flat = parameter.detach().flatten()  # the stride is often a multiple of the width; `details` has other weights
        digest.update(torch.signbit(flat[:: max(1, len(flat) // SAMPLE)]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def details(model: PreTrainedModel) -> str:
    """16 hexadecimal digits of a model's configuration, and of the signs of weights from all columns of its matrices.

    The dtype and the implementation of attention are left out.
    """
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")
    described = {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for parameter in model.parameters():
        digest.update(torch.signbit(sampled(parameter)).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sampled(parameter: Tensor) -> Tensor:
    """About `SAMPLE` values of a parameter, evenly spaced, (N,); of a matrix from as many columns as that allows."""
    flat = parameter.detach().flatten()
    step = max(1, len(flat) // SAMPLE)
    while math.gcd(step, parameter.shape[-1] if parameter.dim() else 1) > 1:
        step += 1
    return flat[::step]


def locate(name: str, revision: str | None = None, *, accept_license: bool = False) -> str:
    """The folder or the name on the hub of a backbone.

    Raises:
        BackboneError: neither exists, a local model has a revision, or an embedded model cannot be converted.
    """
    folder = Path(os.path.expanduser(name))  # Path.expanduser fails for "~unknown"
    if model := embedded.find(name):
        folder = embedded.model_folder(model, accept_license=accept_license)
    elif not name.strip():
        raise BackboneError(f"The backbone's name is empty; give {CHOICES}.")
    elif not os.path.isdir(folder):
        if os.path.exists(folder):
            raise BackboneError(f"{name!r} is a file; name the folder that holds config.json and the weights.")
        if name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:
            raise BackboneError(f"There is no folder {name!r}; check the path, or give {CHOICES}.")
        if "/" not in name:  # all supported models on the hub have an owner
            raise BackboneError(
                f"No model is named {name!r}{did_you_mean(name, embedded.NAMES) or f'; give {CHOICES}.'}"
            )
        return name
    if revision is not None:
        raise BackboneError(f"{name!r} is not on the hub and has no revisions; leave out revision {revision!r}.")
    return str(folder)


def read_config(name: str, source: str, revision: str = "main") -> dict:
    """The content of config.json: of a folder, a file or a name on the hub, without running any model's code."""
    from huggingface_hub.constants import is_offline_mode
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not isinstance(config, dict) or not config:
            raise ValueError("config.json is missing or holds no mapping")
        return config
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        if os.path.exists(source):
            raise _damaged(repr(name), error) from error
        why = "HF_HUB_OFFLINE is set and the hub's cache lacks it" if is_offline_mode() else reason(error)
        raise BackboneError(f"No model {name!r} was found ({why}); check the name, or give {CHOICES}.") from error


def _load_model(name: str, source: str, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    # Otherwise transformers asks a public service to convert a hub model that has only pickle files.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    how = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **how, **options)
    except Exception as error:  # wrong sizes and incomplete files raise a dozen types of error
        raise _damaged(repr(name), error) from error
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if absent:  # transformers would initialise them randomly
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

"""Tiny random models of every routable family, with a real byte-level tokenizer, all made in code."""

import copy
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from buddy.backbone.load import FAMILIES as ROUTABLE
from buddy.backbone.load import Backbone, fingerprint
from buddy.testing.subject import byte_tokenizer as tiny_tokenizer
from buddy.testing.subject import random_model, tiny_config

# family -> (model_type, what its configuration needs beyond the common sizes)
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),  # from layer 2 on
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
}


def tiny_model(family: str = "llama", seed: int = 0, **config) -> PreTrainedModel:
    """A frozen float32 causal LM of 6 layers, hidden size 64 and 259 tokens; `config` overrides its configuration.

    Weights are larger than a fresh model's and norms differ from one, so that a skipped layer shows in the logits.
    """
    return tiny_backbone(family, seed, **config).model


def tiny_backbone(family: str = "llama", seed: int = 0, **config) -> Backbone:
    """`tiny_model` and `tiny_tokenizer` as the backbone that `load_backbone` would give."""
    model, digest = _made(family, seed, tuple(sorted(config.items())))
    return Backbone(f"tiny-{family}", copy.deepcopy(model), tiny_tokenizer(), digest)


@cache
def _made(family: str, seed: int, config: tuple[tuple[str, object], ...]) -> tuple[PreTrainedModel, str]:
    """A model, of which tests get copies, and its fingerprint."""
    model_type, extra = FAMILIES[family]
    settings = tiny_config(model_type, **{"num_hidden_layers": 6, **extra, **dict(config)})
    model = random_model(settings, seed, ROUTABLE[model_type])
    return model, fingerprint(model)


def tiny_folder(path: Path, family: str = "llama", seed: int = 0, **config) -> Path:
    """Save a tiny model and its tokenizer under `path` in the hub's layout; returns `path`."""
    tiny_model(family, seed, **config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path

"""A tiny random language model made in memory: what routers are checked on unless another is named."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from buddy.backbone.load import Backbone, fingerprint

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

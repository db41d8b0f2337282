"""A tiny GGUF file of Gemma 3, as llama.cpp writes it."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
CONTROL, NORMAL = 3, 1  # types of tokens


def gemma_file(path: Path, model: PreTrainedModel) -> tuple[Path, dict[str, torch.Tensor], list[str]]:
    """Write a model with a tokenizer of single letters and "ab", matrices in blocks of Q8_0 and Q5_0.

    Returns:
        The file; the weights as dequantised, by transformers' names; the tokens.
    """
    config = model.config
    letters = [chr(code) for code in range(ord("a"), ord("a") + config.vocab_size - len(SPECIALS) - 1)]
    tokens = [*SPECIALS, *letters, "ab"]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS)))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    weights = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = weight.float().numpy()
        known = names.get_name(name.removesuffix(".weight"))
        if "norm" in name:
            stored = values + np.float32(1)  # llama.cpp multiplies by it, Gemma by 1 + its weight
            writer.add_tensor(f"{known}.weight", stored)
            values = stored - np.float32(1)
        else:
            kind = Kind.Q5_0 if "mlp" in name else Kind.Q8_0
            blocks = gguf.quantize(values, kind)
            writer.add_tensor(f"{known}.weight", blocks, raw_dtype=kind)
            values = gguf.dequantize(blocks, kind)
        weights[name] = torch.from_numpy(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights, tokens


def parts_of(path: Path, count: int) -> list[Path]:
    """Cut a file into parts of equal size beside it."""
    content, parts = path.read_bytes(), []
    size = -(-len(content) // count)
    for number in range(count):
        part = path.with_name(f"{path.name}.part{number:02}")
        part.write_bytes(content[number * size : (number + 1) * size])
        parts.append(part)
    return parts

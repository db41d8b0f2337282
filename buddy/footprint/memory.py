"""Bytes of weights, router, cache and a training step, from a model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from buddy.router import AnyRouter, Geometry

FLOAT32 = 4
SLOT, VALID = 8, 1  # bytes that a stored position takes beside K and V under `hole`: its number, and who ran it
UNREAD = 17  # positions of a window without a scored prediction: a prefix too short to learn from, and the last one
CHUNK = 512  # tokens whose logits are looked at together on an accelerator
GATHERED = 2  # layers that lie whole on a device under fsdp: the one that runs and the one that is fetched


@dataclass(frozen=True)
class Shape:
    """What memory depends on.

    Attributes:
        layer_bytes: of the weights of each layer.
        rest_bytes: of the embeddings, the last norm, and the head where it has weights of its own.
        parameters: of the whole model.
        element: bytes of a number in weights, states and cache.
        hidden, intermediate, vocabulary: widths D, I and V.
        query: width of all heads' queries.
        kv: width of a token's keys (or values) in one layer.
        windows: for each layer the positions that a later one can still see; None for all.
        capped: whether logits are squashed, which takes copies of them.
    """

    layer_bytes: tuple[int, ...]
    rest_bytes: int
    parameters: int
    element: int
    hidden: int
    intermediate: int
    vocabulary: int
    query: int
    kv: int
    windows: tuple[int | None, ...]
    capped: bool

    @property
    def layers(self) -> int:
        """L."""
        return len(self.layer_bytes)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return sum(self.layer_bytes) + self.rest_bytes


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model, whether or not it has its weights."""
    config, layers = model.config, model.model.layers
    attention = layers[0].self_attn
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None)
    kinds = kinds or ["sliding_attention" if sliding else "full_attention"] * len(layers)
    own = tuple(_bytes(layer) for layer in layers)
    return Shape(
        layer_bytes=own,
        rest_bytes=_bytes(model) - sum(own),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        element=model.dtype.itemsize,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        query=config.num_attention_heads * attention.head_dim,
        kv=config.num_key_value_heads * attention.head_dim,
        windows=tuple(sliding if kind == "sliding_attention" else None for kind in kinds[: len(layers)]),
        capped=bool(getattr(config, "final_logit_softcapping", None)),
    )


def geometry_of(shape: Shape, context_layer: int = 1) -> Geometry:
    """The sizes that a router needs, where it pools values."""
    return Geometry(layers=shape.layers, context_layer=context_layer, hidden=shape.hidden, features=shape.kv)


def weight_bytes(shape: Shape, devices: int, strategy: str) -> int:
    """Of the frozen backbone on each device while training.

    With "auto" each device has all of it. With "fsdp" it has its part, and beside it whole what is not in a layer,
    and the layers that run and come next.
    """
    if strategy == "auto" or devices == 1:
        return shape.weight_bytes
    largest = sorted(shape.layer_bytes)[-GATHERED:]
    return -(-shape.weight_bytes // devices) + shape.rest_bytes + sum(largest)


def router_bytes(router: AnyRouter, *, training: bool, devices: int = 1) -> int:
    """Of a router in float32; in training with the copy it started from, its gradients and AdamW's two moments.

    Processes that train together keep a second copy of the gradients to exchange.
    """
    held = sum(tensor.nbytes for tensor in (*router.parameters(), *router.buffers()))
    if not training or not router.trainable:
        return held
    trained = sum(parameter.nbytes for parameter in router.parameters() if parameter.requires_grad)
    return 2 * held + trained * (3 + (devices > 1))


def cache_bytes(shape: Shape, tokens: int, policy: str, executed: int, sinks: int = 0) -> int:
    """Of the keys and values of one row.

    Under "fill" and "zero" every layer holds every position (a sliding layer its last ones), whatever the budget; the
    engine may be late with some and never has more. Under "hole" a token is in the layers that it ran alone, so that
    where no layer slides the number is exact whatever the plans were; elsewhere it is the mean over plans.

    Args:
        shape: of the model.
        tokens: positions that went by.
        policy: "fill", "hole" or "zero".
        executed: K.
        sinks: first tokens in all layers.
    """
    held = [tokens if window is None else min(tokens, window - 1) for window in shape.windows]
    each = 2 * shape.kv * shape.element
    if policy != "hole":
        return sum(held) * each
    routed = sum(max(positions - sinks, 0) for positions in held) * executed / shape.layers
    return round((routed + shape.layers * min(sinks, tokens)) * (each + SLOT + VALID))


def step_bytes(shape: Shape, geometry: Geometry, rows: int, window: int, plans: int, chunk: int = CHUNK) -> int:
    """Most that a training step holds at once beside weights and router: perturbed plans, KL to the dense model.

    The backbone has no gradients, so nothing of its layers is kept: the states of one layer at a time, the dense
    model's distribution in float32 (twice: of all rows, and of those below full depth), the logits of all plans, and
    what the router learns from. An estimate.

    Args:
        shape: of the model.
        geometry: of the router.
        rows: windows of this device.
        window: tokens in each.
        plans: tried for each window.
        chunk: tokens whose logits are looked at together.
    """
    tokens, scored = rows * window, rows * max(window - UNREAD, 1)
    context = 3 * FLOAT32 * tokens * (2 * geometry.features + geometry.hidden)
    distribution = FLOAT32 * scored * shape.vocabulary
    logits = shape.element * scored * shape.vocabulary
    dense = logits + distribution * (1 if shape.element == FLOAT32 else 2)
    trying = logits * plans * (3 if shape.capped else 1)
    looking = 3 * FLOAT32 * min(chunk, scored) * shape.vocabulary
    layer = _running_bytes(shape, tokens * plans, window)
    return context + max(dense, 2 * distribution + max(layer, trying + (0 if shape.capped else looking)))


def _running_bytes(shape: Shape, tokens: int, window: int) -> int:
    """What one layer holds while it runs on so many tokens, in windows of so many."""
    mlp = 3 * shape.intermediate + 8 * shape.hidden
    attention = 4 * shape.query + 4 * shape.kv + 4 * shape.hidden
    return tokens * (shape.element * max(mlp, attention) + window)


def _bytes(module: nn.Module) -> int:
    """Of the parameters; what is shared counts once."""
    return sum(parameter.nbytes for parameter in module.parameters())

"""Weights of k_proj and v_proj side by side in memory, so that one product gives keys and values.

Of a few states such a product takes no longer than one of its halves. The modules keep their own parameters, which
become views of one storage: nothing is held twice, and whoever writes to them in place writes to both. Where a module
was replaced (by peft, say), hooked, or its weight moved elsewhere, there is no product of both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def adjoin(attention: nn.Module) -> None:
    """Lay both weights into one storage, where they are plain and alike; their values stay."""
    pair = _pair(attention)
    if pair is None or torch.is_inference_mode_enabled():
        return
    keys, values = pair
    if keys.device.type != "meta" and not _adjacent(keys, values):
        both = torch.cat([keys.detach(), values.detach()])
        keys.data, values.data = both[: len(keys)], both[len(keys) :]


def separate(attention: nn.Module) -> None:
    """Give each weight a storage of its own again."""
    pair = _pair(attention)
    if pair is not None and _adjacent(*pair):
        for weight in pair:
            weight.data = weight.detach().clone()


class Both:
    """Finds the weight of both, (keys + values, D), of one attention; looks anew when a module or a storage changed.

    Attributes:
        features: of keys and of values, once a weight was found.
    """

    features: tuple[int, int]

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._places: tuple[int, int] | None = None
        self._weight: Tensor | None = None

    def __call__(self, attention: nn.Module) -> Tensor | None:
        """None where the two are not side by side, or something is to be called or trained on the way."""
        modules = attention._modules
        one, other = modules.get("k_proj"), modules.get("v_proj")
        if type(one) is not nn.Linear or type(other) is not nn.Linear or _watched(one) or _watched(other):
            return None
        keys, values = one._parameters["weight"], other._parameters["weight"]
        if keys.requires_grad or values.requires_grad:
            return None
        places = keys.data_ptr(), values.data_ptr()
        if keys is not self._keys or values is not self._values or places != self._places:
            self._keys, self._values, self._places = keys, values, places
            self.features, self._weight = (len(keys), len(values)), _joint(attention)
        return self._weight


def _joint(attention: nn.Module) -> Tensor | None:
    pair = _pair(attention)
    if pair is None or not _adjacent(*pair):
        return None
    keys, values = pair
    return keys.detach().as_strided((len(keys) + len(values), keys.shape[1]), keys.stride())


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pair(attention: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Both weights; None where a module is none of torch's own or has a bias, or they are not alike and frozen."""
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    if any(type(module) is not nn.Linear or module.bias is not None for module in found):
        return None
    keys, values = (module.weight for module in found)
    if type(keys) is not nn.Parameter or type(values) is not nn.Parameter or keys.requires_grad or values.requires_grad:
        return None
    alike = (keys.dtype, keys.device, keys.shape[1]) == (values.dtype, values.device, values.shape[1])
    return (keys, values) if alike else None


def _adjacent(keys: Tensor, values: Tensor) -> bool:
    """Whether the second begins where the first ends."""
    return (
        keys.is_contiguous()
        and values.is_contiguous()
        and keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        and keys.data_ptr() + keys.nbytes == values.data_ptr()
    )

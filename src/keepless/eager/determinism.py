"""What is remembered of a saved tensor, so that a recompute that went another way is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from keepless import _compat

Trait = Callable[[torch.Tensor], Any]


def metadata(tensor: torch.Tensor) -> Any:
    """Shape, dtype and device: what torch compares."""
    return (tensor.shape, tensor.dtype, tensor.device)


def bitwise(tensor: torch.Tensor) -> Any:
    """Shape, dtype, device and a digest of every bit."""
    return (*metadata(tensor), digest(tensor))


def digest(tensor: torch.Tensor) -> str:
    """BLAKE2 of a tensor's values as bytes, whatever its layout or device."""
    found = hashlib.blake2b(digest_size=16)
    with _compat.own_ops():
        for part in _dense_parts(tensor.detach()):
            plain = part.resolve_conj().resolve_neg().cpu().contiguous()
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        return [part for name in names for part in _dense_parts(getattr(tensor, name))]
    if tensor.is_quantized:
        return [tensor.int_repr()]
    return [tensor]


def nothing(tensor: torch.Tensor) -> Any:
    """No check."""
    return None


CHECKS: dict[str, Trait] = {"default": metadata, "bitwise": bitwise, "none": nothing}


def described(trait: Any) -> str:
    """One line of a tensor's traits."""
    if trait is None:
        return "nothing"
    shape, dtype, device, *rest = trait
    bits = f", bits {rest[0]}" if rest else ""
    return f"shape {list(shape)}, {str(dtype).removeprefix('torch.')}, {device}{bits}"

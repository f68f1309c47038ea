"""What the ops share whose kernels read tensors without gaps, some of them in the wide type of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignfast.checks import check_shape


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)


def check_dense(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device
) -> None:
    check_shape(name, tensor.shape, shape)
    if (tensor.dtype, tensor.device) != (dtype, device):
        raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}; allowed is {dtype} on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not in contiguous memory; allowed is that alone")

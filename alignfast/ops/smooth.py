"""Smoothing of the gradient (translation-invariant attacks)."""

from __future__ import annotations

from torch import Tensor

from alignfast.checks import check_shape
from alignfast.reference import smooth as reference


def smooth(grad: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise cross-correlation with the outer product of `kernel` with itself, zero padding, same size.

    W * g of TI-FGSM (Dong et al., CVPR 2019, eq. 8) for a separable W.

    Args:
        grad: [N, C, H, W], floating point.
        kernel: [k] with k odd, of grad's dtype and device.

    Raises:
        ValueError: an even or empty kernel, or shapes, dtypes or devices that do not match.
    """
    check_shape("grad", grad.shape, (None, None, None, None))
    check_shape("kernel", kernel.shape, (None,))
    if len(kernel) % 2 == 0:
        raise ValueError(f"kernel: got size {len(kernel)}; allowed is an odd size")
    if not grad.is_floating_point():
        raise ValueError(f"grad: got dtype {grad.dtype}; allowed is a floating-point tensor")
    if kernel.dtype != grad.dtype or kernel.device != grad.device:
        raise ValueError(
            f"kernel: got {kernel.dtype} on {kernel.device} for a gradient of {grad.dtype} on {grad.device}; "
            "allowed is one dtype and device"
        )
    return reference.smooth(grad, kernel)

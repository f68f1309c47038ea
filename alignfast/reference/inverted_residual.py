"""A pointwise, a depthwise and a pointwise convolution with clips between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d

from alignfast.reference.depthwise_conv2d import clip as clipped
from alignfast.reference.depthwise_conv2d import depthwise_conv2d


def inverted_residual(
    images: Tensor,
    expand: Tensor,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    clip: tuple[float, float],
) -> Tensor:
    expanded = clipped(conv2d(images, expand, expand_bias), *clip)
    # Its own first clip changes nothing any more.
    everything = (-float("inf"), float("inf"))
    between = depthwise_conv2d(expanded, depthwise, depthwise_bias, stride, padding, everything, clip)
    return conv2d(between, project, project_bias)

"""The ops that attacks, models and alignment are made of."""

from alignfast.ops.attention import attention
from alignfast.ops.basic_block import basic_block
from alignfast.ops.batch_norm import batch_norm
from alignfast.ops.depthwise_conv2d import depthwise_conv2d
from alignfast.ops.diversify import Mixing, Noise, ResizePad, diversify
from alignfast.ops.inverted_residual import PackedResidual, inverted_residual
from alignfast.ops.kl_div_with_logits import kl_div_with_logits
from alignfast.ops.philox_uniform import philox_uniform
from alignfast.ops.sign_step import sign_step
from alignfast.ops.smooth import smooth
from alignfast.ops.winograd_conv2d import winograd_conv2d

__all__ = [
    "Mixing",
    "Noise",
    "PackedResidual",
    "ResizePad",
    "attention",
    "basic_block",
    "batch_norm",
    "depthwise_conv2d",
    "diversify",
    "inverted_residual",
    "kl_div_with_logits",
    "philox_uniform",
    "sign_step",
    "smooth",
    "winograd_conv2d",
]

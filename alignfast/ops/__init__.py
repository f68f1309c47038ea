"""The five ops an attack and an alignment are made of."""

from alignfast.ops.diversify import Mixing, Noise, ResizePad, diversify
from alignfast.ops.kl_div_with_logits import kl_div_with_logits
from alignfast.ops.philox_uniform import philox_uniform
from alignfast.ops.sign_step import sign_step
from alignfast.ops.smooth import smooth

__all__ = [
    "Mixing",
    "Noise",
    "ResizePad",
    "diversify",
    "kl_div_with_logits",
    "philox_uniform",
    "sign_step",
    "smooth",
]

"""The one list of inputs the op tests draw from: shapes, dtypes, memory layouts, and how near a result must come."""

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF_DTYPES = [torch.bfloat16, torch.float16]

# [B, C]; 21,841 classes are those of ImageNet-21k.
LOGITS = [(0, 10), (1, 1), (4, 1), (1, 2), (5, 7), (3, 1000), (2, 21841)]
# [N, C, H, W]: none, single pixels, odd and unequal sides, other than three channels, a width above any vector's.
IMAGES = [
    (0, 3, 4, 4),
    (1, 3, 1, 1),
    (4, 3, 1, 1),
    (2, 3, 7, 5),
    (3, 1, 9, 9),
    (2, 4, 1, 6),
    (2, 3, 16, 67),
    (5, 2, 32, 32),
]
# (N, C, side): diversify resizes square images.
SQUARES = [(0, 3, 4), (1, 3, 1), (3, 1, 2), (2, 3, 7), (4, 3, 16), (2, 2, 33)]
# [N, C, H, W] and the size of the kernel, also larger than the image.
SMOOTHING = [
    ((0, 3, 5, 5), 3),
    ((1, 3, 1, 1), 1),
    ((2, 3, 1, 1), 5),
    ((2, 1, 6, 9), 3),
    ((2, 3, 7, 5), 15),
    ((1, 3, 33, 32), 7),
]


def random(shape, seed, dtype=torch.float64, low=0.0, high=1.0):
    """Uniform in [low, high), drawn in float64 and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)


def normal(shape, seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def integers(shape, seed, low, high):
    """int64 in [low, high); the bounds may be tensors of `shape`."""
    width = torch.as_tensor(high) - torch.as_tensor(low)
    return (torch.as_tensor(low) + (random(shape, seed) * width).floor().long()).expand(shape)


def contiguous(x):
    return x.contiguous()


def transposed(x):
    return x.mT.contiguous().mT


def every_other(x):
    """Every other value of a buffer whose rest is NaN, which shows where a kernel ignores strides."""
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    buffer[..., ::2] = x
    return buffer[..., ::2]


def unaligned(x):
    """In the middle of a buffer whose rest is NaN, not at an address that vector loads like."""
    buffer = x.new_full((x.numel() + 2,), float("nan"))
    buffer[1:-1] = x.flatten()
    return buffer[1:-1].view(x.shape)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


MATRIX_LAYOUTS = [contiguous, transposed, every_other, unaligned]
IMAGE_LAYOUTS = [*MATRIX_LAYOUTS, channels_last]


def assert_near(actual, expected, *, ulps, scale=0.0):
    """Every element within `ulps` roundings of `actual`'s dtype, relative to its own size plus `scale`."""
    assert actual.shape == expected.shape
    assert expected.dtype == torch.float64
    finfo = torch.finfo(actual.dtype)
    allowed = ulps * (finfo.eps * (expected.abs() + scale) + finfo.smallest_normal)
    excess = (actual.detach().double() - expected.detach()).abs() - allowed
    assert not excess.isnan().any()
    assert not (excess > 0).any(), f"off by {float((excess / allowed).max()) + 1:.3g} times what is allowed"

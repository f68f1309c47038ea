"""8-bit images: decoding, resizing and cropping without ever leaving the 8-bit grid.

One image is worked on by NumPy and Pillow: threads do it beside a computation, and in each of them an op of torch
would start threads of its own.
"""

from __future__ import annotations

import os
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alignfast.checks import check_images

Pixels = NDArray[np.uint8]  # [H, W, C]

MODES = {1: "L", 3: "RGB"}

# That read or write images beside a computation, which wants the cores too.
THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))

EXACT = 1e-3  # of a level: far above the rounding of k / 255 in fp32, far below half a level


def decode(stream: str | os.PathLike[str] | IO[bytes], name: str, channels: int) -> Pixels:
    """The image in `stream` as uint8 [H, W, channels]; grey is repeated to 3 channels, alpha is dropped.

    Raises:
        ValueError: unreadable, truncated, or of more than 8 bits a channel; the message starts with `name`.
    """
    try:
        with Image.open(stream) as image:
            image.load()
            return pixels_of(image, channels)
    # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, zlib.error and more on broken files.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}: not readable as an image ({reason}); allowed is a whole 8-bit image file") from error


def pixels_of(image: Image.Image, channels: int) -> Pixels:
    """A PIL image as uint8 [H, W, channels]; ValueError where its mode holds more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
    mode = MODES[channels]
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def to_pil(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def fit(pixels: Pixels, size: tuple[int, int], crop_pct: float) -> Pixels:
    """Resize until `size / crop_pct` is just covered (bicubic), then cut `size` (height, width) out of the centre.

    For a square size this is torchvision's `Resize(round(size / crop_pct))` and `CenterCrop(size)`. An image that
    already has `size` is returned as it is.
    """
    height, width, channels = pixels.shape
    if (height, width) == size:
        return pixels
    tall, wide = (round(side / crop_pct) for side in size)
    if tall * width >= wide * height:
        wide = max(wide, int(tall * width / height))
    else:
        tall = max(tall, int(wide * height / width))
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    resized = to_pil(pixels).resize((wide, tall), Image.Resampling.BICUBIC)
    return pixels_of(resized.crop((left, top, left + size[1], top + size[0])), channels)


def to_tensor(pixels: Pixels) -> Tensor:
    """uint8 [H, W, C] to uint8 [C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_pixels(image: Tensor) -> Pixels:
    """uint8 [C, H, W] to uint8 [H, W, C]."""
    return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))


def to_float(image: Tensor) -> Tensor:
    """uint8 of any shape, on the CPU, to float32 in [0, 1]: exactly k / 255 in fp32."""
    return torch.from_numpy(np.divide(image.numpy(), np.float32(255), dtype=np.float32))


def eight_bit(images: Tensor) -> Tensor:
    """The uint8 [N, C, H, W] that float `images` [N, C, H, W] in [0, 1] were made from; on the same device.

    Raises:
        ValueError: a value is not k / 255 for a whole k, so there is no 8-bit original.
    """
    check_images("images", images)
    levels = images.detach().float() * 255
    whole = levels.round()
    if levels.numel() and float((levels - whole).abs().max()) > EXACT:
        raise ValueError("images: values lie between 8-bit levels; allowed are images read from 8-bit data, k / 255")
    return whole.to(torch.uint8)

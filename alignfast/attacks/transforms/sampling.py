"""Images sampled at places of their own, one set of places a row."""

from __future__ import annotations

import torch
from torch import Tensor


def take(rows: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """[B, C, H', W']: the pixels of rows [B, C, H, W] at y, x: int64 [B, H', W'], within the images."""
    places = (y * rows.shape[-1] + x).flatten(1)[:, None].expand(-1, rows.shape[1], -1)
    return rows.flatten(2).gather(2, places).reshape(*rows.shape[:2], *y.shape[1:])


def interpolate(rows: Tensor, y: Tensor, x: Tensor, box: tuple[Tensor | int, ...] | None = None) -> Tensor:
    """[B, C, H', W']: rows [B, C, H, W] at y, x [B, H', W'] in pixels, bilinear between the four pixels around.

    On CUDA the gradient of a pixel that several places take is summed in no fixed order, so that runs may differ by
    rounding. Where the two axes are independent, `weights` has no such sums.

    box: (top, bottom, left, right), integers that broadcast to y and x; what lies outside of it, or else outside of
    the image, is 0.
    """
    height, width = rows.shape[-2:]
    top, bottom, left, right = (0, height, 0, width) if box is None else box
    result = torch.zeros_like(rows[..., :1, :1])
    for down in (0, 1):
        for along in (0, 1):
            at_y, at_x = y.floor() + down, x.floor() + along
            weight = (1 - (y - at_y).abs()) * (1 - (x - at_x).abs())
            inside = (at_y >= top) & (at_y < bottom) & (at_x >= left) & (at_x < right)
            pixels = take(rows, at_y.clamp(0, height - 1).long(), at_x.clamp(0, width - 1).long())
            result = result + pixels * torch.where(inside, weight, 0)[:, None]
    return result


def weights(point: Tensor, size: int) -> Tensor:
    """[B, P, size]: the shares of an axis's pixels in bilinear interpolation at point [B, P], between zeros."""
    pixels = torch.arange(size, device=point.device)
    return (1 - (point[..., None] - pixels).abs()).clamp(min=0)

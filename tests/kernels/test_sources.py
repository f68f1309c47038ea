"""No pixel goes into more positions than the adjoints of the GPU kernels have places for."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from alignfast.kernels.diversify import sources_of
from alignfast.reference.diversify import resize_pad_matrix

ROOT = Path(__file__).resolve().parents[2]
SMALL = [(size, padded) for size in range(1, 9) for padded in range(size, 3 * size + 1)]


def spans(size, padded):
    """Of every side and place, and every pixel: from the first position that takes from it up to the last."""
    places = [(side, offset) for side, offset in product(range(padded + 1), repeat=2) if offset <= padded - side]
    for part in torch.tensor(places).split(128):
        side, offset = part.T[:, None]
        taken = resize_pad_matrix(size, side, offset, padded, torch.float64)[0] != 0
        position = torch.arange(size)[:, None]
        first = torch.where(taken, position, size).amin(1)
        last = torch.where(taken, position, -1).amax(1)
        yield (last - first + 1).clamp(min=0)


def longest(size, padded):
    return max(int(found.max()) for found in spans(size, padded))


def test_every_geometry_of_small_images():
    found = {(size, padded): longest(size, padded) for size, padded in SMALL}
    assert {case: span for case, span in found.items() if span > sources_of(*case)} == {}
    assert {span for (size, padded), span in found.items() if size == padded} == {1, 2}


def test_as_many_places_as_triton_has_are_needed():
    assert longest(17, 22) == sources_of(17, 22) == 4


def test_cuda_has_no_fewer():
    text = (ROOT / "csrc" / "cuda" / "diversify.cuh").read_text(encoding="utf-8")
    (places,) = re.findall(r"constexpr int MAX_SOURCES = (\d+);", text)
    assert int(places) >= max(sources_of(7, 7), sources_of(7, 8))

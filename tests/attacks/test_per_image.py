"""Arithmetic on images, each on its own."""

from __future__ import annotations

import pytest
import torch

from alignfast.attacks.per_image import over_length, over_mean, total


@pytest.mark.parametrize("threads", [1, 4])
def test_a_sum_is_the_same_alone_and_in_a_batch(threads: int) -> None:
    """Also where torch would share the only sum among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = torch.randn((8, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        together, means = total(images), over_mean(images)
        for number in range(len(images)):
            alone = images[number : number + 1]
            assert torch.equal(total(alone), together[number : number + 1])
            assert torch.equal(over_mean(alone), means[number : number + 1])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together.flatten(), images.flatten(1).sum(1))
    assert torch.equal(total(images > 0).flatten(), (images > 0).flatten(1).sum(1).double())


def test_lengths() -> None:
    grad = torch.stack([torch.zeros(1, 2, 2), torch.tensor([[[3.0, 0.0], [0.0, -4.0]]])])
    assert torch.equal(
        over_length(grad), torch.stack([torch.zeros(1, 2, 2), torch.tensor([[[0.6, 0.0], [0.0, -0.8]]])])
    )

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torch.nn.functional import interpolate

from alignfast.draws import FIRST_SLOT, Draws
from alignfast.models import (
    DEFENCES,
    BitDepth,
    Classifier,
    Defence,
    Defended,
    Ensemble,
    Jpeg,
    MedianFilter,
    RandomizedSmoothing,
    RandomResizePad,
    evaluating,
    fingerprint,
)

RANDOM: list[Defence] = [RandomResizePad(0.5), RandomizedSmoothing(0.3, samples=5)]
ALL: list[Defence] = [Jpeg(30), BitDepth(2), MedianFilter(3), *RANDOM]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn((4, 3, 5, 5), generator=generator))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        return torch.conv2d(images, self.weight).tanh().mean((2, 3))


def net(seed: int = 0) -> Classifier:
    return Classifier(Net(seed), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), num_classes=4, input_size=(3, 16, 16))


def photos(count: int = 6, side: int = 16) -> Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(1))


def draws(count: int, copy: int = 0) -> Draws:
    return Draws(0, 0, torch.arange(count), torch.tensor([copy]), FIRST_SLOT)


def changed(defence: Defence, images: Tensor) -> Tensor:
    return defence.change(images, draws(len(images)))


def test_jpeg_is_that_of_the_8_bit_image() -> None:
    images = interpolate(photos(3, 4), size=(16, 16), mode="bicubic").clamp(0, 1)
    for quality in (20, 75):
        for image, read in zip(images, changed(Jpeg(quality), images), strict=True):
            levels = (image * 255).round().to(torch.uint8)
            written = io.BytesIO()
            Image.fromarray(levels.permute(1, 2, 0).numpy()).save(written, "JPEG", quality=quality)
            expected = torch.from_numpy(np.array(Image.open(written))).permute(2, 0, 1)
            assert torch.equal(read, expected.float() / 255)
    assert (changed(Jpeg(20), images) - images).abs().max() > (changed(Jpeg(95), images) - images).abs().max()
    grey = changed(Jpeg(), photos(2)[:, :1])
    assert grey.shape == (2, 1, 16, 16)
    assert torch.equal((grey * 255).round() / 255, grey)


def test_bit_depth_by_hand() -> None:
    images = torch.tensor([0.0, 0.1, 0.2, 0.49, 0.51, 0.9, 1.0]).expand(1, 3, 1, 7)
    assert changed(BitDepth(1), images)[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    thirds = [0, 0, 1 / 3, 1 / 3, 2 / 3, 1, 1]
    assert changed(BitDepth(2), images)[0, 0, 0].tolist() == pytest.approx(thirds)
    eight = (photos() * 255).round() / 255
    torch.testing.assert_close(changed(BitDepth(8), eight), eight, atol=1e-7, rtol=0)


def test_the_median_is_of_a_channel_of_an_image() -> None:
    images = photos(2)
    found = changed(MedianFilter(3), images)
    assert float(found[1, 2, 5, 7]) == float(images[1, 2, 4:7, 6:9].median())
    for image, plane in zip(images.flatten(0, 1), changed(MedianFilter(), images).flatten(0, 1), strict=True):
        assert np.array_equal(plane.numpy(), median_filter(image.numpy(), size=2, mode="reflect"))
    assert torch.equal(changed(MedianFilter(1), images), images)


def test_resizing_and_padding_keep_the_image_whole() -> None:
    """A constant image becomes a square of drawn side at a drawn place, among zeros."""
    ones = torch.ones((200, 3, 16, 16))
    padded = changed(RandomResizePad(0.5), ones)
    sides, corners = set(), set()
    for image in padded[:, 0]:
        rows, columns = image.amax(1) > 0, image.amax(0) > 0
        side = int(rows.sum())
        assert side == int(columns.sum())
        top, left = int(rows.int().argmax()), int(columns.int().argmax())
        torch.testing.assert_close(image[top : top + side, left : left + side], torch.ones(side, side))
        assert float(image.sum()) == pytest.approx(side * side)
        sides.add(side)
        corners.add((top, left))
    assert sides == set(range(8, 16))
    assert len(corners) > 30
    # The proportion of Xie et al.: 299 of 331.
    big = changed(RandomResizePad(), torch.ones((40, 1, 331, 331)))
    drawn = {int((image[0].amax(1) > 0).sum()) for image in big}
    assert min(drawn) >= 299
    assert max(drawn) <= 330
    with pytest.raises(ValueError, match="allowed is square images"):
        changed(RandomResizePad(), ones[..., :8])


def test_votes_are_counted_by_hand() -> None:
    model, images = net(), photos()
    smoothing = RandomizedSmoothing(0.3, samples=7, seed=5)
    found = Defended(model, [smoothing]).logits(images)
    shares = torch.zeros(6, 4, dtype=torch.float64)
    logarithms = torch.zeros(6, 4, dtype=torch.float64)
    for sample in range(7):
        noise = replace(draws(6, sample), seed=5).normal(0, (3, 16, 16))[0]
        logits = model.logits(images + 0.3 * noise)
        shares[range(6), logits.argmax(1)] += 1 / 7
        logarithms += logits.double().softmax(1) / 7
    torch.testing.assert_close(found, shares)
    assert len(found.unique()) > 2
    averaged = Defended(model, [replace(smoothing, by="probabilities")]).logits(images)
    torch.testing.assert_close(averaged, logarithms.log())
    still = Defended(model, [RandomizedSmoothing(0.0, samples=3)]).logits(images)
    assert torch.equal(still.argmax(1), model.logits(images).argmax(1))


def test_noise_is_normal_and_of_its_own_for_each_sample() -> None:
    images = torch.zeros((50, 3, 16, 16))
    one, other = (RandomizedSmoothing(0.25).change(images, draws(50, copy)) for copy in (0, 1))
    for noise in (one, other):
        assert float(noise.mean()) == pytest.approx(0, abs=0.005)
        assert float(noise.std()) == pytest.approx(0.25, rel=0.01)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.02


@pytest.mark.parametrize("defence", ALL, ids=lambda defence: type(defence).__name__)
def test_an_image_is_defended_alike_in_any_batch(defence: Defence) -> None:
    model = net()
    defended, images = Defended(model, [defence, BitDepth(5)]), photos()
    indices = torch.tensor([40, 3, 2**31, 7, 0, 12])
    whole = defended.logits(images, indices)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    assert torch.equal(defended.logits(images[order], indices[order]), whole[order])
    for place in range(6):
        alone = defended.logits(images[place : place + 1], indices[place : place + 1])
        torch.testing.assert_close(alone, whole[place : place + 1])
    assert torch.equal(defended.logits(images), defended.logits(images, torch.arange(6)))
    moved = not torch.allclose(defended.logits(images), whole)
    assert moved is (defence in RANDOM)


@pytest.mark.parametrize("defence", RANDOM, ids=lambda defence: type(defence).__name__)
def test_draws_are_of_the_seed_and_of_nothing_else(defence: Any) -> None:
    images, state = photos(), torch.get_rng_state()
    assert torch.equal(changed(defence, images), changed(defence, images))
    assert not torch.equal(changed(defence, images), changed(replace(defence, seed=1), images))
    assert torch.equal(torch.get_rng_state(), state)


def test_defences_are_applied_in_their_order_to_images_in_0_to_1() -> None:
    model, images = net(), photos()
    squeezed, jpeg = BitDepth(1), Jpeg(10)
    for order in ([squeezed, jpeg], [jpeg, squeezed]):
        expected = images
        for defence in order:
            expected = changed(defence, expected)
        assert torch.equal(Defended(model, order)(images), model(expected))
    # What is drawn in a sample of the smoothing differs from sample to sample.
    seen = model.module.seen
    assert isinstance(seen, list)
    seen.clear()
    Defended(model, [RandomizedSmoothing(0.0, samples=3), RandomResizePad(0.5)]).logits(images)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_defended_classifier_is_one_without_a_gradient() -> None:
    model, images = net(), photos()
    defended = Defended(model, [Jpeg()])
    assert (defended.num_classes, defended.input_size, defended.undefended) == (4, (3, 16, 16), model)
    with pytest.raises(ValueError, match="images: require a gradient"):
        defended(images.requires_grad_())
    with pytest.raises(ValueError, match="images: got shape"):
        defended(photos(2, 8))
    with pytest.raises(ValueError, match="values span"):
        defended(photos() * 255)
    bare = Defended(Net(), [BitDepth(3)])
    assert torch.equal(bare(photos()), Net()(changed(BitDepth(3), photos())))
    with evaluating(defended):
        assert not model.module.training
    assert model.module.training
    ensemble = Defended(Ensemble([net(0), net(1)]), [BitDepth(2)])
    assert torch.equal(ensemble(photos()), ensemble.undefended(changed(BitDepth(2), photos())))


def test_the_fingerprint_tells_defences_apart() -> None:
    model = net()
    prints = [fingerprint(model)]
    prints += [fingerprint(Defended(model, [one])) for one in (*ALL, Jpeg(31), RandomResizePad(0.5, seed=1))]
    prints += [
        fingerprint(Defended(model, [Jpeg(30), BitDepth(2)])),
        fingerprint(Defended(model, [BitDepth(2), Jpeg(30)])),
    ]
    assert len(set(prints)) == len(prints) == 10
    assert fingerprint(Defended(net(), [Jpeg(30)])) == fingerprint(Defended(model, [Jpeg(30)]))
    assert fingerprint(Defended(net(1), [Jpeg(30)])) != fingerprint(Defended(model, [Jpeg(30)]))


def test_names_stand_for_all_kinds() -> None:
    assert [type(kind()) for kind in DEFENCES.values()] == [type(one) for one in ALL]


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: Jpeg(0), "quality: got 0; allowed is a whole number, 1 to 100"),
    (lambda: Jpeg(101), "quality: got 101"),
    (lambda: BitDepth(9), "bits: got 9; allowed is a whole number, 1 to 8"),
    (lambda: MedianFilter(0), "size: got 0"),
    (lambda: RandomResizePad(0.0), "smallest: got 0.0"),
    (lambda: RandomResizePad(1.5), "smallest: got 1.5"),
    (lambda: RandomResizePad(seed=-1), "seed: got -1"),
    (lambda: RandomizedSmoothing(-0.1), "sigma: got -0.1"),
    (lambda: RandomizedSmoothing(samples=0), "samples: got 0"),
    (lambda: RandomizedSmoothing(by="vote"), "did you mean 'votes'"),  # type: ignore[arg-type]
    (lambda: Defended(net(), []), "defences: got 0; allowed are 1 to"),
    (lambda: Defended(net(), [RandomizedSmoothing(samples=5000)] * 2), "defences: 25000000 samples"),
    (lambda: changed(Jpeg(), photos()[:, :2]), "images: got 2 channels"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_numbers_outside_their_range(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

"""What tensors hold is not checked on a GPU, as that would wait for it: a copy out of range is NaN, and no other is."""

from dataclasses import replace

import pytest
import torch

from alignfast.ops import Mixing, Noise, ResizePad, diversify, philox_uniform
from tests import cases
from tests.ops.test_diversify import geometry

pytestmark = pytest.mark.gpu_only

COPIES, COUNT, CHANNELS, POOL = 2, 2, 2, 3
FAR = 2**40
MOST = 2**63 - 1
# Whole rows or columns of the grid of copies and images, or one of its places.
EVERY, AT_IMAGE, AT_COPY, AT_PLACE = (), (slice(None), 1), (1, slice(None)), (0, 1)


def with_one(values, place, bad):
    changed = values.clone()
    changed[place] = bad
    return changed


def where(place):
    """[K, N], true where the result is to be NaN."""
    return with_one(torch.zeros(COPIES, COUNT, dtype=torch.bool), place, True)


def assert_nan_exactly(found, clean, bad):
    """`bad` has the leading dimensions of the results."""
    assert found[bad].isnan().all()
    assert bool(clean.isfinite().all())
    assert torch.equal(found[~bad], clean[~bad])


@pytest.mark.parametrize("elements", [4, 5, 1027])
@pytest.mark.parametrize(
    ("name", "place", "bad"),
    [
        ("images", AT_IMAGE, -1),
        ("images", AT_IMAGE, 2**32),
        ("images", AT_IMAGE, -MOST),
        ("copies", AT_COPY, -1),
        ("copies", AT_COPY, 2**24),
        ("copies", AT_COPY, FAR),
        ("step", EVERY, -1),
        ("step", EVERY, 2**32),
        ("step", EVERY, MOST),
    ],
)
def test_draws_out_of_range(name, place, bad, elements):
    given = {"images": torch.arange(COUNT), "copies": torch.arange(COPIES), "step": torch.tensor(2)}
    clean = philox_uniform(**given, shape=(elements,), seed=1)
    changed = given | {name: with_one(given[name], () if name == "step" else 1, bad)}
    assert_nan_exactly(philox_uniform(**changed, shape=(elements,), seed=1), clean, where(place))


@pytest.mark.parametrize(("step", "offset", "known"), [(2**32 - 1, 1, False), (0, -1, False), (5, -5, True)])
def test_it_is_the_sum_of_both_steps_that_has_a_range(step, offset, known):
    draws = torch.ops.alignfast.philox_uniform(
        torch.arange(2), torch.arange(2), (6,), 1, 0, step, 0, 0.0, 1.0, torch.tensor(offset)
    )
    assert bool(draws.isnan().all()) is not known
    assert not known or torch.equal(draws, philox_uniform(torch.arange(2), torch.arange(2), (6,), seed=1))


def options_with(geometric, side):
    padded = {"shrink": side, "enlarge": side + 3}.get(geometric)
    return {
        "noise": Noise(0.1, 1, torch.tensor(2), 3, torch.arange(COUNT), torch.arange(COPIES)),
        "mixing": Mixing(
            cases.random((POOL, CHANNELS, side, side), 1, torch.float32),
            cases.integers((COPIES, COUNT), 2, 0, POOL),
            cases.random((COPIES, COUNT), 3, torch.float32),
        ),
        "resize_pad": geometry(COPIES, COUNT, side, padded, 4) if padded else None,
    }


def changed_by(options, name, place, bad):
    part, _, field = name.partition(".")
    values = getattr(options[part], field)
    if part == "noise":
        place = () if field == "step" else 1
    return options | {part: replace(options[part], **{field: with_one(values, place, bad)})}


@pytest.mark.parametrize("side", [8, 11])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometric", ["enlarge", "nothing"])
@pytest.mark.parametrize(
    ("name", "place", "bad"),
    [
        ("noise.images", AT_IMAGE, -1),
        ("noise.images", AT_IMAGE, 2**32),
        ("noise.copies", AT_COPY, -1),
        ("noise.copies", AT_COPY, 2**24),
        ("noise.step", EVERY, -1),
        ("noise.step", EVERY, 2**32),
        ("mixing.partner", AT_PLACE, -1),
        ("mixing.partner", AT_PLACE, POOL),
        ("mixing.partner", AT_PLACE, FAR),
    ],
)
def test_noise_and_partners_out_of_range(name, place, bad, geometric, channels_last, side):
    images = cases.random((COUNT, CHANNELS, side, side), 5, torch.float32)
    options = options_with(geometric, side)
    if options["resize_pad"] is not None:
        # Padding is zero whatever is padded, so a copy is NaN as a whole where it has none.
        options["resize_pad"] = replace(options["resize_pad"], resized=torch.zeros(COPIES, COUNT, dtype=torch.int64))
    results = []
    for chosen in (changed_by(options, name, place, bad), options):
        leaf = images.clone().requires_grad_()
        format = torch.channels_last if channels_last else torch.contiguous_format
        batch = diversify(leaf, copies=COPIES, **chosen, memory_format=format)
        results.append((batch.detach().unflatten(0, (COPIES, COUNT)), *torch.autograd.grad(batch.sum(), leaf)))
    assert_nan_exactly(results[0][0], results[1][0], where(place))
    # What is added to an image does not change its gradient.
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("side", [8, 11])
@pytest.mark.parametrize("padded", ["side", "more"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("resized", "top", "left"),
    [
        (-1, 0, 0),
        ("padded + 1", 0, 0),
        (MOST, MOST, MOST),
        (5, -1, 0),
        (5, 0, -1),
        (5, 0, "room + 1"),
        (5, FAR, 0),
        (5, 0, -MOST),
    ],
)
def test_geometry_out_of_range(resized, top, left, copied, padded, side):
    """copied: images are mixed first, and what is resized is a copy of them."""
    options = options_with("shrink" if padded == "side" else "enlarge", side)
    pads = options["resize_pad"]
    number = {"padded + 1": pads.padded + 1, "room + 1": pads.padded - 4}
    bad = {"resized": resized, "top": top, "left": left}
    changed = {name: with_one(getattr(pads, name), AT_PLACE, number.get(value, value)) for name, value in bad.items()}
    images = cases.random((COUNT, CHANNELS, side, side), 6, torch.float32)
    mixing = options["mixing"] if copied else None
    results = []
    for chosen in (replace(pads, **changed), pads):
        leaf = images.clone().requires_grad_()
        batch = diversify(leaf, copies=COPIES, mixing=mixing, resize_pad=chosen)
        results.append((batch.detach().unflatten(0, (COPIES, COUNT)), *torch.autograd.grad(batch.sum(), leaf)))
    assert_nan_exactly(results[0][0], results[1][0], where(AT_PLACE))
    assert_nan_exactly(results[0][1], results[1][1], torch.tensor([False, True]))


@pytest.mark.parametrize("padded", [8, 11])
def test_the_place_of_a_copy_that_is_not_resized_does_not_matter(padded):
    images = cases.random((COUNT, CHANNELS, 8, 8), 7, torch.float32)
    still = torch.zeros(COPIES, COUNT, dtype=torch.int64)
    batch = diversify(images, copies=COPIES, resize_pad=ResizePad(still, still + FAR, still - MOST, padded))
    assert torch.equal(batch, images.repeat(COPIES, 1, 1, 1))

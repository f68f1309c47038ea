import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfast.data import eight_bit, quantise

RADII = [4 / 255, 8 / 255, 16 / 255, 0.15, 0.0, 1.0]


def batch(seed, spread=1.0):
    """Adversarial images around 8-bit originals, partly outside the ball and with many values at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    originals = torch.randint(0, 256, (2, 3, 5, 4), generator=generator, dtype=torch.uint8)
    originals[0, 0] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    noise = torch.rand(originals.shape, generator=generator) * 2 - 1
    return (originals / 255 + spread * noise).clamp(0, 1), originals


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.sampled_from(RADII) | st.floats(0.0, 1.0),
    spread=st.floats(0.0, 1.5),
)
def test_the_box_is_never_left_and_nothing_else_is_moved(seed, eps, spread):
    adversarial, originals = batch(seed, spread)
    result = quantise(adversarial, originals, eps)
    assert result.dtype == torch.uint8
    change = result.int() - originals.int()
    radius = math.floor(eps * 255 + 1e-4)
    assert int(change.abs().max()) <= radius
    inside = change.abs() < radius
    assert bool(((result.double() - adversarial.double() * 255).abs()[inside] <= 0.5 + 1e-4).all())
    # A value at the edge of the box came from there or from beyond.
    edge = change.abs() == radius
    wanted = (adversarial.double() * 255 - originals.double()).abs()
    assert bool((wanted[edge] >= radius - 0.5 - 1e-4).all())


@pytest.mark.parametrize("levels", [1, 4, 8, 16, 38])
def test_a_whole_number_of_levels_survives_float_error(levels):
    eps = levels / 255
    originals = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    adversarial = originals / 255 + eps
    for radius in (eps, math.nextafter(eps, 0), float(torch.tensor(eps, dtype=torch.float32)), eps - 2e-7):
        assert (quantise(adversarial, originals, radius) == 100 + levels).all()


def test_a_fraction_of_a_level_is_not_rounded_up():
    originals = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert (quantise(originals / 255 + 0.15, originals, 0.15) == 138).all()  # 0.15 is 38.25 levels
    assert (quantise(originals / 255 - 0.0153, originals, 0.0153) == 97).all()  # 3.9 levels


def test_values_between_levels_go_to_the_nearest():
    originals = torch.full((1, 1, 1, 4), 100, dtype=torch.uint8)
    adversarial = torch.tensor([99.6, 100.4, 101.6, 102.4]).view(1, 1, 1, 4) / 255
    assert quantise(adversarial, originals, 8 / 255).flatten().tolist() == [100, 100, 102, 102]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay_in_the_box(dtype):
    adversarial, originals = batch(3)
    change = quantise(adversarial.to(dtype), originals, 4 / 255).int() - originals.int()
    assert int(change.abs().max()) <= 4


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.floats(0.0, 4.0), part=st.floats(0.0, 1.0))
def test_the_sphere_is_never_left(seed, eps, part):
    adversarial, originals = batch(seed)
    exact = originals.double() / 255
    change = adversarial.double() - exact
    length = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    within = (exact + change * (part * eps / length.clamp_min(1e-9)).clamp(max=1)).clamp(0, 1).float()
    result = quantise(within, originals, eps, norm="l2")
    moved = torch.linalg.vector_norm(result.double() - originals.double(), dim=(1, 2, 3))
    assert bool((moved <= eps * 255 + 1e-4).all())


def test_far_inside_the_sphere_values_go_to_the_nearest():
    adversarial, originals = batch(1, spread=0.01)
    assert torch.equal(quantise(adversarial, originals, 3.0, norm="l2"), (adversarial * 255).round().to(torch.uint8))


def test_images_far_outside_the_sphere_are_drawn_into_it():
    adversarial, originals = batch(2)
    result = quantise(adversarial, originals, 0.5, norm="l2").double() - originals.double()
    lengths = torch.linalg.vector_norm(result, dim=(1, 2, 3)) / 255
    assert bool((lengths <= 0.5 + 1e-6).all())
    assert bool((lengths > 0.35).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 8}, r"eps: got 8; allowed is a number in \[0, 1\]"),
        ({"eps": -0.1}, "eps: got -0.1"),
        ({"eps": math.nan}, "eps: got nan"),
        ({"eps": -0.1, "norm": "l2"}, "eps: got -0.1"),
        ({"norm": "linff"}, "norm: got 'linff' .*did you mean 'linf'"),
        ({"adversarial": torch.full((2, 3, 5, 4), math.nan)}, "adversarial: contains NaN"),
        ({"adversarial": torch.full((2, 3, 5, 4), 1.1)}, "adversarial: values span"),
        ({"adversarial": torch.zeros(2, 3, 5, 4, dtype=torch.uint8)}, "adversarial: got dtype torch.uint8"),
        ({"originals": torch.zeros(2, 3, 5, 4)}, "originals: got torch.float32"),
        (
            {"originals": torch.zeros(1, 3, 5, 4, dtype=torch.uint8)},
            r"originals: .* allowed is torch.uint8 \[2, 3, 5, 4\]",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    adversarial, originals = batch(0)
    with pytest.raises(ValueError, match=message):
        quantise(**{"adversarial": adversarial, "originals": originals, "eps": 0.1, **change})


def test_eight_bit_inverts_the_division():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(eight_bit(levels.float() / 255), levels)
    assert torch.equal(eight_bit(levels.float() * (1 / 255)), levels)
    with pytest.raises(ValueError, match="images: values lie between 8-bit levels"):
        eight_bit(levels.float() / 255.5)

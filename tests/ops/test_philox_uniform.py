import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfast.ops import philox_uniform
from alignfast.reference.philox_uniform import philox4x32
from tests import cases
from tests.ops import checks

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """The generator on Python's own integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def expected_draws(image, copy, count, seed, step, purpose):
    draws = []
    for block in range(-(-count // 4)):
        counter = (block, image, step, (copy << 8) | purpose)
        draws += [(word >> 8) / 2**24 for word in philox(counter, (seed & 0xFFFFFFFF, seed >> 32))]
    return torch.tensor(draws[:count], dtype=torch.float64)


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert philox(counter, key) == words
    counters = tuple(torch.tensor([word, 0]) for word in counter)
    assert tuple(int(word[0]) for word in philox4x32(counters, key)) == words


def test_the_first_known_answer_comes_out_of_the_op():
    draws = philox_uniform(index(0), index(0), (4,), seed=0)
    assert draws[0, 0].tolist() == [(word >> 8) / 2**24 for word in KNOWN_ANSWERS[0][2]]


@settings(max_examples=60, deadline=None)
@given(
    image=st.integers(0, 2**32 - 1),
    copy=st.integers(0, 2**24 - 1),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    purpose=st.integers(0, 255),
    count=st.integers(1, 13),
)
def test_every_key_has_its_place(image, copy, seed, step, purpose, count):
    draws = philox_uniform(index(image), index(copy), (count,), seed=seed, step=step, purpose=purpose)
    assert draws.dtype == torch.float32
    assert torch.equal(draws[0, 0].double(), expected_draws(image, copy, count, seed, step, purpose))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5,), (3, 2, 7), (2, 0, 3)])
@pytest.mark.parametrize("images", [index(), index(5), index(9, 2**32 - 1, 0)])
@pytest.mark.parametrize("copies", [index(), index(2), index(0, 2**24 - 1)])
def test_shapes(images, copies, shape):
    draws = philox_uniform(images, copies, shape, seed=11, step=3, purpose=7)
    assert draws.shape == (len(copies), len(images), *shape)
    for k, copy in enumerate(copies.tolist()):
        for n, image in enumerate(images.tolist()):
            wanted = expected_draws(image, copy, math.prod(shape), 11, 3, 7)
            assert torch.equal(draws[k, n].double(), wanted.view(shape))


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
    copies=st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_draws_do_not_depend_on_the_batch(images, copies, seed, data):
    rows = data.draw(st.lists(st.integers(0, len(images) - 1), max_size=6))
    some = data.draw(st.lists(st.integers(0, len(copies) - 1), max_size=4))
    whole = philox_uniform(index(*images), index(*copies), (3, 5), seed=seed, step=4)
    part = philox_uniform(index(*images)[rows], index(*copies)[some], (3, 5), seed=seed, step=4)
    assert torch.equal(part, whole[some][:, rows])


def test_images_three_and_seven_draw_the_same_in_any_company():
    whole = philox_uniform(index(1, 3, 7, 9), index(0, 1, 2), (3, 4, 4), seed=5)
    assert torch.equal(philox_uniform(index(3, 7), index(0, 1, 2), (3, 4, 4), seed=5), whole[:, [1, 2]])
    assert torch.equal(philox_uniform(index(1, 3, 7, 9), index(2), (3, 4, 4), seed=5), whole[2:])


def test_indices_may_lie_anywhere_in_memory():
    images = torch.arange(10)[1::3]
    draws = philox_uniform(images, index(4).expand(3), (6,), seed=1)
    assert torch.equal(draws, philox_uniform(images.clone(), index(4, 4, 4), (6,), seed=1))


def test_every_key_changes_every_draw():
    base = {"images": index(3), "copies": index(1), "shape": (512,), "seed": 8, "step": 2, "purpose": 5}
    draws = philox_uniform(**base)
    changes = [
        {"images": index(4)},
        {"copies": index(2)},
        {"seed": 9},
        {"seed": 8 + 2**32},
        {"step": 3},
        {"purpose": 6},
        {"purpose": 4},
    ]
    for change in changes:
        other = philox_uniform(**{**base, **change})
        # Two 24-bit draws agree by chance once in 2^24.
        assert int((other == draws).sum()) <= 1
        assert abs(float(torch.corrcoef(torch.stack((other, draws)).flatten(1))[0, 1])) < 0.2
    assert torch.equal(philox_uniform(**base), draws)


def test_draws_are_uniform_and_uncorrelated():
    draws = philox_uniform(torch.arange(20), torch.arange(5), (1000,), seed=123).double()
    counts = torch.histc(draws, bins=100, min=0, max=1)
    # Chi-square of 99 degrees of freedom: mean 99, deviation 14.
    assert 50 < float(((counts - 1000) ** 2 / 1000).sum()) < 160
    centred = draws.flatten() - 0.5
    for lag in (1, 2, 3, 4, 1000, 20000):
        assert abs(float((centred[lag:] * centred[:-lag]).mean()) * 12) < 0.02


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 8 / 255), (-0.3, 0.7), (2.0, 2.0), (-5.0, -4.0)])
def test_bounds(low, high):
    unit = philox_uniform(index(0, 1), index(0, 1), (3, 9), seed=2)
    draws = philox_uniform(index(0, 1), index(0, 1), (3, 9), seed=2, low=low, high=high)
    assert draws.dtype == torch.float32
    cases.assert_near(draws, unit.double() * (high - low) + low, ulps=2, scale=max(abs(low), abs(high)))
    assert bool((draws >= low).all())
    assert bool((draws <= high).all())


def test_the_least_and_the_greatest_draw():
    # Found by trying: the word of image 921823 is the greatest there is, that of image 372860 the least.
    greatest = philox_uniform(index(921823), index(0), (4,), seed=0)[0, 0, 2]
    least = philox_uniform(index(372860), index(0), (4,), seed=0)[0, 0, 3]
    assert float(greatest) == 1 - 2**-24
    assert float(least) == 0.0
    noise = philox_uniform(index(921823), index(0), (4,), seed=0, low=-8 / 255, high=8 / 255)[0, 0, 2]
    assert float(noise) < 8 / 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 1, dtype=torch.int64)}, r"images: got shape \[2, 1\]; allowed is \[any\]"),
        ({"images": torch.zeros(2, dtype=torch.int32)}, "images: got dtype torch.int32; allowed is torch.int64"),
        ({"images": torch.zeros(2)}, "images: got dtype torch.float32"),
        ({"copies": torch.tensor(1)}, r"copies: got shape \[\]"),
        ({"copies": torch.zeros(2, dtype=torch.uint8)}, "copies: got dtype torch.uint8"),
        (
            {"copies": torch.zeros(2, dtype=torch.int64, device="meta")},
            "copies: on meta; allowed is the device of images, cpu",
        ),
        ({"shape": (3, -1)}, "shape: got -1; allowed is a whole number, at least 0"),
        ({"seed": -1}, "seed: got -1; allowed is a whole number, 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"seed": 1.0}, "seed: got 1.0"),
        ({"step": 2**32}, "step: got 4294967296; allowed is a whole number, 0 to 4294967295"),
        ({"step": -1}, "step: got -1"),
        ({"step": torch.tensor(1.0)}, "step: got dtype torch.float32; allowed is torch.int64"),
        ({"step": torch.tensor([1])}, r"step: got shape \[1\]; allowed is \[\]"),
        ({"step": torch.tensor(1, device="meta")}, "step: on meta; allowed is the device of images, cpu"),
        ({"purpose": 256}, "purpose: got 256; allowed is a whole number, 0 to 255"),
        ({"purpose": True}, "purpose: got True"),
        ({"low": 1.0, "high": 0.5}, "low, high: got 1.0, 0.5; allowed is low <= high"),
        ({"low": math.nan}, "low: got nan; allowed is a finite number"),
        ({"high": math.inf}, "high: got inf; allowed is a finite number"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        philox_uniform(**{"images": index(0, 1), "copies": index(0), "shape": (3,), "seed": 0, **change})


def test_the_operator():
    checks.operator("philox_uniform", index(1, 2, 3), index(0, 4), (3, 5), 7, 8, 2, 9, -0.5, 0.5)
    checks.operator("philox_uniform", index(1, 2, 3), index(0, 4), (3, 5), 7, 8, 0, 9, -0.5, 0.5, torch.tensor(2))


def test_a_step_in_memory_is_a_step():
    step = torch.tensor(3)
    for number in (3, 2**32 - 1, 0):
        step.fill_(number)
        draws = philox_uniform(index(1, 2), index(0, 4), (3, 5), seed=9, step=step)
        assert torch.equal(draws, philox_uniform(index(1, 2), index(0, 4), (3, 5), seed=9, step=number))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 1, dtype=torch.int64), "images: got shape"),
        (1, torch.zeros(2), "copies: got dtype float32; allowed is int64"),
        (2, (3, -1), "shape: got -1"),
        (3, 2**32, "seed_low: got 4294967296; allowed is"),
        (5, -1, "step: got -1; allowed is"),
        (6, 256, "purpose: got 256; allowed is"),
        (7, 1.0, "low, high: got 1, 0.5; allowed is"),
    ],
)
def test_the_operator_and_its_fake_refuse(place, value, message):
    given = [index(1, 2, 3), index(0, 4), (3, 5), 7, 8, 2, 9, -0.5, 0.5]
    given[place] = value
    checks.refusal("philox_uniform", tuple(given), message)


@pytest.mark.cpu_only
def test_a_step_in_memory_is_checked_on_the_cpu():
    for number in (-1, 2**32):
        with pytest.raises(RuntimeError, match=rf"^step: got {number}; allowed is 0 to 4294967295"):
            philox_uniform(index(0), index(0), (4,), seed=0, step=torch.tensor(number))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("images", "copies"), [(index(-1), index(0)), (index(2**32), index(0)), (index(0), index(2**24))]
)
def test_indices_are_checked_on_the_cpu(images, copies):
    with pytest.raises(RuntimeError, match=r"^(images|copies): got -?\d+; allowed is 0 to \d+"):
        philox_uniform(images, copies, (4,), seed=0)


@pytest.mark.cpu_only
@pytest.mark.parametrize("shape", [(3, 130, 131), (65537,)])
def test_threads_change_nothing(shape):
    checks.same_on_any_thread_count(lambda: [philox_uniform(index(5, 6, 7), index(0, 1), shape, seed=3)])


def test_it_compiles_whole():
    images, copies = index(5, 6, 7), index(0)
    factor = cases.random((1, 3, 4), 1, torch.float32).requires_grad_()
    checks.compiles_whole(lambda factor: factor * philox_uniform(images, copies, (4,), seed=3), factor)

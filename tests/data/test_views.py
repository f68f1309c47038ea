import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from alignfast.data import augmented, load_dataset, loader


@pytest.fixture
def dataset(tmp_path):
    draw = np.random.default_rng(0)
    for index, (height, width) in enumerate([(40, 30), (30, 40), (64, 20), (33, 33)]):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "c" / f"{index}.png")
    return load_dataset(tmp_path, image_size=(8, 8))


def test_views_do_not_depend_on_order(dataset):
    views = augmented(dataset, (16, 12), seed=2)
    forward = [views[index].image for index in range(4)]
    torch.rand(3)
    for index in (3, 1, 0, 2):
        assert torch.equal(views[index].image, forward[index])
    batch = next(iter(loader(views, 4, shuffle=True)))
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        assert torch.equal(image, forward[index])


def test_views_change_with_seed_epoch_and_index(dataset):
    views = augmented(dataset, (16, 16))
    first = views[1].image
    assert not torch.equal(augmented(dataset, (16, 16), seed=1)[1].image, first)
    views.set_epoch(1)
    assert not torch.equal(views[1].image, first)
    views.set_epoch(0)
    assert torch.equal(views[1].image, first)


def test_the_loader_passes_the_epoch_on(dataset):
    batches = loader(augmented(dataset, (16, 16)), 4)
    first = next(iter(batches)).images
    batches.set_epoch(5)
    views = augmented(dataset, (16, 16))
    views.set_epoch(5)
    assert not torch.equal(next(iter(batches)).images, first)
    assert torch.equal(next(iter(batches)).images[3], views[3].image)


def test_a_view_is_torchvisions_view_of_the_full_image(dataset):
    """Images are cropped at full resolution although the data set itself would give them in 8 x 8."""
    views = augmented(dataset, (20, 20), scale=(1.0, 1.0), flip=False)
    full = Image.fromarray(dataset.read(3).permute(1, 2, 0).numpy())
    assert full.size == (33, 33)
    # The aspect ratio is drawn even at scale 1; where no crop of it fits, the centre is taken, here the whole image.
    matches = []
    for epoch in range(40):
        views.set_epoch(epoch)
        matches.append(torch.equal(views[3].image, v2.functional.pil_to_tensor(full.resize((20, 20), 2)) / 255))
    assert any(matches)


def test_views_are_8_bit_images_in_range_with_their_labels(dataset):
    image, label, index = augmented(dataset, (16, 16))[2]
    assert (label, index) == (0, 2)
    assert image.dtype == torch.float32
    assert torch.equal((image * 255).round() / 255, image)


def test_half_of_the_views_are_mirrored(dataset):
    plain = augmented(dataset, (16, 16), flip=False)
    flipping = augmented(dataset, (16, 16), flip=True)
    mirrored = 0
    for epoch in range(50):
        plain.set_epoch(epoch)
        flipping.set_epoch(epoch)
        for index in range(4):
            before, after = plain[index].image, flipping[index].image
            mirrored += torch.equal(after, before.flip(2))
            assert torch.equal(after, before) or torch.equal(after, before.flip(2))
    assert 70 < mirrored < 130  # 200 fair flips: four standard deviations and more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 4)}, "size: got 0"),
        ({"scale": (0.0, 1.0)}, "scale: got 0.0"),
        ({"scale": (0.5, 1.5)}, "scale: got 1.5"),
        ({"scale": (0.9, 0.5)}, "scale: got 0.9"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_arguments_are_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        augmented(dataset, **{"size": (8, 8), **arguments})

import re
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from alignfast.data import Batch, as_batches, augmented, load_dataset, loader

COUNT = 11


@pytest.fixture
def dataset(tmp_path):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (COUNT, 20, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(COUNT, dtype=np.int64) % 4)
    return load_dataset(tmp_path / "a.npz")


class Stream(IterableDataset):
    def __init__(self, dataset, indexed):
        self.dataset, self.indexed = dataset, indexed

    def __iter__(self):
        for image, label, index in self.dataset:
            yield (image, label, index + 100) if self.indexed else (image, label)


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


def order(batches):
    return torch.cat([batch.indices for batch in batches]).tolist()


def test_batches_unpack_and_cover_the_data_set_once(dataset):
    batches = list(loader(dataset, 4))
    images, labels, indices = batches[0]
    assert images.shape == (4, 3, 20, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == indices.dtype == torch.int64
    assert [len(batch.images) for batch in batches] == [4, 4, 3]
    assert order(batches) == list(range(COUNT))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), dataset.labels)
    assert torch.equal(images[2], dataset[2].image)


def test_drop_last(dataset):
    assert len(loader(dataset, 4)) == 3
    dropping = loader(dataset, 4, drop_last=True)
    assert len(dropping) == len(list(dropping)) == 2


def test_the_order_is_a_function_of_seed_and_epoch(dataset):
    batches = loader(dataset, 4, shuffle=True, seed=3)
    first = order(batches)
    torch.rand(5)
    assert order(batches) == first == order(loader(dataset, 2, shuffle=True, seed=3))
    assert sorted(first) == list(range(COUNT)) != first
    batches.set_epoch(1)
    second = order(batches)
    assert second != first
    assert order(loader(dataset, 4, shuffle=True, seed=4)) not in (first, second)
    batches.set_epoch(0)
    assert order(batches) == first


def test_an_epoch_is_taken_up_in_the_middle(dataset):
    batches = loader(dataset, 4, shuffle=True)
    assert same(batches.iterate(2), list(batches)[2:])
    assert same(loader(Stream(dataset, False), 4).iterate(2), list(loader(dataset, 4))[2:])


def test_loading_leaves_the_global_generator_alone(dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(loader(augmented(dataset, (8, 8)), 4, shuffle=True))
    list(loader(dataset, 4, workers=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("indexed", [False, True])
def test_iterables_are_numbered_in_order(dataset, indexed):
    stream = Stream(dataset, indexed)
    batches = list(loader(stream, 4))
    assert order(batches) == [index + 100 * indexed for index in range(COUNT)]
    assert torch.equal(batches[1].images, next(loader(dataset, 4).iterate(1)).images)
    assert [len(batch.images) for batch in loader(stream, 4, drop_last=True)] == [4, 4]


def test_any_indexable_data_set_is_numbered_by_position():
    batches = list(loader(TensorDataset(torch.rand(5, 3, 4, 4), torch.arange(5)), 2, shuffle=True))
    assert all(torch.equal(batch.labels, batch.indices) for batch in batches)


def test_workers_change_nothing(dataset):
    views = augmented(dataset, (8, 8), seed=1)
    for epoch in (0, 3):
        alone, helped = loader(views, 4, shuffle=True), loader(views, 4, shuffle=True, workers=2)
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert same(alone, helped)


def test_reading_ahead_changes_nothing(dataset):
    plain, ahead = (loader(dataset, 4, shuffle=True, seed=2, ahead=given) for given in (False, True))
    assert same(ahead, plain)
    assert same(ahead.iterate(1), plain.iterate(1))
    assert same(ahead.iterate(3), [])
    for rank in range(2):
        assert same(ahead.deal(rank, 2), plain.deal(rank, 2))
        assert same(ahead.shard(rank, 2), plain.shard(rank, 2))
    # Of the last batch there are three images, so that a fourth rank has none.
    assert same(ahead.shard(0, 4), plain.shard(0, 4))


class Watched:
    """Says which of its images have been read; image 7 cannot be."""

    def __init__(self):
        self.read = [threading.Event() for _ in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.read[index].set()
        if index == 7:
            raise ValueError("image 7 is torn")
        return torch.full((3, 2, 2), index / COUNT), index


def test_one_batch_is_read_ahead():
    watched = Watched()
    batches = iter(loader(watched, 2, ahead=True))
    before = threading.active_count()
    next(batches)
    assert all(watched.read[index].wait(60) for index in (2, 3))
    assert not any(one.is_set() for one in watched.read[4:])
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_an_error_ahead_comes_in_its_turn():
    watched = Watched()
    batches = iter(loader(watched, 2, ahead=True))
    assert order(next(batches) for _ in range(3)) == [0, 1, 2, 3, 4, 5]
    assert watched.read[7].wait(60)
    with pytest.raises(ValueError, match="image 7 is torn"):
        next(batches)


def test_a_batch_is_filled_by_its_first_image(dataset):
    last = list(loader(dataset, 4))[-1]
    filled = last.filled(5)
    assert filled.indices.tolist() == [8, 9, 10, 8, 8]
    assert torch.equal(filled.images, dataset_images(dataset, filled.indices))
    assert torch.equal(filled.labels, dataset.labels[filled.indices])
    assert same([last.filled(3), last.filled(0)], [last, last])


def dataset_images(dataset, indices):
    return torch.stack([dataset[index].image for index in indices.tolist()])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_line_from_any_process(tmp_path, workers):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "torn.png").write_bytes(b"\x89PNG")
    pattern = f"^{re.escape(str(tmp_path / 'cat' / 'torn.png'))}: not readable as an image"
    with pytest.raises(ValueError, match=pattern) as caught:
        list(loader(load_dataset(tmp_path), 2, workers=workers))
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_are_refused():
    samples = [(torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 5), 1)]
    with pytest.raises(ValueError, match=r"image 0 is \[3, 4, 4\] where image 1 is \[3, 4, 5\]; give image_size"):
        list(loader(samples, 2))
    assert len(list(loader(samples, 1))) == 2


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.rand(3, 4, 4)], r"sample 0 is torch.float32 \[3, 4, 4\]; allowed is \(image, label\)"),
        ([(torch.rand(3, 4, 4), 0, 0, 0)], "sample 0 is a tuple of 4"),
        ([("a.png", 0)], "sample 0 is a tuple of 2"),
        ([(torch.zeros(3, 4, 4, dtype=torch.uint8), 0)], "image 0 is torch.uint8; allowed is floating-point"),
    ],
)
def test_bad_samples_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        list(loader(samples, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"workers": 1.5}, "workers: got 1.5"),
    ],
)
def test_bad_arguments_are_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        loader(dataset, **{"batch_size": 2, **arguments})


def test_iterables_allow_neither_shuffling_nor_workers(dataset):
    for name, value in (("shuffle", True), ("workers", 2), ("ahead", True)):
        with pytest.raises(ValueError, match=f"{name}: got {value}; .* read in its own order"):
            loader(Stream(dataset, False), 2, **{name: value})
    with pytest.raises(ValueError, match="dataset: got int; allowed is"):
        loader(5, 2)


def test_users_batches_get_running_positions(dataset):
    users = DataLoader(TensorDataset(torch.rand(5, 3, 4, 4), torch.arange(5, dtype=torch.int32)), batch_size=2)
    batches = list(as_batches(users))
    assert all(isinstance(batch, Batch) and batch.labels.dtype == torch.int64 for batch in batches)
    assert order(batches) == [0, 1, 2, 3, 4]


def test_users_indices_and_own_batches_are_kept(dataset):
    given = (torch.rand(2, 3, 4, 4), torch.tensor([1, 0]), torch.tensor([9, 4]))
    assert order(as_batches([given])) == [9, 4]
    batches = loader(dataset, 4, shuffle=True)
    assert same(as_batches(batches), batches)


LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(2, 3, 4, 4), r"batch 0 is torch.float32 \[2, 3, 4, 4\]; allowed is \(images, labels\) or"),
        ((torch.rand(2, 3, 4, 4),), "batch 0 is a tuple of 1"),
        ({"images": 0}, "batch 0 is of type dict"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), LABELS), "images of batch 0 are torch.uint8"),
        ((torch.rand(3, 4, 4), LABELS), r"images of batch 0 are torch.float32 \[3, 4, 4\]"),
        ((torch.rand(2, 3, 4, 4), LABELS.float()), "labels of batch 0 are torch.float32"),
        ((torch.rand(2, 3, 4, 4), torch.zeros(2, 10).long()), r"labels of batch 0 are torch.int64 \[2, 10\]"),
        ((torch.rand(2, 3, 4, 4), [0, 1]), "labels of batch 0 are a list of 2"),
        ((torch.rand(2, 3, 4, 4), LABELS, LABELS[:1]), "indices of batch 0 are"),
        ((torch.randn(2, 3, 4, 4), LABELS), r"images of batch 0: values span .* allowed is \[0, 1\]"),
    ],
)
def test_bad_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        list(as_batches([batch]))


def test_what_cannot_be_iterated_is_refused_at_once():
    with pytest.raises(ValueError, match="loader: got int"):
        as_batches(5)

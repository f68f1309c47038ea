"""Parts of batches for training and whole batches for evaluation, rank by rank, without any process but this one."""

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from alignfast.data import augmented, load_dataset, loader

COUNT = 11
WORLDS = (1, 2, 3, 4, 7)


@pytest.fixture
def dataset(tmp_path):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (COUNT, 10, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(COUNT, dtype=np.int64) % 4)
    return load_dataset(tmp_path / "a.npz")


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        for image, label, index in self.dataset:
            yield image, label, index + 100


def joined(parts):
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_parts(whole, shards, start=0):
    """Every global batch is its parts in the order of the ranks, whose sizes differ by at most one."""
    batches = list(whole)[start:]
    passes = [list(shard.iterate(start)) for shard in shards]
    assert {len(batches)} == {len(each) for each in passes}
    for batch, *parts in zip(batches, *passes, strict=True):
        sizes = [len(part.images) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert all(part.images.shape[1:] == batch.images.shape[1:] for part in parts)
        assert all(part.labels.dtype == part.indices.dtype == torch.int64 for part in parts)
        assert equal(joined(parts), batch)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch_size", [4, 5])
def test_parts_make_up_the_global_batch(dataset, world, batch_size):
    """With 4 the last batch has three images, with 5 one: fewer than most of the worlds."""
    for drop_last in (False, True):
        whole = loader(augmented(dataset, (6, 6)), batch_size, shuffle=True, seed=2, drop_last=drop_last)
        shards = [whole.shard(rank, world) for rank in range(world)]
        assert {len(shard) for shard in shards} == {len(whole)}
        assert sum(shard.images for shard in shards) == whole.images == (batch_size * 2 if drop_last else COUNT)
        for epoch in (0, 1):
            for each in (whole, *shards):
                each.set_epoch(epoch)
            check_parts(whole, shards)
        check_parts(whole, shards, start=1)


def test_workers_change_no_part(dataset):
    whole = loader(augmented(dataset, (6, 6)), 5, shuffle=True)
    for rank in range(3):
        alone = list(whole.shard(rank, 3))
        helped = list(loader(augmented(dataset, (6, 6)), 5, shuffle=True, workers=1).shard(rank, 3))
        assert [len(batch.images) for batch in alone[-1:]] == [1 if rank == 2 else 0]
        assert all(equal(*batches) for batches in zip(alone, helped, strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_streams_are_divided_by_position(dataset, world):
    whole = loader(Stream(dataset), 5)
    shards = [whole.shard(rank, world) for rank in range(world)]
    check_parts(whole, shards)
    check_parts(whole, shards, start=1)
    indexed = [loader(dataset, 5).shard(rank, world) for rank in range(world)]
    for shard, other in zip(shards, indexed, strict=True):
        assert [b.indices.tolist() for b in shard] == [(b.indices + 100).tolist() for b in other]
    dropping = loader(Stream(dataset), 5, drop_last=True)
    check_parts(dropping, [dropping.shard(rank, world) for rank in range(world)])


@pytest.mark.parametrize("world", WORLDS)
def test_whole_batches_are_dealt_in_turn(dataset, world):
    for whole in (loader(dataset, 3), loader(dataset, 3, shuffle=True, drop_last=True), loader(Stream(dataset), 3)):
        batches = list(whole)
        for rank in range(world):
            dealt = whole.deal(rank, world)
            own = list(dealt)
            assert len(own) == len(batches[rank::world])
            assert all(equal(*pair) for pair in zip(own, batches[rank::world], strict=True))
            assert all(equal(*pair) for pair in zip(dealt.iterate(1), own[1:], strict=True))
            if not isinstance(whole.dataset, Stream):
                assert (len(dealt), dealt.images) == (len(own), sum(len(batch.images) for batch in own))


def test_a_loader_stays_whole_when_it_is_divided(dataset):
    whole = loader(dataset, 4, shuffle=True)
    before = [batch.indices.tolist() for batch in whole]
    whole.shard(1, 2).set_epoch(3)
    assert [batch.indices.tolist() for batch in whole] == before
    for divided in (whole.shard(0, 2), whole.deal(1, 2)):
        for divide in (divided.shard, divided.deal):
            with pytest.raises(ValueError, match=r"is that of rank . of 2; allowed is one of the whole data"):
                divide(0, 2)
    # One of one is still the whole.
    check_parts(whole, [whole.shard(0, 1).deal(0, 1).shard(rank, 2) for rank in range(2)])


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0), (0.5, 2)])
def test_ranks_that_do_not_exist_are_refused(dataset, rank, world):
    for divide in (loader(dataset, 4).shard, loader(dataset, 4).deal):
        with pytest.raises(ValueError, match=r"^(rank|world): got "):
            divide(rank, world)


def test_an_empty_part_passes_for_a_batch(dataset):
    part = next(iter(loader(dataset, 2).shard(0, 3)))
    assert part.images.shape == (0, 3, 10, 8)
    assert part.images.dtype == torch.float32
    assert part.labels.shape == part.indices.shape == (0,)


def test_a_bad_image_of_another_rank_is_that_ranks_error():
    samples = [(torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 4), 0), ("torn", 0)]
    whole = loader(samples, 4)
    assert len(next(iter(whole.shard(0, 2))).images) == 2
    with pytest.raises(ValueError, match="sample 3 is a tuple of 2"):
        list(whole.shard(1, 2))

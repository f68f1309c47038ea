import pytest
import torch

from alignfast.kernels.launch import alignment_of, blocks_of, for_classes, for_elements, for_pixels, for_tiles, launch


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 21841, 224 * 224, 2**31])
def test_blocks_are_powers_of_two_that_fill_their_threads(size, itemsize):
    rows, tile = for_tiles(size, itemsize)
    for choice in (for_elements(itemsize), for_pixels(size), for_classes(size, itemsize), tile):
        assert choice.block & (choice.block - 1) == 0
        assert choice.warps in (1, 2, 4, 8)
    assert rows * tile.block <= 1024
    assert for_classes(size, itemsize).block * max(itemsize, 4) <= 32 * 32 * for_classes(size, itemsize).warps * 2


def test_the_last_block_may_be_partly_filled():
    assert [blocks_of(4, count) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("sizes", "alignment"), [((1000, 1000), 8), ((1024,), 16), ((21841,), 1), ((16, 6), 2), ((0, 32), 16)]
)
def test_the_alignment_divides_all_sizes(sizes, alignment):
    assert alignment_of(*sizes) == alignment


class Refusing:
    __name__ = "kernel"

    def __getitem__(self, grid):
        raise ValueError("no such device")


def test_a_failed_launch_names_the_kernel_the_grid_and_the_sizes():
    message = r"^kernel: launch of 3 programs of 4 warps for a tensor of \[2, 5\] failed: no such device"
    with pytest.raises(RuntimeError, match=message):
        launch(Refusing(), torch.zeros(2, 5), 3, for_elements(4))
    with pytest.raises(RuntimeError, match="a grid has at most 2147483647 programs"):
        launch(Refusing(), torch.zeros(2, 5), 2**31, for_elements(4))

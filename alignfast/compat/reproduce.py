"""The authors' `main.py` (averyma/model-alignment, July 2024): their arguments and protocol over this package's parts.

`alignfast reproduce ARGUMENTS` aligns a source to a witness, or takes a model with --eval_arch, and measures it.
docs/reproduce.md lists the faults of their code, what is done here instead, and which flag restores it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.transforms import v2

from alignfast.alignment import AlignConfig, align
from alignfast.alignment.embeddings import EMBEDDINGS
from alignfast.alignment.held_out import MOST_CLEAN
from alignfast.attacks import Attack, create
from alignfast.checks import check_choice, check_count, check_device, hint
from alignfast.data import Batch, ImageDataset, Loader, augmented, load_dataset, loader
from alignfast.data.images import pixels_of, to_pil, to_pixels, to_tensor
from alignfast.data.views import stream_seed
from alignfast.distributed import current, gather, main, on_main, process_group
from alignfast.evaluation.judging import errors_of
from alignfast.evaluation.matrix_result import Cell, TransferMatrix, rate_text
from alignfast.files import claim_folder, replacing, write_json, write_text
from alignfast.models import Classifier, evaluating, load_model, save_checkpoint
from alignfast.models.checkpoint import read_state_dict
from alignfast.progress import progress
from alignfast.versions import package_versions

__all__ = ["qualified", "reproduce"]

Flags = NDArray[np.bool_]
Stage = Literal["source", "witness", "eval", "target"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PCT = 224 / 256
EVALUATION_BATCH = 32
DEBUG_STEPS = 3
DEBUG_QUALIFIED = 100
# Above this, an unreadable image stops the run when its turn comes, instead of before it.
MOST_VERIFIED = 2000

TIMM = {
    "vit_t_16": "vit_tiny_patch16_224",
    "vit_s_16": "vit_small_patch16_224",
    "vit_b_16": "vit_base_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "inception_v3": "inception_v3",
}
SHORT = {"res18": "resnet18", "res50": "resnet50", "res101": "resnet101"}
ATTACKS = {
    "pgd": "pgd",
    "mi": "mifgsm",
    "ni": "nifgsm",
    "vni": "vnifgsm",
    "vmi": "vmifgsm",
    "sini": "sinifgsm",
    "ti": "tifgsm",
    "di": "difgsm",
}
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


def reproduce(arguments: Sequence[str]) -> None:
    """Run with the arguments of the authors' main.py; --help prints them.

    Writes into --output_dir: config.json, result.json, history.jsonl of an alignment, and with --save_modified_model
    model/final_model.pt and model/final_model.safetensors. Among processes that torchrun started, each takes its part
    of every batch that is trained on, and whole batches of what is measured; rank 0 writes and prints.

    Raises:
        ValueError, FileNotFoundError: unknown arguments, models or values, files that are missing or do not fit, or a
            folder that holds another run; before any model is trained or attacked.
    """
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return
    args = parse(arguments)
    config = None if args.eval_arch else config_of(args)
    args.device = str(check_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    with process_group(args.device):
        _reproduce(args, config)


def _reproduce(args: argparse.Namespace, config: AlignConfig | None) -> None:
    models = {role: load(role, args) for role in roles(args)}
    source = models["eval" if args.eval_arch else "source"]
    _check_classes(models, source)
    train = None if config is None else _verified(load_dataset(Path(args.data_dir) / "train", **_classes(source)))
    val = _validation(args, source) if args.eval_standard or args.eval_whitebox or args.eval_transfer else None
    attack = attack_of(args, source)
    run_with = {"command": "reproduce", **vars(args), "versions": package_versions()}
    folder = on_main(lambda: claim_folder(args.output_dir, run_with, resume=True))
    _note_processes(args)
    result: dict[str, Any] = {"loss": None, "loss_cls": None, "loss_align": None}
    if config is not None and train is not None:
        result |= _aligned(args, config, source, models["witness"], train, val, folder)
    result |= {"test-err": None, "whitebox-err": None}
    if val is not None:
        result |= _measured(args, source, models.get("target"), val, attack)
    if main():
        write_json(folder / "result.json", result | {"versions": package_versions()})
        print(folder / "result.json")


def qualified(
    source_right: Flags, target_right: Flags, source_fooled: Flags, target_fooled: Flags, *, parity: bool = False
) -> Flags:
    """bool [N]: the images that count, from who is right when clean and who is wrong when attacked itself.

    parity: the released code's chain of equalities, which holds wherever an even number of the four are false, also
    where neither model is right on the clean image.
    """
    if not parity:
        return source_right & target_right & source_fooled & target_fooled
    chained: Flags = ((source_right == target_right) == source_fooled) == target_fooled
    return chained


@dataclass(frozen=True)
class Transfer:
    """Of the N images seen: which qualify, and on which the target is wrong after the attack on the source."""

    counted: Flags
    fooled: Flags
    target_right: Flags
    source_fooled: Flags

    def cell(self, source: str, attack: str, target: str) -> Cell:
        return Cell.counted(
            source,
            attack,
            target,
            errors=int((self.counted & self.fooled).sum()),
            n=int(self.counted.sum()),
            clean_accuracy=float(self.target_right.mean()),
            white_box=float(self.source_fooled.mean()),
        )


def transfer(
    source: Classifier,
    target: Classifier,
    batches: Iterable[Batch],
    attacks: tuple[Attack, Attack],
    enough: int,
    *,
    parity: bool = False,
) -> Transfer:
    """Attack source and target on batch after batch, until more than `enough` images qualify or there are no more.

    batches: of this rank, as `Loader.deal` gives them; what is returned is of those of all ranks, as one process would
    see them. attacks: on the source and on the target.
    """
    parts: list[Transfer] = []
    count = 0
    with evaluating(source, target), progress("transfer", enough, "qualified images", shown=main()) as advance:
        for part in _in_turn(_attacked(source, target, batch, attacks, parity) for batch in batches):
            parts.append(part)
            count += int(part.counted.sum())
            advance(int(part.counted.sum()), "")
            if count > enough:
                break
    columns = zip(*((part.counted, part.fooled, part.target_right, part.source_fooled) for part in parts), strict=True)
    return Transfer(*(np.concatenate(column) for column in columns))


def _attacked(
    source: Classifier, target: Classifier, batch: Batch, attacks: tuple[Attack, Attack], parity: bool
) -> Transfer:
    labels, both = batch.labels, [source, target]
    right = ~errors_of(source, both, [batch], None, labels)
    fooled = errors_of(source, both, [batch], attacks[0], labels)
    (target_fooled,) = errors_of(target, [target], [batch], attacks[1], labels)
    counted = qualified(right[0], right[1], fooled[0], target_fooled, parity=parity)
    return Transfer(counted, fooled[1], right[1], fooled[0])


def _in_turn(own: Iterable[Transfer]) -> Iterator[Transfer]:
    """Those of all ranks on every rank, in the order of the batches that were dealt to them; the ranks do one each,
    and then wait for each other."""
    remaining = iter(own)
    while True:
        found = [part for part in gather(next(remaining, None)) if part is not None]
        if not found:
            return
        yield from found


@dataclass(frozen=True)
class CentreCrop:
    """torchvision's Resize(256) and CenterCrop(224) of 8-bit images [C, H, W], in proportion for another `side`."""

    side: int

    def __call__(self, image: Tensor) -> Tensor:
        resized = v2.functional.resize(to_pil(to_pixels(image)), [round(self.side / CROP_PCT)], antialias=True)
        return to_tensor(pixels_of(v2.functional.center_crop(resized, [self.side]), image.shape[0]))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, each of a kind that is allowed; ValueError for others and for unknown ones."""
    made = parser()
    args, unknown = made.parse_known_args(arguments)
    if unknown:
        options = [option for action in made._actions for option in action.option_strings]
        raise ValueError(f"{unknown[0]}: no such argument{hint(unknown[0].partition('=')[0], options)}; see --help")
    check_choice("dataset", args.dataset, ("imagenet",))
    for name in ("image_size", "num_eval", "batch_size"):
        check_count(name, getattr(args, name))
    check_count("workers", args.workers, low=0)
    return args


def parser() -> argparse.ArgumentParser:
    made = _Parser(prog="alignfast reproduce", description="The authors' main.py; see docs/reproduce.md.")
    add = made.add_argument
    add("--output_dir", required=True, help="a new or empty folder, or that of the same run")
    add("--data_dir", required=True, help="a folder with train/ and val/, each with one folder a class")
    for role in ("source", "witness", "target", "eval"):
        add(f"--{role}_arch", help=f"{', '.join([*SHORT, *TIMM])} or a name of torchvision.models")
        add(f"--{role}_dir", help="its checkpoint")
    _add_training(made)
    _add_evaluation(made)
    for name, kind, value in (("world-size", int, -1), ("rank", int, -1), ("dist-backend", str, "nccl")):
        add(f"--{name}", type=kind, default=value, help="without effect")
    add("--dist-url", default="tcp://224.66.41.62:23456", help="without effect")
    add("--multiprocessing-distributed", action="store_true", help="without effect: torchrun starts several processes")
    add("--device", help="not of the authors: cpu, cuda or cuda:N; a GPU if there is one")
    add("--image_size", type=int, default=224, help="not of the authors: side of the images")
    add("--faithful-quirks", action="store_true", help="the released mask of qualified images, and no autocast")
    return made


def _add_training(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--method", default="kl", help=f"kl, alone or with an embedding loss: {', '.join(EMBEDDINGS)}")
    add("--dataset", default="imagenet", help="imagenet, that is class folders below train/ and val/")
    add("--lr", type=_real, default=1e-3)
    add("--lr_scheduler_type", default="cosine", help="cosine or fixed")
    add("--optim", default="sgd", help="sgd or adamw")
    add("--momentum", type=_real, default=0.9)
    add("--weight_decay", type=_real, default=1e-4)
    add("--nesterov", type=_flag, default=True)
    add("--lr_warmup_type", default="linear", help="without effect")
    add("--lr_warmup_epoch", type=int, default=0, help="0")
    add("--lr_warmup_decay", type=_real, default=0.03, help="without effect")
    add("--batch_size", type=int, default=32)
    add("--epoch", type=int, default=1, help="passes over train/")
    add("--seed", type=int, default=0)
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="align under bfloat16 autocast")
    add("--clip_grad_norm", type=_clip, default=None, help="a number, or none")
    add("--save_modified_model", type=_flag, default=False)
    add("--kl_temp", type=_real, default=4.0)
    add("--lambda_cls", type=_real, default=0.0)
    add("--lambda_kd", type=_real, default=1.0)
    add("--debug", type=_flag, default=False, help="3 steps of alignment, 1 of attacks, few images")
    add("--print_freq", type=int, default=1000, help="without effect")
    add("-j", "--workers", type=int, default=4, help="processes that read images; 0 reads in this one")


def _add_evaluation(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--eval_standard", type=_flag, default=False, help="error of the source on val/")
    add("--eval_whitebox", type=_flag, default=False, help="error of the source on val/, attacked")
    add("--eval_transfer", type=_flag, default=True, help="error of the target on images that fool the source")
    add("--pgd_itr", type=int, default=20)
    add("--pgd_eps", type=_real, default=4 / 255)
    add("--pgd_alpha", type=_real, default=1 / 255)
    add("--atk", choices=list(ATTACKS), default="pgd")
    add("--num_eval", type=int, default=1000, help="not of the authors: qualified images after which transfer stops")


def _flag(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is 1 or 0, yes or no, true or false")
    return text.lower() in TRUE


def _real(text: str) -> float:
    """0.1, 1e-3, or a quotient such as 4./255."""
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if bottom else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a number or a quotient such as 4./255.") from None


def _clip(text: str) -> float | None:
    return None if text.lower() == "none" else _real(text)


def config_of(args: argparse.Namespace) -> AlignConfig:
    """The recipe; ValueError for values that it has no counterpart of."""
    if args.lr_warmup_epoch:
        raise ValueError(f"lr_warmup_epoch: got {args.lr_warmup_epoch}; allowed is 0")
    check_choice("method", args.method, ("kl", *EMBEDDINGS))
    schedules: dict[str, Literal["cosine", "constant"]] = {"cosine": "cosine", "fixed": "constant"}
    # As there, what begins with sgd is SGD, and lambda_kd is of both parts of what teaches.
    embedding = EMBEDDINGS.get(args.method)
    optimizer = "sgd" if args.optim.startswith("sgd") else check_choice("optim", args.optim, ("sgd", "adamw"))
    return AlignConfig(
        temperature=args.kl_temp,
        embeddings=() if embedding is None else (replace(embedding, weight=args.lambda_kd * embedding.weight),),
        lambda_kd=args.lambda_kd,
        lambda_cls=args.lambda_cls,
        optimizer=cast(Literal["sgd", "adamw"], optimizer),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.nesterov,
        schedule=schedules[check_choice("lr_scheduler_type", args.lr_scheduler_type, schedules)],
        epochs=args.epoch,
        steps=DEBUG_STEPS if args.debug else None,
        clip_norm=args.clip_grad_norm,
        precision="bf16" if args.amp and not args.faithful_quirks else "fp32",
        seed=args.seed,
    )


def roles(args: argparse.Namespace) -> list[Stage]:
    """Whose models are needed, each with an architecture and a checkpoint; ValueError where one is missing."""
    if args.eval_dir and not args.eval_arch:
        raise ValueError("eval_arch: got none beside an eval_dir; allowed is both or neither")
    wanted: list[Stage] = ["eval"] if args.eval_arch else ["source", "witness"]
    if args.eval_transfer:
        wanted.append("target")
    for role in wanted:
        for name in (f"{role}_arch", f"{role}_dir"):
            if not getattr(args, name):
                raise ValueError(f"{name}: got none; it is needed {_why(role)}")
        _spec(role, getattr(args, f"{role}_arch"))
        if not Path(getattr(args, f"{role}_dir")).is_file():
            raise FileNotFoundError(f"{role}_dir: no file {getattr(args, f'{role}_dir')}")
    return wanted


def _why(role: Stage) -> str:
    if role == "target":
        return "unless --eval_transfer 0"
    return "with --eval_arch" if role == "eval" else "unless --eval_arch and --eval_dir are given"


def _spec(role: Stage, arch: str) -> str:
    """The name of an architecture as `load_model` has it."""
    if arch in TIMM:
        return f"timm:{TIMM[arch]}"
    name = SHORT.get(arch, arch)
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        own = [*SHORT, *TIMM]
        raise ValueError(
            f"{role}_arch: got {arch!r}{hint(arch, [*own, *names])}; allowed are {', '.join(own)} and the names of "
            "torchvision.models"
        )
    return f"torchvision:{name}"


def load(role: Stage, args: argparse.Namespace) -> Classifier:
    """The model of a role, of as many classes as its checkpoint's last layer has, with the mean and std of ImageNet.

    Raises:
        ValueError: a checkpoint that does not fit, or a model that does not take images of --image_size.
    """
    arch, path, side = getattr(args, f"{role}_arch"), getattr(args, f"{role}_dir"), args.image_size
    spec = _spec(role, arch)
    last = _last_tensor(spec)
    tensors = read_state_dict(path)
    if last not in tensors:
        raise ValueError(f"{role}_dir: {path} has no {last}; allowed is a checkpoint of {arch}")
    module = load_model(spec, num_classes=len(tensors[last]), checkpoint=path).module
    model = Classifier(module, MEAN, STD, len(tensors[last]), (3, side, side)).to(args.device).eval()
    try:
        with torch.no_grad():
            model.logits(torch.zeros((1, 3, side, side), device=args.device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"image_size: got {side}, which {arch} does not take ({reason})") from error
    return model


def _last_tensor(spec: str) -> str:
    """The name of the bias or weight whose first dimension is the number of classes."""
    library, _, name = spec.partition(":")
    with torch.device("meta"):
        made: nn.Module = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    return list(made.state_dict())[-1]


def _check_classes(models: dict[Stage, Classifier], source: Classifier) -> None:
    for role, model in models.items():
        if model.num_classes != source.num_classes:
            raise ValueError(f"{role}_dir: has {model.num_classes} classes; allowed is {source.num_classes}, as others")


def _classes(model: Classifier) -> dict[str, Any]:
    return {"num_classes": model.num_classes}


def _verified(dataset: ImageDataset) -> ImageDataset:
    if len(dataset) <= MOST_VERIFIED:
        on_main(dataset.verify)
    return dataset


def _validation(args: argparse.Namespace, model: Classifier) -> Subset[Any]:
    """val/ in an order that the seed draws, so that its beginning has all classes."""
    dataset = load_dataset(Path(args.data_dir) / "val", transform=CentreCrop(args.image_size), **_classes(model))
    _verified(dataset)
    generator = torch.Generator().manual_seed(stream_seed("order", args.seed, 0))
    order = torch.randperm(len(dataset), generator=generator).tolist()
    return Subset(dataset, order[:EVALUATION_BATCH] if args.debug else order)


def attack_of(args: argparse.Namespace, model: Classifier) -> Attack:
    steps = 1 if args.debug else args.pgd_itr
    return create(ATTACKS[args.atk], model, eps=args.pgd_eps, alpha=args.pgd_alpha, steps=steps, seed=args.seed)


def _note_processes(args: argparse.Namespace) -> None:
    if (args.multiprocessing_distributed or args.world_size > 1) and current().world == 1:
        print("note: one process does the whole batch, whatever the world size; torchrun starts more", file=sys.stderr)


def _aligned(
    args: argparse.Namespace,
    config: AlignConfig,
    source: Classifier,
    witness: Classifier,
    train: ImageDataset,
    val: Subset[Any] | None,
    folder: Path,
) -> dict[str, Any]:
    """Align the source in place, write history and weights, and give the mean losses over steps and the clean accuracy
    before and after, on the first images of `val`, or else of those trained on."""
    views = augmented(train, (args.image_size, args.image_size), scale=(0.08, 1.0), seed=args.seed)
    # A last batch that does not have an image for every rank is left out.
    short = 0 < len(train) % args.batch_size < current().world
    batches = loader(views, args.batch_size, shuffle=True, seed=args.seed, workers=args.workers, drop_last=short)
    clean = None if val is None else islice(loader(val, EVALUATION_BATCH), MOST_CLEAN // EVALUATION_BATCH)
    found = align(source, witness, batches, config, in_place=True, clean=clean, progress=True)
    history = found.history
    if main():
        write_text(folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
    if main() and args.save_modified_model:
        _save(source, folder / "model", {"source": args.source_arch, "witness": args.witness_arch})
    means = {}
    for ours, theirs in (("loss", "loss"), ("cls", "loss_cls"), ("kd", "loss_align")):
        values = [entry[ours] for entry in history if entry[ours] is not None]
        means[theirs] = sum(values) / len(values) if values else None
    return means | {"alignment": asdict(config) | {"processes": current().world}, "clean": asdict(found.clean)}


def _save(model: Classifier, folder: Path, metadata: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    save_checkpoint(model, folder / "final_model.safetensors", metadata)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.module.state_dict().items()}
    with replacing(folder / "final_model.pt") as temporary:
        torch.save(tensors, temporary)


def _measured(
    args: argparse.Namespace, source: Classifier, target: Classifier | None, val: Subset[Any], attack: Attack
) -> dict[str, Any]:
    """Errors in percent under the authors' names, and the transfer in full."""
    result: dict[str, Any] = {}
    if args.eval_standard:
        result["test-err"] = _error("test-err", args, source, val, None)
    if args.eval_whitebox:
        result["whitebox-err"] = _error("whitebox-err", args, source, val, attack)
    if target is not None:
        result |= _transferred(args, source, target, val, attack)
    return result


def _error(name: str, args: argparse.Namespace, model: Classifier, val: Subset[Any], attack: Attack | None) -> float:
    ranks, batches = current(), _dealt(args, val)
    labels = cast(ImageDataset, val.dataset).labels[torch.tensor(val.indices)]
    own = torch.cat([labels[:0], *labels.split(EVALUATION_BATCH)[ranks.rank :: ranks.world]])
    with evaluating(model), progress(name, len(batches), "batches", shown=main()) as advance:
        (wrong,) = errors_of(model, [model], batches, attack, own, advance)
    error = 100 * (sum(gather(int(wrong.sum()))) / len(labels))
    if main():
        print(f" *  {name}: {error:.2f}")
    return error


def _dealt(args: argparse.Namespace, val: Subset[Any]) -> Loader:
    """Whole batches, so that what is measured of them does not depend on the number of ranks."""
    ranks = current()
    return loader(val, EVALUATION_BATCH, workers=args.workers).deal(ranks.rank, ranks.world)


def _transferred(
    args: argparse.Namespace, source: Classifier, target: Classifier, val: Subset[Any], attack: Attack
) -> dict[str, Any]:
    enough = DEBUG_QUALIFIED if args.debug else args.num_eval
    attacks = (attack, attack_of(args, target))
    seen = transfer(source, target, _dealt(args, val), attacks, enough, parity=args.faithful_quirks)
    cell = seen.cell(args.eval_arch or args.source_arch, args.atk, args.target_arch)
    images = len(seen.counted)
    if cell.n == 0:
        said = f"none of {images} images is qualified, so there is no transfer error"
    else:
        said = f"{rate_text(cell.rate, cell.low, cell.high)} of {cell.n} qualified images"
    if main():
        print(f" *  {args.target_arch}: {said}")
    mask = "parity" if args.faithful_quirks else "conjunction"
    detail = TransferMatrix((cell,)).to_dict()["cells"][0] | {"images": images, "mask": mask}
    detail["parameters"] = attack.parameters()
    return {args.target_arch: 100 * cell.rate if cell.n else None, "transfer": detail}

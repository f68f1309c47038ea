"""Weights on disk: read without unpickling freely, checked before they are loaded, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignfast.files import replacing
from alignfast.models.classifier import Classifier
from alignfast.models.defences import Defended
from alignfast.models.ensemble import Ensemble

SUFFIXES = (".safetensors", ".pt", ".pth", ".th")
WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
NAMED = 3


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of a `state_dict` or `model` wrapper, without a `module.` prefix.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a file that cannot be read with `weights_only=True`, or one without tensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"checkpoint: got {path}; allowed suffixes are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    # A torn or foreign file makes the unpickler fail in a dozen ways, from struct.error to RecursionError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint: {path} cannot be read as weights alone: {reason}") from error
    return _tensors(content, path)


def load_checkpoint(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load `path` into `module` (or the module of a Classifier); every key and shape must match.

    Raises:
        FileNotFoundError, ValueError: as `read_state_dict`; ValueError also for keys or shapes that do not match, with
            the first few named. The module is unchanged then.
    """
    module = module.module if isinstance(module, Classifier) else module
    given, own = read_state_dict(path), module.state_dict()
    # A module may itself be a wrapper, such as DataParallel, whose names all carry the prefix.
    wanted = _without_prefixes(own)
    names = dict(zip(wanted, own, strict=True))
    # Counters that old releases of torch did not have, and that inference does not read.
    wanted = {k: v for k, v in wanted.items() if k in given or not k.endswith("num_batches_tracked")}
    problems = [
        _named("missing keys", [k for k in wanted if k not in given]),
        _named("unexpected keys", [k for k in given if k not in wanted]),
        _named(
            "other shapes",
            [
                f"{k} {list(given[k].shape)} instead of {list(wanted[k].shape)}"
                for k in wanted
                if k in given and given[k].shape != wanted[k].shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(f"checkpoint: {path} does not fit the model: {'; '.join(p for p in problems if p)}")
    module.load_state_dict({names[k]: tensor for k, tensor in given.items()}, strict=False)


def save_checkpoint(module: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the weights of `module` (or of a Classifier's module) as safetensors, atomically.

    Raises:
        ValueError: `path` has another suffix, by which it could not be read again.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"checkpoint: got {path}; allowed is a name that ends in .safetensors")
    module = module.module if isinstance(module, Classifier) else module
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata) if metadata else None)


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 over names, dtypes, shapes and bytes of all weights and buffers, over the
    normalisation of classifiers, over defences, and over how ensembles combine their members.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    for part in module.modules():
        if isinstance(part, Classifier):
            for values in (part.mean, part.std):
                digest.update(str(None if values is None else values.tolist()).encode())
        if isinstance(part, Ensemble):
            digest.update(part.combine.encode())
        if isinstance(part, Defended):
            digest.update(repr(part.defences).encode())
    return digest.hexdigest()[:16]


def _unpickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    named = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    if not named or not content:
        raise ValueError(
            f"checkpoint: {path} holds no tensors by name; allowed is a state dict, or one under {', '.join(WRAPPERS)}"
        )
    return _without_prefixes(content)


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return dict(tensors)


def _named(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind} {', '.join(names[:NAMED])}{more}" if names else ""

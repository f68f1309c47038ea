"""Weights on disk: read without unpickling freely, checked before they are loaded, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignfast.files import replacing
from alignfast.models.classifier import Classifier

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
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
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
    given, wanted = read_state_dict(path), module.state_dict()
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
    module.load_state_dict(given, strict=False)


def save_checkpoint(module: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the weights of `module` (or of a Classifier's module) as safetensors, atomically."""
    module = module.module if isinstance(module, Classifier) else module
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata) if metadata else None)


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 over names, dtypes, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    if isinstance(module, Classifier):
        for values in (module.mean, module.std):
            digest.update(str(None if values is None else values.tolist()).encode())
    return digest.hexdigest()[:16]


def _unpickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"checkpoint: {path} holds no tensors by name; allowed is a state dict, or one under {', '.join(WRAPPERS)}"
        )
    tensors = dict(content)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _named(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind} {', '.join(names[:NAMED])}{more}" if names else ""

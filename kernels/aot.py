"""Compiles the Triton kernels to machine code without a device, as launches on typical inputs would have them.

The inputs are tensors without memory: a launcher runs on them as it always does, but its launches are listed. So what
is compiled has the block sizes and the knowledge of alignment that a launch has, and neither is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from alignfast.kernels.diversify import diversify, diversify_backward
from alignfast.kernels.kl_div_with_logits import DIRECTIONS, kl_div_with_logits, kl_div_with_logits_backward
from alignfast.kernels.launch import Launch, recording
from alignfast.kernels.philox_uniform import philox_uniform
from alignfast.kernels.sign_step import sign_step
from alignfast.kernels.smooth import smooth, smooth_backward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# A batch as attacks and alignment have them, and copies of each image.
BATCH, SIDE, CLASSES, COPIES = 32, 224, 1000, 4


@dataclass(frozen=True)
class Variant:
    """A kernel of one case, with how many bytes its launch has to move at least and for how many elements."""

    case: str
    launch: Launch
    elements: int
    bytes: int

    @property
    def kernel(self) -> str:
        name: str = self.launch.kernel.__name__
        return name.strip("_").removesuffix("_kernel")

    @property
    def block(self) -> int:
        """Elements that a program has at a time."""
        size: int = self.launch.constants["BLOCK"] * self.launch.constants.get("ROWS", 1)
        return size


def variants(dtypes: dict[str, torch.dtype] = DTYPES) -> Iterator[Variant]:
    """Every kernel of every op, in the dtypes and main cases that matter."""
    for name, dtype in dtypes.items():
        for case, run in _cases(dtype).items():
            with recording() as launches:
                run()
            for launch in launches:
                elements, moved = _moved(launch)
                yield Variant(f"{case} {name}", launch, elements, moved)


def _cases(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    def images(count: int = BATCH, **options: Any) -> Tensor:
        return torch.empty(count, 3, SIDE, SIDE, dtype=dtype, device="meta", **options)

    def step(norm: str, momentum: bool) -> Callable[[], Any]:
        x = images()
        memory = images() if momentum else None
        return lambda: sign_step(x, images(), images(), memory, 0.1, 0.2, 1.0, 0.0, 1.0, norm)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.empty(BATCH, CLASSES, dtype=dtype, device="meta")
    kernel = torch.empty(15, dtype=dtype, device="meta")
    found: dict[str, Callable[[], Any]] = {
        f"sign_step {norm}{' momentum' if momentum else ''}": step(norm, momentum)
        for norm in ("linf", "l2")
        for momentum in (False, True)
    }
    for direction in DIRECTIONS:
        found[f"kl_div_with_logits {direction}"] = lambda direction=direction: kl_div_with_logits(
            logits, logits, 4.0, direction, "batchmean", "mean", True
        )
    found["kl_div_with_logits_backward"] = lambda: kl_div_with_logits_backward(
        logits.new_empty((), dtype=wide), logits.new_empty(logits.shape, dtype=wide), logits
    )
    found["smooth"] = lambda: smooth(images(), kernel)
    found["smooth_backward channels_last"] = lambda: smooth_backward(
        images().to(memory_format=torch.channels_last), kernel
    )
    for case, parts in {
        "noise": "nz",
        "shrink": "ez",
        "enlarge noise": "nlz",
        "normalise": "z",
        "mixing": "msz",
    }.items():
        for channels_last in (False, True):
            label = f"diversify {case}{' channels_last' if channels_last else ''}"
            found[label] = lambda parts=parts, last=channels_last: diversify(
                images(), COPIES, *_arguments(parts, dtype, wide), dtype, last
            )
    for case, parts in {"shrink": "ez", "enlarge": "lz", "normalise": "z"}.items():
        found[f"diversify_backward {case}"] = lambda parts=parts: diversify_backward(
            images(COPIES * BATCH), COPIES, *_linear(parts, wide), dtype
        )
    if dtype == torch.float32:
        found["philox_uniform"] = lambda: philox_uniform(
            _indices(BATCH), _indices(COPIES), (3, SIDE, SIDE), 1, 2, 3, 4, -0.1, 0.1, None
        )
    return found


def _indices(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _arguments(parts: str, dtype: torch.dtype, wide: torch.dtype) -> tuple[Any, ...]:
    """Of diversify, from the noise to the normalisation."""
    noise = (0.1, (1, 2, 3, 4), _indices(BATCH), _indices(COPIES)) if "n" in parts else (0.0, (), None, None)
    pool = torch.empty(BATCH, 3, SIDE, SIDE, dtype=dtype, device="meta")
    weight = torch.empty(COPIES, BATCH, dtype=wide, device="meta")
    mixing = (pool, _indices(COPIES, BATCH), weight) if "m" in parts else (None, None, None)
    *geometry, std = _linear(parts, wide)
    return *noise, *mixing, *geometry, std, std


def _linear(parts: str, wide: torch.dtype) -> tuple[Any, ...]:
    """Of diversify_backward, from the scale to the deviation."""
    scale = torch.empty(COPIES, BATCH, dtype=wide, device="meta") if "s" in parts else None
    resized = _indices(COPIES, BATCH) if "e" in parts or "l" in parts else None
    padded = 246 if "l" in parts else SIDE if "e" in parts else 0
    return scale, resized, resized, resized, padded, torch.empty(3, dtype=wide, device="meta")


# Tensors that the passes of sign_step read or write, without and with momentum. They are given all of them.
SIGN_STEP_TENSORS = {
    "_l1_kernel": (1, 1),
    "_linf_kernel": (4, 6),
    "_l2_direction_kernel": (1, 3),
    "_l2_length_kernel": (1, 1),
    "_l2_move_kernel": (4, 4),
    "_l2_project_kernel": (3, 3),
}


def _moved(launch: Launch) -> tuple[int, int]:
    """Elements of the largest tensor that a launch is given, and the bytes of all, each counted once."""
    tensors: list[Tensor] = []
    pending = list(launch.arguments)
    while pending:
        argument = pending.pop()
        if isinstance(argument, tuple):
            pending.extend(argument)
        elif isinstance(argument, Tensor) and not any(argument is tensor for tensor in tensors):
            tensors.append(argument)
    largest = max(tensors, key=torch.numel)
    counts = SIGN_STEP_TENSORS.get(launch.kernel.__name__)
    if counts is not None:
        return largest.numel(), counts[launch.constants.get("MOMENTUM", False)] * largest.nbytes
    return largest.numel(), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The kernel of a launch, with the specialisations that Triton would give it."""
    backend = make_backend(target)
    kernel = launch.kernel
    # Named as Triton's own launch names them, which it does from what is an aligned address or a multiple of 16.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    named = {**launch.constants, "num_warps": launch.warps, "enable_fp_fusion": False}
    bound, specialization, rest = bind(*launch.arguments, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialization, rest)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)

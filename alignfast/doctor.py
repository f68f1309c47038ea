"""What was built, what is used, and whether every op computes what it should."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from alignfast import ops
from alignfast._C import cpu_isa
from alignfast.memory import memory_state
from alignfast.native import CUDA_BACKEND, CUDA_PATH, FORCED, NATIVE_DEVICES

# The known answer of Philox4x32-10 to a counter and key of zeros, from its authors' Random123 library (kat_vectors).
PHILOX_ZEROS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def report() -> dict[str, Any]:
    """What was found here: backends, the one chosen for each type of device, "ok" or a reason for every op.

    "memory" is what becomes of freed memory in this process, an `alignfast.memory.Memory`.
    """
    return {
        "backends": {"cpu": cpu_backend(), "cuda": cuda_backend(), "triton": triton_backend()},
        "chosen": {device: chosen(device) for device in ("cpu", "cuda")},
        "memory": asdict(memory_state()),
        "self_test": self_test(),
    }


def chosen(device: str) -> str:
    """What serves the ops there: for the CPU's own kernels with the instruction set they are of."""
    if device not in NATIVE_DEVICES:
        return "reference"
    return f"native ({cpu_isa()})" if device == "cpu" else CUDA_BACKEND.name


def cpu_backend() -> dict[str, Any]:
    """The native module: whether it loads and what it says about this build and processor.

    "isa" are the processor's instruction sets; "kernels" those of them, narrowest first, that the ops have kernels for.
    """
    try:
        native = importlib.import_module("alignfast._C")
    except ImportError as error:
        nothing = {"loaded": False, "isa": [], "kernels": [], "build": None}
        return nothing | {"threads": os.cpu_count() or 1, "reason": str(error)}
    return {
        "loaded": True,
        "isa": native.instruction_sets(),
        "kernels": native.usable_cpu_isas(),
        "threads": native.thread_count(),
        "build": native.build_info(),
        "reason": None,
    }


def cuda_backend() -> dict[str, Any]:
    """The library of CUDA kernels: what it has code for, whether it loads, and the device that torch sees."""
    reason = None if CUDA_BACKEND.name == "cuda" else CUDA_BACKEND.passed_over.get("cuda") or _reason_not_to_load()
    return {
        "built": CUDA_PATH.exists(),
        "loads": reason is None,
        "archs": _build_info()["cuda_architectures"].split() if CUDA_PATH.exists() else [],
        "device": cuda_device(),
        "reason": reason,
    }


def _reason_not_to_load() -> str | None:
    """Tried in a process of its own, since kernels that are loaded take the place of those that serve here."""
    program = "from alignfast.native import use_cuda; use_cuda()"
    environment = os.environ | {FORCED: "reference"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return None if run.returncode == 0 else run.stderr.strip().rpartition("\n")[2]


def _build_info() -> dict[str, Any]:
    info: dict[str, Any] = importlib.import_module("alignfast._C").build_info()
    return info


def triton_backend() -> dict[str, Any]:
    """Triton as installed, and what its kernels would run on."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return {"importable": False, "version": None, "device": None, "reason": str(error)}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = "interpreter" if interpreted else cuda_device()
    return {"importable": True, "version": triton.__version__, "device": device, "reason": None}


def cuda_device() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def self_test() -> dict[str, str]:
    """Every op on a tiny input against an answer that was found another way: "ok", or what went wrong.

    On the CPU, and on the current CUDA device if there is one.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {name: _outcome(check, devices) for name, check in SELF_TESTS.items()}


def _outcome(check: Callable[[str], None], devices: list[str]) -> str:
    # Whatever an op raises is the finding; the remaining ops are still to be tested.
    for device in devices:
        try:
            check(device)
        except Exception as error:
            return f"{'' if device == 'cpu' else f'on {device}: '}{type(error).__name__}: {error}"
    return "ok"


def _check_kl_div_with_logits(device: str) -> None:
    """Loss and gradient against torch's own divergence in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 11, generator=generator) * 3
    temperature = 2.5
    given, expected = student.to(device).requires_grad_(), student.double().requires_grad_()
    loss = ops.kl_div_with_logits(given, teacher.to(device), temperature)
    (gradient,) = torch.autograd.grad(loss, given)
    log_q = (expected / temperature).log_softmax(-1)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    (wanted_gradient,) = torch.autograd.grad(wanted, expected)
    _compare("loss", loss.detach(), wanted.detach(), 1e-5)
    _compare("gradient", gradient, wanted_gradient, 1e-5)


def _check_diversify(device: str) -> None:
    """Resize, pad and normalise against interpolation and padding in float64, and the gradient against copies of it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    scale = torch.tensor([[1.0, 0.5], [0.25, 1.0]])
    resized, top, left = torch.tensor([[[6, 5], [7, 0]], [[1, 0], [0, 0]], [[0, 2], [1, 0]]])
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    given, expected = images.to(device).requires_grad_(), images.double().requires_grad_()
    batch = ops.diversify(
        given,
        copies=2,
        scale=scale.to(device),
        resize_pad=ops.ResizePad(resized.to(device), top.to(device), left.to(device), 8),
        mean=mean.to(device),
        std=std.to(device),
    )
    rows = []
    for k in range(2):
        for n in range(2):
            view = expected[n : n + 1] * scale[k, n].double()
            size, above, before = int(resized[k, n]), int(top[k, n]), int(left[k, n])
            if size > 0:
                view = torch.nn.functional.interpolate(view, size=(size, size), mode="bilinear", align_corners=False)
                view = torch.nn.functional.pad(view, (before, 8 - size - before, above, 8 - size - above))
            rows.append((view - mean.double()[:, None, None]) / std.double()[:, None, None])
    wanted = torch.cat(rows)
    weight = torch.rand(wanted.shape, generator=generator)
    (gradient,) = torch.autograd.grad((batch * weight.to(device)).sum(), given)
    (wanted_gradient,) = torch.autograd.grad((wanted * weight.double()).sum(), expected)
    _compare("batch", batch.detach(), wanted.detach(), 1e-5)
    _compare("gradient", gradient, wanted_gradient, 1e-5)


def _check_sign_step(device: str) -> None:
    """Four pixels by hand: a plain step, one that projection shortens, one that the clamp shortens, one at rest."""
    images, adv, grad, momentum = (
        torch.tensor(pixels, device=device).reshape(1, 1, 2, 2)
        for pixels in ([0.5, 0.5, 0.99, 0.5], [0.5, 0.55, 0.99, 0.5], [-1.0, 2.0, 5.0, 0.0], [0.25, 0.0, 0.0, 0.0])
    )
    ops.sign_step(adv, images, grad, momentum, alpha=0.04, eps=0.0625, decay=0.5)
    # The mean of |grad| is 2, so momentum becomes 0.5 * 0.25 - 0.5 = -0.375, 1, 2.5, 0.
    _compare("momentum", momentum.flatten(), torch.tensor([-0.375, 1.0, 2.5, 0.0]), 1e-6)
    _compare("adv", adv.flatten(), torch.tensor([0.46, 0.5625, 1.0, 0.5]), 1e-6)


def _check_smooth(device: str) -> None:
    """Against a dense convolution with the outer product in float64; the kernel is lopsided to tell flips apart."""
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(2, 3, 7, 6, generator=generator)
    kernel = torch.tensor([0.1, 0.2, 0.4, 0.25, 0.05])
    dense = torch.outer(kernel.double(), kernel.double()).expand(3, 1, 5, 5)
    wanted = torch.nn.functional.conv2d(grad.double(), dense, padding=2, groups=3)
    _compare("smoothed", ops.smooth(grad.to(device), kernel.to(device)), wanted, 1e-5)


def _check_depthwise_conv2d(device: str) -> None:
    """Result and gradients against torch's own in float64, of eighths, whose sums are exact in TF32 too."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 3, 7, 6), (3, 1, 3, 3), (3,), (2, 3, 4, 6))
    *inputs, incoming = (torch.randint(-16, 17, shape, generator=generator) / 8 for shape in shapes)
    given = [tensor.to(device).requires_grad_() for tensor in inputs]
    unit: dict[str, Any] = {"before": (-1.0, 1.0), "after": (-1.0, 1.0)}
    result = ops.depthwise_conv2d(*given, stride=(2, 1), padding=(1, 1, 1, 1), **unit)
    images, weight, bias = expected = [tensor.double().requires_grad_() for tensor in inputs]
    clip = torch.nn.functional.hardtanh
    wanted = clip(torch.nn.functional.conv2d(clip(images), weight, bias, stride=(2, 1), padding=1, groups=3))
    _compare("result", result.detach(), wanted.detach(), 1e-5)
    _compare_gradients((result, given), (wanted, expected), incoming, 1e-5)


def _check_inverted_residual(device: str) -> None:
    """Result and gradient against torch's own in float64, of eighths; for CPUs alone."""
    if device != "cpu":
        return
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 3, 7, 6), (50, 3, 1, 1), (50,), (50, 1, 3, 3), (50,), (4, 50, 1, 1), (4,), (2, 4, 4, 6))
    images, *weights, incoming = (torch.randint(-8, 9, shape, generator=generator) / 8 for shape in shapes)
    around: dict[str, Any] = {"stride": (2, 1), "padding": (1, 1, 1, 1), "clip": (-1.0, 1.0)}
    given, expected = images.clone().requires_grad_(), images.double().requires_grad_()
    result = ops.inverted_residual(given, ops.PackedResidual.of(*weights), **around)
    expand, expand_bias, depthwise, depthwise_bias, project, bias = (weight.double() for weight in weights)
    conv, clip = torch.nn.functional.conv2d, torch.nn.functional.hardtanh
    between = clip(conv(expected, expand, expand_bias))
    between = clip(conv(between, depthwise, depthwise_bias, stride=(2, 1), padding=1, groups=50))
    wanted = conv(between, project, bias)
    _compare("result", result.detach(), wanted.detach(), 1e-5)
    (gradient,) = torch.autograd.grad(result, given, incoming)
    _compare("gradient", gradient, torch.autograd.grad(wanted, expected, incoming.double())[0], 1e-4)


def _check_winograd_conv2d(device: str) -> None:
    """Result and gradients against torch's own in float64, of eighths, whose sums are exact in TF32 too."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, 3, 7, 6), (20, 3, 3, 3), (20,), (2, 20, 7, 6))
    *inputs, incoming = (torch.randint(-8, 9, shape, generator=generator) / 8 for shape in shapes)
    given = [tensor.to(device).requires_grad_() for tensor in inputs]
    result = ops.winograd_conv2d(*given)
    expected = [tensor.double().requires_grad_() for tensor in inputs]
    images, weight, bias = expected
    wanted = torch.nn.functional.conv2d(images, weight, bias, padding=1)
    _compare("result", result.detach(), wanted.detach(), 1e-4)
    _compare_gradients((result, given), (wanted, expected), incoming, 1e-4)


def _check_basic_block(device: str) -> None:
    """Result and gradient against torch's own in float64, of eighths, whose sums no rounding brings to zero."""
    generator = torch.Generator().manual_seed(8)
    shapes = ((2, 3, 7, 6), (20, 3, 3, 3), (20,), (3, 20, 3, 3), (3,), (2, 3, 7, 6))
    images, *weights, incoming = (torch.randint(-8, 9, shape, generator=generator) / 8 for shape in shapes)
    # What goes into a rectifier is an odd number of these.
    weights[1], weights[3] = weights[1] + 1 / 128, weights[3] + 1 / 2048
    given, expected = images.to(device).requires_grad_(), images.double().requires_grad_()
    result = ops.basic_block(given, *(weight.to(device) for weight in weights))
    first, first_bias, second, second_bias = (weight.double() for weight in weights)
    between = torch.nn.functional.conv2d(expected, first, first_bias, padding=1).relu()
    wanted = (expected + torch.nn.functional.conv2d(between, second, second_bias, padding=1)).relu()
    _compare("result", result.detach(), wanted.detach(), 1e-3)
    (gradient,) = torch.autograd.grad(result, given, incoming.to(device))
    _compare("gradient", gradient, torch.autograd.grad(wanted, expected, incoming.double())[0], 1e-3)


def _check_attention(device: str) -> None:
    """Result and gradient against torch's own in float64; on a GPU that of plain products."""
    generator = torch.Generator().manual_seed(6)
    packed, incoming = torch.randn(2, 19, 3, 2, 5, generator=generator), torch.randn(2, 19, 10, generator=generator)
    given, expected = packed.to(device).requires_grad_(), packed.double().requires_grad_()
    result = ops.attention(given)
    queries, keys, values = (part.transpose(1, 2) for part in expected.unbind(2))
    made = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    wanted = made.transpose(1, 2).flatten(2)
    _compare("result", result.detach(), wanted.detach(), 1e-5)
    (gradient,) = torch.autograd.grad(result, given, incoming.to(device))
    _compare("gradient", gradient, torch.autograd.grad(wanted, expected, incoming.double())[0], 1e-5)


def _check_batch_norm(device: str) -> None:
    """Result, statistics and gradients against the formula in float64."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((4, 5, 3, 3), (5,), (5,), (4, 5, 3, 3))
    *inputs, incoming = (torch.randint(-16, 17, shape, generator=generator) / 8 for shape in shapes)
    given = [tensor.to(device).requires_grad_() for tensor in inputs]
    result, mean, variance = ops.batch_norm(*given, clip=(-1.0, 1.0))
    images, weight, bias = expected = [tensor.double().requires_grad_() for tensor in inputs]
    means, variances = images.mean((0, 2, 3)), images.var((0, 2, 3), correction=0)
    normalised = (images - means.view(1, 5, 1, 1)) / (variances + 1e-5).sqrt().view(1, 5, 1, 1)
    scaled = normalised * weight.view(1, 5, 1, 1) + bias.view(1, 5, 1, 1)
    wanted = torch.nn.functional.hardtanh(scaled)
    for name, one, other in (("result", result, wanted), ("mean", mean, means), ("variance", variance, variances)):
        _compare(name, one.detach(), other.detach(), 1e-5)
    _compare_gradients((result, given), (wanted, expected), incoming, 1e-4)


def _check_philox_uniform(device: str) -> None:
    """The authors' known answer, then Philox in Python's own integers where every field of counter and key counts."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    _compare("known answer", ops.philox_uniform(zero, zero, (4,), seed=0)[0, 0], _unit(PHILOX_ZEROS), 0.0)
    images, copies, step, purpose, seed = (3, 2**32 - 1), (0, 70000), 9, 5, 0xA4093822299F31D0
    indices, numbers = torch.tensor(images, device=device), torch.tensor(copies, device=device)
    draws = ops.philox_uniform(indices, numbers, (2, 3), seed=seed, step=step, purpose=purpose, low=-1.0, high=3.0)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for k, copy in enumerate(copies):
        for n, image in enumerate(images):
            words = [philox4x32_10((block, image, step, copy << 8 | purpose), key) for block in range(2)]
            wanted = _unit((*words[0], *words[1]))[:6].reshape(2, 3) * 4 - 1
            _compare(f"image {image}, copy {copy}", draws[k, n], wanted, 1e-6)


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 (Salmon et al., SC 2011), slow and plain."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & 0xFFFFFFFF, (left >> 32) ^ c3 ^ k1, left & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _unit(words: tuple[int, ...]) -> Tensor:
    return torch.tensor([(word >> 8) / 2**24 for word in words], dtype=torch.float64)


SELF_TESTS: dict[str, Callable[[str], None]] = {
    "kl_div_with_logits": _check_kl_div_with_logits,
    "diversify": _check_diversify,
    "sign_step": _check_sign_step,
    "smooth": _check_smooth,
    "depthwise_conv2d": _check_depthwise_conv2d,
    "inverted_residual": _check_inverted_residual,
    "winograd_conv2d": _check_winograd_conv2d,
    "basic_block": _check_basic_block,
    "attention": _check_attention,
    "batch_norm": _check_batch_norm,
    "philox_uniform": _check_philox_uniform,
}


def _compare_gradients(
    found: tuple[Tensor, Sequence[Tensor]], wanted: tuple[Tensor, Sequence[Tensor]], incoming: Tensor, tolerance: float
) -> None:
    """Of a result to images, weight and bias, and of what is wanted in float64 to its own."""
    gradients, others = (torch.autograd.grad(result, leaves, incoming.to(result)) for result, leaves in (found, wanted))
    for name, one, other in zip(("images", "weight", "bias"), gradients, others, strict=True):
        _compare(f"gradient of {name}", one, other, tolerance)


def _compare(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    if got.shape != wanted.shape:
        raise ArithmeticError(f"{name} has shape {list(got.shape)}, expected {list(wanted.shape)}")
    error = float((got.cpu().double() - wanted.double()).abs().max())
    # Written so that NaN fails too.
    if not error <= tolerance:
        raise ArithmeticError(f"{name} is off by {error:.3g}, allowed is {tolerance:g}")

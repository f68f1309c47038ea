"""Makes the launchers serve `torch.ops.alignfast`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

# The launchers of every op, by the module of this package that has them.
LAUNCHERS = {
    "diversify": ("diversify", "diversify_backward"),
    "kl_div_with_logits": ("kl_div_with_logits", "kl_div_with_logits_backward"),
    "philox_uniform": ("philox_uniform",),
    "sign_step": ("sign_step",),
    "smooth": ("smooth", "smooth_backward"),
}


def register(device_type: str = "cuda") -> None:
    """Serve every op on `device_type` by its Triton launcher, in place of what served it before.

    Their fakes and autograd are those of `alignfast.ops`. Kernels are imported when an op is first called.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    import_module("triton")
    for module, names in LAUNCHERS.items():
        for name in names:
            torch.library.register_kernel(f"alignfast::{name}", device_type, _deferred(module, name))


def _deferred(module: str, name: str) -> Callable[..., Any]:
    """Imported late, since the kernels use the checks of the ops, which are not there yet at registration."""

    @cache
    def launcher() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"alignfast.kernels.{module}"), name)
        return found

    return lambda *arguments, **named: launcher()(*arguments, **named)

"""A plugin of pytest that serves the ops on CPU tensors by their Triton kernels, in Triton's interpreter.

Triton reads the variable when a kernel is defined, so it is set before anything can import one.
"""

import os
from functools import cache
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch


def pytest_configure(config):
    from triton.runtime import interpreter

    import alignfast  # noqa: F401, for the ops that are then served
    from alignfast.kernels.register import register

    interpreter._patch_lang = patched_once(interpreter._patch_lang)
    interpreter.InterpreterBuilder.cast_impl = cast_with_bfloat16(interpreter.InterpreterBuilder.cast_impl)
    # As on a GPU, arithmetic on what is no number says nothing.
    np.seterr(all="ignore")
    register("cpu")


def patched_once(patch_language):
    """The interpreter replaces Triton's language anew for every call of a function, which takes most of its time."""

    @cache
    def patch(function):
        patch_language(function)
        return SimpleNamespace(restore=lambda: None)

    return patch


def cast_with_bfloat16(cast):
    """The interpreter cuts bfloat16 off where a GPU rounds, and does not know its subnormal numbers."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast_impl(builder, source, target):
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(builder, source, target)

    return cast_impl


def pytest_collection_modifyitems(config, items):
    for item in items:
        for name in ("cpu_only", "no_interpreter"):
            mark = item.get_closest_marker(name)
            if mark:
                item.add_marker(pytest.mark.skip(reason=mark.kwargs.get("reason", name)))

"""A plugin of pytest that serves the ops on CPU tensors by their Triton kernels, in Triton's interpreter.

Triton reads the variable when a kernel is defined, so it is set before anything can import one.
"""

import os
from functools import cache
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

from tests.covering import by_function, covering

# Of a property, in place of some dozens.
EXAMPLES = 3
# By a part of their names, tests that say nothing of kernels that others do not, and why they take too long here.
LEFT_OUT = {
    "compiles_whole": "compiled code calls the op as other code does",
    "of_common_size": "millions of pixels",
    "larger_than_the_caches": "millions of pixels",
}
# And of those that remain in a run of every test.
SELDOM = {
    "gradcheck": "launches for every element, where other tests compare gradients and adjoints",
    "the_operators": "what is registered is the same for every kernel",
}


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


def pytest_addoption(parser):
    parser.addoption("--every-test", action="store_true", help="run all tests, which takes most of an hour")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out combinations of parameters, as the interpreter is thousands of times slower than a GPU."""
    every_test = config.getoption("every_test")
    names = [*LEFT_OUT, *([] if every_test else SELDOM)]
    chosen = [item for item in items if not any(name in item.name for name in names)]
    if not every_test:
        chosen = [item for group in by_function(chosen).values() for item in covering(group)]
        for item in chosen:
            limit_examples(item.obj)
    found, kept = len(items), {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
    config.get_terminal_writer().line(f"interpreted: {len(items)} of {found} tests")


def limit_examples(test):
    """Of a property; what the test asks for otherwise stays."""
    settings = getattr(test, "_hypothesis_internal_use_settings", None)
    if settings is not None and settings.max_examples > EXAMPLES:
        test._hypothesis_internal_use_settings = hypothesis.settings(settings, max_examples=EXAMPLES)

"""What every native op owes torch: a fake that agrees with it, refusals in both, and one result on any thread count."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

ops = torch.ops.alignfast


def operator(name, *arguments):
    """Schema, fake, autograd registration and AOT dispatch, as torch checks them."""
    torch.library.opcheck(getattr(ops, name).default, arguments)


def refusal(name, arguments, message):
    """By the op with a RuntimeError, as C++ raises, and by its fake with the ValueError of the public function.

    Kernels in Python refuse with the words of the fake.
    """
    before = tree_map_only(torch.Tensor, torch.clone, arguments)
    named = f"{message.partition(':')[0]}:"
    with pytest.raises((RuntimeError, ValueError)) as refused:
        getattr(ops, name)(*arguments)
    assert re.match(message if refused.type is RuntimeError else named, str(refused.value))
    for given, kept in zip(arguments, before, strict=True):
        if isinstance(given, torch.Tensor):
            assert torch.equal(given, kept), "a tensor was touched"
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        with pytest.raises(ValueError, match=f"^{named}"):
            getattr(ops, name)(*fakes)


def of_geometry(at):
    """What ops refuse of strides and paddings, arguments number `at` and the next."""
    return [
        (at, [1], "stride: allowed is 2 sizes from 1 on"),
        (at, [1, 0], "stride: allowed is 2 sizes from 1 on"),
        (at + 1, [1, 1, 1], "padding: allowed is 4 sizes from 0 on"),
        (at + 1, [0, 0, 0, -1], "padding: allowed is 4 sizes from 0 on"),
    ]


def same_on_any_thread_count(compute):
    """compute() returns tensors, made anew at every call."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = compute()
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for one, many in zip(single, compute(), strict=True):
                assert torch.equal(one, many)
    finally:
        torch.set_num_threads(threads)


def compiles_whole(function, *tensors):
    """One graph forward and backward, plain and under bf16 autocast, with the values and gradients of eager mode."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    for autocast in (False, True):
        results = []
        for run in (function, compiled):
            leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = run(*leaves)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            weight = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype)
            results.append((result, *(torch.autograd.grad(result, wanted, weight) if wanted else ())))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)
        assert results[0][0].stride() == results[1][0].stride()

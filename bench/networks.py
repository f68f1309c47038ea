"""The networks that attacks and alignments are measured on, with random weights, and their bare passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignfast.models import Classifier, load_model
from alignfast.ops import diversify

from .flops import count_flops
from .subject import Call

Shape = tuple[int, ...]

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR_RESNET20 = "cifar_resnet20"


def classifier(network: str, size: Shape, device: torch.device, *, seed: int = 0) -> Classifier:
    """timm's network, or `CIFAR_RESNET20`, with random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == CIFAR_RESNET20:
            return Classifier(ResNet20(), CIFAR_MEAN, CIFAR_STD, 10, (size[0], size[1], size[2])).eval().to(device)
        return load_model(f"timm:{network}", input_size=(size[0], size[1], size[2])).to(device)


@cache
def flops_of(network: str, size: Shape, kind: str) -> int:
    """Operations an image of "forward", "input gradient" or "training", the forward included."""
    model = classifier(network, size, torch.device("meta")).module
    return count_flops(model, torch.empty((1, *size), device="meta"), kind)


def input_gradient(model: Classifier, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A forward pass and the gradient of its input, and nothing else: the batch that the model's module takes, in its
    dtype and layout, is made beforehand."""
    layout = model.mean, model.std, model.dtype, model.memory_format
    with torch.no_grad():
        batch = diversify(images, mean=layout[0], std=layout[1], dtype=layout[2], memory_format=layout[3])
    batch.requires_grad_()

    def call() -> Tensor:
        loss = F.cross_entropy(model.logits_of(lambda *asked: batch), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, batch)
        return gradient

    return call


class ResNet20(nn.Module):
    """He et al.'s (2016) for CIFAR-10: 32 x 32 pixels, 16, 32 and 64 channels, shortcuts without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(*(Block(before, width) for before, width in pairwise(widths)))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn(self.conv(images))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


class Block(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride = width // before
        self.more = width - before
        self.conv1 = nn.Conv2d(before, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + residual)


def captured(call: Callable[[], object], device: torch.device) -> Call:
    """On CUDA one graph of the call, so that no launch delays it; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    # As torch.cuda.graph asks: what initialises itself does so before, and not on the default stream.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may compute float32 in TF32, in which convolutions are good to three digits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

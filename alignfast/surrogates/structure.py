"""Where in a model there is something to operate on, by the names and types of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Names of the layers that lead around a residual branch.
SKIPS = ("downsample", "shortcut", "skip", "convShortcut")
KNOWN_BLOCKS = (
    "residual blocks and dense layers with conv1 and conv2 (ResNets and DenseNets of timm, torchvision and for CIFAR)"
)
KNOWN = f"{KNOWN_BLOCKS}, transformer blocks with norm1, attn, norm2 and mlp (timm), and torchvision's EncoderBlock"


@dataclass(frozen=True)
class ConvBlock:
    """A block whose branch runs from its first convolution to its last, beside a connection that leads around it.

    dense: the connection joins with the branch by concatenation. skips: layers that the connection leads through.
    """

    name: str
    block: nn.Module
    first: nn.Module
    last: nn.Module
    skips: tuple[nn.Module, ...]
    dense: bool


def conv_blocks(module: nn.Module) -> list[ConvBlock]:
    """The residual blocks and dense layers of a convolutional network, in their order."""
    return [_conv_block(name, part) for name, part in module.named_modules() if name and _is_conv_block(part)]


def residual_branches(module: nn.Module) -> list[nn.Module]:
    """Of every residual branch and dense layer one layer that all of it passes through."""
    branches: list[nn.Module] = []
    for name, part in module.named_modules():
        children = dict(part.named_children())
        if name and _is_conv_block(part):
            branches.append(_conv_block(name, part).last)
        elif {"norm1", "attn", "norm2", "mlp"} <= children.keys():
            branches += [children["attn"], children["mlp"]]
        elif {"ln_1", "self_attention", "ln_2", "mlp"} <= children.keys():
            branches += [children["self_attention"], children["mlp"]]
    return branches


def _is_conv_block(part: nn.Module) -> bool:
    # A plain network may have layers of these names too: the name of the class or of a layer must speak of blocks.
    children, kind = dict(part.named_children()), type(part).__name__.lower()
    residual = any(word in kind for word in ("block", "bottleneck", "denselayer")) or any(s in children for s in SKIPS)
    return residual and {"conv1", "conv2"} <= children.keys()


def _conv_block(name: str, block: nn.Module) -> ConvBlock:
    children = dict(block.named_children())
    last = children["conv3"] if "conv3" in children else children["conv2"]
    skips = tuple(children[skip] for skip in SKIPS if skip in children)
    return ConvBlock(name, block, children["conv1"], last, skips, "denselayer" in type(block).__name__.lower())

"""Small networks of the kinds that surgery knows, and gradients through forward passes written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.models.densenet import DenseNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import pad, relu
from torchvision.models.resnet import Bottleneck, ResNet

from alignfast.models import Classifier
from alignfast.surrogates import Collection

CLASSES = 5


class Block(nn.Module):
    """Of a CIFAR ResNet: functional ReLUs, and a shortcut without a layer."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()

    def shortcut(self, x: Tensor) -> Tensor:
        more = len(self.bn1.weight) - x.shape[1]
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more // 2, more // 2))


class Cifar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 8))
        self.layer2 = nn.Sequential(Block(8, 8), Block(8, 16))
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(relu(self.conv1(x))))
        result: Tensor = self.linear(x.mean((2, 3)))
        return result


class Before(nn.Module):
    """A block that normalises before it convolves, and a shortcut of its own."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential() if width_in == width else nn.Sequential(nn.Conv2d(width_in, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(relu(self.bn2(self.conv1(relu(self.bn1(x))))))
        y += self.shortcut(x)
        return y


class Plain(nn.Module):
    """Named as blocks are, but none."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict({"conv1": nn.Conv2d(3, 6, 3), "conv2": nn.Conv2d(6, 6, 3)})
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU(inplace=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.features["conv2"](self.relu1(self.features["conv1"](x))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def _before() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Before(4, 4), Before(4, 6), nn.Flatten(), nn.Linear(6 * 36, CLASSES))


def _vit() -> nn.Module:
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=CLASSES, embed_dim=12, depth=2, num_heads=2, init_values=0.3
    )
    # Fresh weights are so small that all tokens get the same attention.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "cifar": Cifar,
    "before": _before,
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=CLASSES),
    "torchvision bottleneck": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=CLASSES, width_per_group=8),
    "densenet": lambda: DenseNet(4, (2, 2), CLASSES, bn_size=2),
    "vit": _vit,
    "plain": Plain,
}


def net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In evaluation mode, with running statistics that are not those of a fresh layer."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = NETS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval().to(dtype)


def photos(name: str, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    side = 32 if "resnet" in name or "torchvision" in name or "dense" in name else 8
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(6), dtype=dtype)


def input_gradient(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Of a weighted sum of the logits."""
    leaf = images.clone().requires_grad_()
    logits = forward(leaf)
    weights = torch.arange(1.0, CLASSES + 1, dtype=images.dtype).cos()
    (grad,) = torch.autograd.grad((logits * weights).sum(), leaf)
    return grad


def collection(count: int = 5, dtype: torch.dtype = torch.float64) -> Collection:
    """A CIFAR ResNet with sets of weights of their own."""
    generator = torch.Generator().manual_seed(8)
    model = net("cifar")
    sets = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn((count, *tensor.shape), generator=generator, dtype=torch.float64)
        sets[name] = torch.stack([tensor] * count) if tensor.ndim < 1 or "running" in name else tensor + 0.1 * noise
    return Collection(Classifier(model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), CLASSES), sets).to(dtype).eval()

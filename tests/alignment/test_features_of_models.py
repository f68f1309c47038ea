from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from alignfast.alignment.features import penultimate, watching
from alignfast.models import Classifier, Ensemble
from tests.attacks.no_sync import NoSync

CLASSES = 5


class Network(nn.Sequential):
    """8 x 8 images, maps of 4 channels, an embedding of 6."""

    def __init__(self, classes: int = CLASSES, dropout: float = 0.0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(
                nn.Conv2d(3, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Flatten(),
                nn.Linear(256, 6),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(6, classes),
            )


def classifier(**options: Any) -> Classifier:
    return Classifier(Network(**options).eval(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def first(count: int, module: nn.Sequential, batch: Tensor) -> Tensor:
    """What the first so many layers make of a batch."""
    for layer in list(module)[:count]:
        batch = layer(batch)
    return batch


def normalised(batch: Tensor) -> Tensor:
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    return (batch - mean) / std


TORCHVISION = {
    "resnet18": ("fc", 512, 32),
    "vgg11": ("classifier.6", 4096, 32),
    "densenet121": ("classifier", 1024, 32),
    "mobilenet_v2": ("classifier.1", 1280, 32),
    "vit_b_16": ("heads.head", 768, 224),
    "swin_t": ("head", 768, 64),
    "convnext_tiny": ("classifier.2", 768, 32),
    "alexnet": ("classifier.6", 4096, 64),
}
TIMM = {
    "resnet18": ("fc", 512, 32),
    "vgg11": ("head.fc", 4096, 224),
    "densenet121": ("classifier", 1024, 32),
    "mobilenetv2_100": ("classifier", 1280, 32),
    "vit_tiny_patch16_224": ("head", 192, 224),
    "swin_tiny_patch4_window7_224": ("head.fc", 768, 224),
    "deit_tiny_distilled_patch16_224": ("head", 192, 224),
    "dla34": ("fc", 512, 32),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, wrapped: bool) -> None:
    head, width, side = TORCHVISION[name]
    with torch.device("meta"):
        module = torchvision.models.get_model(name).eval()
        check_head(Classifier(module, num_classes=1000) if wrapped else module, head, width, side)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    head, width, side = TIMM[name]
    with torch.device("meta"):
        module = timm.create_model(name).eval()
        own = module.get_classifier()
        assert module.get_submodule(head) is (own[0] if isinstance(own, tuple) else own)
        check_head(module, head, width, side)


def check_head(model: nn.Module, head: str, width: int, side: int) -> None:
    assert penultimate(model) == head
    with watching(model) as watched:
        model(torch.empty(2, 3, side, side).requires_grad_())
    assert watched.embedding.shape == (2, width)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_are_not_the_last_layer(name: str) -> None:
    with torch.device("meta"):
        module = torchvision.models.get_model(name, aux_logits=True, init_weights=False)
    assert penultimate(module) == "fc"
    assert penultimate(Classifier(module, num_classes=1000)) == "fc"


@pytest.mark.parametrize("num_classes", [None, 1000])
def test_a_model_whose_last_layer_is_a_convolution(num_classes: int | None) -> None:
    with torch.device("meta"):
        model = Classifier(torchvision.models.squeezenet1_1().eval(), num_classes=num_classes)
        message = "layer: got None for a model whose last layer .* on top features, classifier"
        with pytest.raises(ValueError, match=message):
            penultimate(model)
        with pytest.raises(ValueError, match=message), watching(model):
            pass
        with watching(model, "features") as watched:
            model.logits(torch.empty(2, 3, 64, 64))
        assert watched.embedding.shape == (2, 512)


class Own(nn.Module):
    """With linear layers inside and beside, and a last layer that others follow in the order of names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Network(6)
        self.last = nn.Linear(6, CLASSES)
        self.auxiliary = nn.Linear(6, 2)

    def forward(self, batch: Tensor) -> Tensor:
        self.auxiliary(self.stem(batch))
        return self.last(input=self.stem(batch))  # type: ignore[no-any-return]


def test_a_users_module() -> None:
    assert penultimate(Network()) == "7"
    assert penultimate(nn.Sequential(nn.Identity(), torchvision.models.resnet18())) == "1.fc"
    assert penultimate(nn.ModuleDict({"head": Network(), "projection": nn.Linear(2, 2)})) == "head.7"
    assert penultimate(Own()) == "auxiliary"
    assert penultimate(Classifier(Own(), num_classes=CLASSES)) == "last"
    with pytest.raises(ValueError, match="last layer could not be told"):
        penultimate(Classifier(Own(), num_classes=7))


def test_a_timm_model_without_classes_and_one_without_settings() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet10t", num_classes=0)
        assert penultimate(model) == "fc"
        model = timm.create_model("resnet10t", num_classes=CLASSES)
        for settings in ({}, {"classifier": "lost"}, {"classifier": ()}, {"classifier": None}):
            model.pretrained_cfg = model.default_cfg = settings
            assert penultimate(model) == "fc"


def test_an_ensemble_has_no_embedding() -> None:
    with (
        pytest.raises(ValueError, match="model: got an Ensemble; allowed is a single model"),
        watching(Ensemble([classifier(), classifier()])),
    ):
        pass
    with watching(Ensemble([classifier()]), "0.module.4") as watched:
        pass
    with pytest.raises(ValueError, match=r"layer: '0\.module\.4' has seen no pass"):
        _ = watched.embedding


def test_the_input_of_the_last_layer() -> None:
    model = classifier()
    with watching(model) as watched:
        logits = model.logits(images())
    torch.testing.assert_close(watched.embedding, first(7, model.module, normalised(images())))
    torch.testing.assert_close(model.module[7](watched.embedding), logits)


def test_an_input_given_by_keyword() -> None:
    model = Classifier(Own().eval(), num_classes=CLASSES)
    with watching(model) as watched:
        logits = model.logits(images())
    torch.testing.assert_close(model.module.last(watched.embedding), logits)


def test_the_graph_is_kept() -> None:
    model = classifier()
    with watching(model) as watched:
        model.logits(images())
    watched.embedding.sum().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad(set_to_none=True)
    first(7, expected.module, normalised(images())).sum().backward()
    for (name, parameter), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        if name.startswith("module.7"):
            assert parameter.grad is None
        else:
            assert wanted.grad is not None
            torch.testing.assert_close(parameter.grad, wanted.grad, msg=name)


def test_without_a_gradient_there_is_no_graph() -> None:
    model = classifier()
    with watching(model) as watched, torch.no_grad():
        model.logits(images())
    assert not watched.embedding.requires_grad


SHAPES: dict[str, tuple[str, Callable[[nn.Sequential, Tensor], Tensor]]] = {
    "maps": ("0", lambda module, x: module[0](x).mean((2, 3))),
    "maps that are changed in place": ("1", lambda module, x: first(2, module, x).mean((2, 3))),
    "vectors that are changed in place": ("4", lambda module, x: first(5, module, x)),
    "what was changed in place": ("5", lambda module, x: first(6, module, x)),
    "logits": ("7", lambda module, x: module(x)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_the_output_of_a_layer(case: str) -> None:
    layer, expected = SHAPES[case]
    model = classifier()
    with watching(model, layer) as watched:
        logits = model.logits(images())
    torch.testing.assert_close(watched.embedding, expected(model.module, normalised(images())))
    (watched.embedding.sum() + logits.sum()).backward()


class Tokens(nn.Module):
    """Gives what it is told to, then logits."""

    def __init__(self, given: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.given = given
        self.inner = nn.Identity()
        self.inner.register_forward_hook(lambda _, __, output: self.given(output))
        self.last = nn.Linear(3, CLASSES)

    def forward(self, batch: Tensor) -> Tensor:
        self.inner(batch)
        return self.last(batch.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda x: x.flatten(2).mT, lambda x: x.mean((2, 3))),
        (lambda x: (x.flatten(1), None), lambda x: x.flatten(1)),
        (lambda x: [x, x], lambda x: x.mean((2, 3))),
        (lambda x: x[:, :, None], lambda x: x.mean((2, 3))),
    ],
)
def test_sequences_and_several_outputs(given: Callable[..., Any], expected: Callable[..., Tensor]) -> None:
    model = Tokens(given)
    with watching(model, "inner") as watched:
        model(images())
    torch.testing.assert_close(watched.embedding, expected(images()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: {"features": x}, "layer: 'inner' has features of dict; allowed are tensors"),
        (lambda x: x.sum((1, 2, 3)), r"layer: 'inner' has features of shape \[3\]; allowed are tensors"),
        (lambda x: (), "layer: 'inner' has features of tuple"),
    ],
)
def test_features_that_are_none(given: Callable[..., Any], message: str) -> None:
    model = Tokens(given)
    with pytest.raises(ValueError, match=message), watching(model, "inner"):
        model(images())
    assert len(model.inner._forward_hooks) == 1


@pytest.mark.parametrize("layer", [None, "4"])
def test_the_latest_pass_wins(layer: str | None) -> None:
    model = classifier()
    with watching(model, layer) as watched:
        model.logits(images(seed=1))
        first = watched.embedding
        model.logits(images(2, seed=2))
        second = watched.embedding
        model(images(seed=1))
    assert second.shape == (2, 6)
    torch.testing.assert_close(watched.embedding, first)


@pytest.mark.parametrize("layer", [None, "4"])
def test_hooks_are_removed(layer: str | None) -> None:
    model = classifier()
    target = model.module.get_submodule(layer or "7")
    with watching(model, layer) as watched:
        assert len(target._forward_hooks) + len(target._forward_pre_hooks) == 1
        model.logits(images())
    assert not target._forward_hooks
    assert not target._forward_pre_hooks
    kept = watched.embedding
    model.logits(images(seed=3))
    assert watched.embedding is kept
    with pytest.raises(RuntimeError), watching(model, layer):
        model.logits(torch.zeros(2, 3, 5, 5))
    assert not target._forward_hooks
    assert not target._forward_pre_hooks


@pytest.mark.parametrize("layer", [None, "4"])
def test_passes_of_a_copy_are_not_seen(layer: str | None) -> None:
    model = classifier()
    with watching(model, layer) as watched:
        model.logits(images())
        kept = watched.embedding
        copy.deepcopy(model).logits(images(seed=3))
        assert watched.embedding is kept


def test_two_watchers() -> None:
    model = classifier()
    with watching(model) as last, watching(model, "4") as inner:
        model.logits(images())
    torch.testing.assert_close(last.embedding, inner.embedding.relu())


def test_logits_are_as_without() -> None:
    model = classifier()
    plain = model.logits(images())
    for layer in (None, "0", "4"):
        with watching(model, layer):
            assert torch.equal(model.logits(images()), plain)


def test_a_wrapper_around_the_classifier() -> None:
    """As DistributedDataParallel: passes go through the wrapper, the classifier inside is watched."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    model = classifier()
    with watching(model) as watched:
        logits = Wrapper(model)(images())
    torch.testing.assert_close(model.module[7](watched.embedding), logits)


def test_autocast() -> None:
    model = classifier()
    with watching(model) as watched, torch.autocast("cpu", torch.bfloat16):
        model.logits(images())
    assert watched.embedding.dtype == torch.bfloat16


def test_no_pass_yet() -> None:
    with watching(classifier()) as watched, pytest.raises(ValueError, match="layer: '7' has seen no pass"):
        _ = watched.embedding


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "layer44",
            r"layer: got 'layer44' \(did you mean 'layer4'\?\); allowed are names .* layer3, layer4, avgpool, fc",
        ),
        ("", "layer: got ''; allowed are names"),
        ("layer1.7", r"layer: got 'layer1\.7' \(did you mean"),
    ],
)
def test_an_unknown_layer(layer: str, message: str) -> None:
    with torch.device("meta"):
        model = Classifier(torchvision.models.resnet18())
    with pytest.raises(ValueError, match=message), watching(model, layer):
        pass


@pytest.mark.parametrize("layer", [None, "0", "4"])
def test_nothing_waits_for_the_device(layer: str | None) -> None:
    model, batch = Network().eval(), images()
    with watching(model, layer) as watched, NoSync("cpu"):
        model(batch)
        watched.embedding.sum().backward()

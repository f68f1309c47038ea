from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_iter

from alignfast.alignment.training_kernels import MINIMAL, TRAINED, TrainedBatchNorm2d, trained_by_kernels
from tests.alignment import test_align as plain

WIDTH, CLASSES = 24, 5


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1, bias=False),
            BatchNormAct2d(WIDTH, act_layer=nn.ReLU6, act_kwargs={"inplace": True}),
            nn.Conv2d(WIDTH, WIDTH, 5, 2, padding=2, groups=WIDTH, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            Conv2dSame(WIDTH, WIDTH, 3, 2, groups=WIDTH, bias=False),
            BatchNormAct2d(WIDTH, act_layer=nn.SiLU),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTH, CLASSES),
        ).to(memory_format=torch.channels_last)


def images(count: int = 4, side: int = 18) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, shown: Tensor, *, kernels: bool, half: bool) -> dict[str, Tensor]:
    """The logits, gradients and buffers behind one pass of a copy in training mode."""
    model = copy.deepcopy(model).train()
    with trained_by_kernels(model, shown[:1], half=half) if kernels else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, half):
            logits = model(shown.contiguous(memory_format=torch.channels_last))
        (logits * torch.linspace(-1, 1, CLASSES)).sum().backward()
    found = {"logits": logits.detach()} | dict(model.named_buffers())
    return found | {f"grad of {name}": value.grad for name, value in model.named_parameters() if value.grad is not None}


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - value).norm() / (value.double().norm() + 1e-3))
        for name, value in wanted.items()
    }


@pytest.mark.parametrize(("half", "most"), [(False, 1e-3), (True, 0.4)])
def test_passes_gradients_and_running_statistics_are_as_near_to_float64_as_those_of_torch(
    half: bool, most: float
) -> None:
    model = network()
    wanted = trained(copy.deepcopy(model).double(), images().double(), kernels=False, half=False)
    found, theirs = (
        distances(trained(model, images(), kernels=kernels, half=half), wanted) for kernels in (True, False)
    )
    assert len(found) > 15
    assert max(found.values()) < most
    assert sum(found.values()) < 4 * sum(theirs.values())


@pytest.mark.parametrize("half", [False, True])
def test_the_layers_that_are_slow_in_torch_are_served(half: bool) -> None:
    model = network()
    kinds = [type(part) for part in model]
    parameters = [id(value) for value in model.parameters()]
    with trained_by_kernels(model, images(), half=half):
        served = [index for index, part in enumerate(model) if type(part) in TRAINED.values()]
        assert [id(value) for value in model.parameters()] == parameters
        assert all(isinstance(part, kind) for part, kind in zip(model, kinds, strict=True))
    assert served == ([1, 2, 3, 4, 5, 6] if half else [1, 2, 3, 4, 6])
    assert [type(part) for part in model] == kinds


def test_layers_are_as_before_behind_an_error() -> None:
    model = network()
    kinds = [type(part) for part in model]
    with pytest.raises(KeyError), trained_by_kernels(model, images(), half=True):
        raise KeyError
    assert [type(part) for part in model] == kinds


def test_hooks_see_what_they_see_without_kernels() -> None:
    """On the rectifier inside of a normalisation, on the normalisation and on the convolution behind it."""
    seen: dict[bool, list[Tensor]] = {}
    for kernels in (False, True):
        model, kept = network().train(), seen.setdefault(kernels, [])

        def keep(part: nn.Module, inputs: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append(output.detach().clone())

        with trained_by_kernels(model, images(), half=True) if kernels else nullcontext():
            model[1].act.register_forward_pre_hook(
                lambda part, inputs, kept=kept: kept.append(inputs[0].detach().clone())
            )
            for part in (model[1].act, model[1], model[2]):
                part.register_forward_hook(keep)
            model(images().contiguous(memory_format=torch.channels_last))
    assert len(seen[True]) == len(seen[False]) == 4
    assert float(seen[True][0].min()) < 0
    for found, wanted in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """As of ResNets; use: of the block and its input, the result."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.use = use
        self.conv, self.other = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.same = nn.Identity()
        self.boxed = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
        self.act: nn.Module = act(inplace=True)
        self.out_of_place: nn.Module = act()

    def forward(self, input: Tensor) -> Tensor:
        return self.use(self, input)


def straight(block: Any, rows: Tensor) -> Any:
    return block.act(block.same(block.norm(block.conv(rows))))


def shared(block: Any, rows: Tensor) -> Any:
    """One rectifier behind both normalisations and the sum, as in torchvision's."""
    rows = block.act(block.norm(block.conv(rows)))
    out = block.norm2(block.other(rows))
    out += rows
    return block.act(out)


def side_by_side(block: Any, rows: Tensor) -> Any:
    """The rectifier gets the one when it has been told of the other."""
    one, two = block.norm(block.conv(rows)), block.norm2(block.other(rows))
    return block.act(one) - 2 * block.act(two)


def told_and_not_used(block: Any, rows: Tensor) -> Any:
    one = block.norm(block.conv(rows))
    other = block.act(block.other(rows))
    return block.act(one) + other


def used_twice(block: Any, rows: Tensor) -> Any:
    out = block.norm(block.conv(rows))
    return block.out_of_place(out) + out


def in_a_box(block: Any, rows: Tensor) -> Any:
    return block.act(block.boxed(rows))


BLOCKS = {
    straight: 1,
    shared: 1,
    side_by_side: 2,
    told_and_not_used: 1,
    used_twice: 0,
    in_a_box: 1,
}


def clipping(module: nn.Module) -> int:
    """How many normalisations do the rectifier behind them."""
    return sum(part.behind is not None for part in module.modules() if isinstance(part, TrainedBatchNorm2d))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("use", BLOCKS, ids=lambda use: use.__name__)
def test_rectifiers_behind_normalisations(use: Any, act: type[nn.Module]) -> None:
    """Twice, so that what the first pass leaves in the parts would be seen in the second."""
    torch.manual_seed(0)
    block = Block(use, act)
    shown = 4 * images().contiguous(memory_format=torch.channels_last)
    passes = []
    for kernels in (False, True):
        model, rows = copy.deepcopy(block).train(), shown.clone().requires_grad_()
        with trained_by_kernels(model, shown[:1], half=False) if kernels else nullcontext():
            assert clipping(model) == (BLOCKS[use] if kernels else 0)
            results = [model(rows) for _ in range(2)]
            weights = torch.linspace(-1, 2, results[0].numel()).view_as(results[0])
            torch.stack([(one * weights).sum() for one in results]).sum().backward()
        found = {f"result {place}": one.detach() for place, one in enumerate(results)} | dict(model.named_buffers())
        found |= {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        passes.append(found | {"images": rows.grad})
        assert not any({"behind", "clipped"} & part.__dict__.keys() for part in model.modules())
        assert [type(part) for part in model.modules()] == [type(part) for part in block.modules()]
    assert max(distances(*passes).values()) < 1e-3


@pytest.mark.parametrize("part", ["norm", "same", "act"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_between_a_normalisation_and_its_rectifier_see_what_they_see_in_torch(part: str, kind: str) -> None:
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    for kernels, kept in seen.items():
        torch.manual_seed(0)
        model = Block(straight).train()
        model.act.inplace = False

        def keep(part: nn.Module, *given: Any, kept: list[Tensor] = kept) -> None:
            kept.extend(value.detach().clone() for value in tree_iter(given) if isinstance(value, Tensor))

        with trained_by_kernels(model, images()[:1], half=False) if kernels else nullcontext():
            getattr(model.get_submodule(part), f"register_{kind}_hook")(keep)
            model(images().contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert len(seen[True]) == len(seen[False]) > 0
    for found, wanted in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_the_rectifiers_of_a_resnet() -> None:
    """Of either library all but those behind the sums."""
    for model, norms in ((timm.create_model("resnet18"), 9), (torchvision.models.resnet18(), 9)):
        with trained_by_kernels(model, torch.rand(1, 3, 64, 64), half=False):
            assert clipping(model) == norms


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3).double(),
        nn.BatchNorm1d(3),
    ],
    ids=["no weight", "no statistics", "float64", "flat"],
)
def test_normalisations_that_are_left_to_torch(norm: nn.Module) -> None:
    kind = type(norm)
    with trained_by_kernels(norm, images(), half=True):
        assert type(norm) is kind


def test_frozen_statistics_stay_in_use() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(0.3)
    wanted = norm(images())
    with trained_by_kernels(norm, images(), half=False):
        assert torch.equal(norm(images()), wanted)
    assert norm.num_batches_tracked == 0


def test_plain_means_of_statistics_are_left_to_torch() -> None:
    """As recalibration takes them, by a momentum of None for a while."""
    norm, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)
    with trained_by_kernels(norm, images(), half=False):
        norm.momentum = None
        for seed in range(3):
            shown = images() + seed
            assert torch.equal(norm(shown), other(shown))
    torch.testing.assert_close(norm.state_dict(), other.state_dict())


@pytest.mark.parametrize("policy", ["freeze", "recalibrate"])
def test_policies_of_statistics_do_what_they_do_without_kernels(policy: str) -> None:
    found, wanted = (
        plain.align(
            plain.classifier(0),
            plain.classifier(1),
            plain.batches(),
            plain.config_of(channels_last=channels_last, batch_norm=policy),
        ).model.state_dict()
        for channels_last in (True, False)
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_one_value_a_channel_is_refused_as_torch_does() -> None:
    norm = nn.BatchNorm2d(3)
    with trained_by_kernels(norm, images(), half=False), pytest.raises(ValueError, match="Expected more than 1 value"):
        norm(torch.rand(1, 3, 1, 1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 5, groups=2),
        nn.Conv2d(4, 8, 5, groups=4),
        nn.Conv2d(4, 4, 5, groups=4, dilation=2),
        nn.Conv2d(4, 4, 5, groups=4, padding="same"),
        nn.Conv2d(4, 4, 5, groups=4, padding=2, padding_mode="reflect"),
        nn.Conv2d(4, 4, 33, groups=4),
    ],
    ids=["two channels a group", "two results a channel", "dilated", "named padding", "reflecting", "large"],
)
def test_convolutions_that_are_left_to_torch(layer: nn.Conv2d) -> None:
    with trained_by_kernels(layer, images(), half=True):
        assert type(layer) is nn.Conv2d


def test_parametrized_weights_are_left_to_torch() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(4, 4, 5, groups=4))
    kind = type(layer)
    with trained_by_kernels(layer, images(), half=True):
        assert type(layer) is kind


def minimal_network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, 16, 3, padding=1),
            nn.ReLU(),
            Conv2dSame(16, 20, 3, bias=False),
            nn.Conv2d(20, 20, 3, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(20, CLASSES),
        ).to(memory_format=torch.channels_last)


def test_convolutions_of_3_x_3_and_their_gradients() -> None:
    model = minimal_network()
    wanted = trained(copy.deepcopy(model).double(), images().double(), kernels=False, half=False)
    found = trained(model, images(), kernels=True, half=False)
    assert len(found) == 10
    assert max(distances(found, wanted).values()) < 1e-5
    # As they differ from torch's, they served.
    assert not torch.equal(found["logits"], trained(model, images(), kernels=False, half=False)["logits"])


@pytest.mark.parametrize("half", [False, True])
def test_convolutions_of_3_x_3_are_served_in_float32(half: bool) -> None:
    model = minimal_network()
    kinds = [type(part) for part in model]
    with trained_by_kernels(model, images(), half=half):
        assert [i for i, part in enumerate(model) if type(part) in MINIMAL.values()] == ([] if half else [1, 3])
    assert [type(part) for part in model] == kinds


def test_twenty_steps_of_a_run_equal_the_plain_loop() -> None:
    source, witness = plain.classifier(0), plain.classifier(1)
    data = plain.batches()
    config = plain.config_of(channels_last=True)
    wanted, history = plain.plain_loop(source, [witness], data, config)
    result = plain.align(source, witness, data, config)
    assert [type(part) for part in result.model.modules()] == [type(part) for part in source.modules()]
    found = result.model.module.state_dict()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    losses = [entry["loss"] for entry in result.history]
    assert losses == pytest.approx([entry["loss"] for entry in history], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [network, minimal_network])
def test_it_compiles(make: Callable[[], nn.Sequential]) -> None:
    model = make().train()
    shown = images().contiguous(memory_format=torch.channels_last)
    with trained_by_kernels(model, shown, half=False):
        eager = model(shown)
        compiled = torch.compile(copy.deepcopy(model))(shown)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)

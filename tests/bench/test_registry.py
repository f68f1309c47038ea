"""Every case is right at a small size, and counts the bytes that have to be moved."""

from __future__ import annotations

import pytest
import torch

from alignfast import ops
from alignfast.bench import registry, sides, work
from alignfast.bench.registry import CASES, DTYPES, OP_CASES, OPS, Case, select

SMALL = {2: (5, 11), 4: (2, 3, 16, 16), 5: (2, 9, 3, 2, 8)}
# 2 images of 3 x 16 x 16 have 1536 elements, and 5 rows of 11 logits 55.
BYTES = {
    # Both logits in, the gradient and a float32 loss out.
    ("kl_div_with_logits", "loss and gradient", "fp32"): 3 * 55 * 4 + 4,
    ("kl_div_with_logits", "loss and gradient", "bf16"): 3 * 55 * 2 + 4,
    # The point, the images, the gradient and the momentum in, the point and the momentum out.
    ("sign_step", "momentum", "fp32"): 6 * 1536 * 4,
    ("sign_step", "momentum", "bf16"): 6 * 1536 * 2,
    ("sign_step", "plain", "fp32"): 4 * 1536 * 4,
    ("sign_step", "plain", "bf16"): 4 * 1536 * 2,
    ("smooth", "15x15", "fp32"): 2 * 1536 * 4,
    ("smooth", "15x15", "bf16"): 2 * 1536 * 2,
    # Images in and the result out, a quarter of them at stride 2; gradients read one more of each.
    ("depthwise_conv2d", "3x3 forward", "fp32"): 2 * 1536 * 4,
    ("depthwise_conv2d", "3x3 backward", "bf16"): 4 * 1536 * 2,
    ("depthwise_conv2d", "5x5 stride 2 forward", "bf16"): (1536 + 384) * 2,
    ("depthwise_conv2d", "5x5 stride 2 backward", "fp32"): 2 * (1536 + 384) * 4,
    # The weight itself is not counted.
    ("depthwise_conv2d", "5x5 stride 2 weight", "fp32"): (1536 + 384) * 4,
    # A sixth as many channels, but one at least.
    ("inverted_residual", "forward", "bf16"): 2 * 512 * 2,
    ("inverted_residual", "backward", "fp32"): 2 * 512 * 4,
    # Images in and the result out, or its gradient in and theirs out.
    ("winograd_conv2d", "forward", "fp32"): 2 * 1536 * 4,
    ("winograd_conv2d", "backward", "fp32"): 2 * 1536 * 4,
    ("basic_block", "forward", "fp32"): 2 * 1536 * 4,
    ("basic_block", "backward", "fp32"): 2 * 1536 * 4,
    # Queries, keys, values and what comes out, or its gradient and theirs: 4 x 288.
    ("attention", "forward", "fp32"): 4 * 288 * 4,
    ("attention", "backward", "bf16"): 4 * 288 * 2,
    ("batch_norm", "forward", "fp32"): 2 * 1536 * 4,
    ("batch_norm", "backward", "bf16"): 3 * 1536 * 2,
    # Images are float32 on one side, and a batch of any dtype is on the other.
    ("diversify", "enlarge forward", "fp32"): 2 * 1536 * 4,
    ("diversify", "enlarge forward", "bf16"): 1536 * (4 + 2),
    ("diversify", "shrink backward", "bf16"): 1536 * (4 + 2),
    ("diversify", "enlarge 5 copies forward", "fp32"): 1536 * (4 + 5 * 4),
    ("diversify", "shrink 5 copies backward", "bf16"): 1536 * (4 + 5 * 2),
    ("diversify", "noise 5 copies forward", "bf16"): 1536 * (4 + 5 * 2),
    ("philox_uniform", "unit", "fp32"): 1536 * 4,
}
PASSES = {"pgd": 10, "mifgsm": 10, "difgsm": 10, "sinifgsm": 50, "vmifgsm": 55}
KINDS = list({(case.subject, case.variant, case.dtype): case for case in OP_CASES}.values())


def small(case: Case) -> tuple[int, ...]:
    return SMALL[len(case.shape)]


def named(op: str, variant: str, dtype: str = "fp32") -> Case:
    return next(case for case in KINDS if (case.subject, case.variant, case.dtype) == (op, variant, dtype))


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_the_op_and_the_expression_are_right(case: Case) -> None:
    made = case.subject_on(shape=small(case))
    assert sides.find_fault(made, sides.make_sides(made, compiled=False)) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_what_is_compiled_is_right(case: Case) -> None:
    made = case.subject_on(shape=small(case))
    assert sides.find_fault(made, sides.make_sides(made, compiled=True)) is None


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_the_check_would_notice(case: Case) -> None:
    """Of results that are off by a tenth, or belong to other images, none passes."""
    made = case.subject_on(shape=small(case))
    expected = made.expected()
    for change in (lambda x: 1.1 * x, lambda x: x.flip(tuple(range(x.ndim))) if x.ndim else x + 1):
        changed = tuple(change(tensor) for tensor in expected)
        assert sides.find_fault(made, {"ours": lambda changed=changed: changed}) is not None


def test_every_op_has_cases() -> None:
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert set(OPS) == functions


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", BYTES, ids="/".join)
def test_bytes(kind: tuple[str, str, str]) -> None:
    case = named(*kind)
    assert case.subject_on(shape=small(case)).cost.moved == BYTES[kind]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_bytes_are_counted_without_memory(case: Case) -> None:
    assert case.subject_on("meta", small(case)).cost == case.subject_on("cpu", small(case)).cost


def test_operations_are_those_of_the_passes() -> None:
    """A ResNet-18 needs 3.63 GFLOP an image (1.81 of multiply-adds), and about as many for the input's gradient."""
    cases = select(["attacks"], match="resnet18", device="cuda", smallest=True)
    costs = {case.subject: case.subject_on("meta").cost for case in cases}
    assert set(costs) == set(PASSES)
    for preset, passes in PASSES.items():
        assert costs[preset].moved == 0
        assert costs[preset].flops == pytest.approx(passes * 8 * 2 * 3.63e9, rel=0.01), preset
    align, *_ = select(["alignment"])
    # A ResNet-50 has 8.18 GFLOP and three times as many in training, but for the gradient of the images.
    assert align.subject_on("meta").cost.flops == pytest.approx(2 * 8 * (3 * 8.18e9 + 3.63e9), rel=0.02)
    bare, *_ = select(["preparation"])
    assert bare.subject_on("meta").cost.flops == pytest.approx(8 * 2 * 8.18e9, rel=0.01)


def test_targets_of_attacks_on_two_cores() -> None:
    by_name = {case.name: case for case in select(["attacks"])}
    large = by_name["mifgsm/resnet50 1 step/bf16/32x3x224x224"]
    assert (large.targets, large.memory) == ({"torchattacks": 2.5, "model": 0.97, "gemm": 0.85}, 0.6)
    assert by_name["mifgsm/tf_efficientnet_lite2 10 steps/bf16/8x3x224x224"].targets == {
        "torchattacks": 3.3,
        "model": 0.95,
    }
    # 2.5 in ten steps.
    assert by_name["vmifgsm/resnet50 3 steps/bf16/4x3x224x224"].targets["torchattacks"] == pytest.approx(3.17, abs=0.01)
    assert by_name["mifgsm/cifar_resnet20 4 steps/bf16/128x3x32x32"].targets["torchattacks"] == 3.0


def test_bf16_is_not_measured_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(registry, "has_bf16", lambda device: False)
    lacking = [case for case in select() if case.lacks(cpu) is not None]
    assert lacking == [case for case in select(registry.MODELS) if case.dtype == "bf16"]
    assert {case.lacks(cpu) for case in lacking} == {"this hardware has no bfloat16"}
    monkeypatch.setattr(registry, "has_bf16", lambda device: True)
    assert not [case for case in select() if case.lacks(cpu) is not None]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_the_dtype_is_that_of_the_op(case: Case) -> None:
    results = case.subject_on(shape=small(case)).ours()
    wanted = DTYPES[case.dtype]
    if case.subject == "kl_div_with_logits":
        assert [result.dtype for result in results] == [torch.float32, wanted]
    elif case.subject == "batch_norm":
        assert [result.dtype for result in results] == [wanted, torch.float32, torch.float32][: len(results)]
    elif case.subject == "diversify" and "backward" in case.variant:
        assert [result.dtype for result in results] == [torch.float32]
    else:
        assert {result.dtype for result in results} == {wanted}


def test_inputs_are_the_same_every_time() -> None:
    for case in KINDS:
        first, second = (case.subject_on(shape=small(case)).ours() for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case.name


def test_the_step_in_place_leaves_the_inputs_of_the_expression() -> None:
    case = named("sign_step", "momentum")
    made = case.subject_on(shape=small(case))
    before = made.bind(made.expression)()
    adv, momentum = (tensor.clone() for tensor in made.ours())
    made.ours()
    after = made.bind(made.expression)()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(made.ours()[1], momentum)
    assert bool(((adv >= 0) & (adv <= 1)).all())


@pytest.mark.parametrize(("rate", "low", "padded"), [(1.1, 224, 246), (0.9, 201, 224)])
def test_places_are_those_the_peers_draw(rate: float, low: int, padded: int) -> None:
    places = [work.Place.draw(224, rate, seed) for seed in range(200)]
    assert {place.padded for place in places} == {padded}
    assert {place.resized for place in places} == set(range(low, padded))
    for place in places:
        room = padded - place.resized
        assert 0 <= place.top < room
        assert 0 <= place.left < room


def test_selection() -> None:
    assert select() == [case for case in CASES if "cpu" in case.devices]
    assert {case.group for case in select()} == set(registry.GROUPS)
    assert {case.group for case in select(device="cuda")} == set(registry.GROUPS) - {"files"}
    assert {case.group for case in select(["attacks", "alignment"])} == {"attacks", "alignment"}
    assert select(["attacks"], ["sign_step"]) == []
    steps = select((), ["sign_step"], ["bf16"])
    assert {(case.subject, case.dtype) for case in steps} == {("sign_step", "bf16")}
    assert len(steps) == 6
    assert [case.shape[0] for case in select(["ops"], ["sign_step"], ["bf16"], "plain")] == [8, 32, 128]
    assert [case.name for case in select((), ["sign_step"], match="plain", smallest=True)] == [
        "sign_step/plain/fp32/8x3x224x224",
        "sign_step/plain/bf16/8x3x224x224",
    ]
    assert select(match="nothing has this") == []
    # Cases that differ in the number of steps too are of one kind.
    assert [case.shape[0] for case in select(match="mifgsm/resnet50", dtypes=["fp32"], smallest=True)] == [8, 4]
    usual = select(extended=False)
    assert {case.kind for case in usual if case.group == "ops"} == {case.kind for case in OP_CASES}
    shapes = {case.shape for case in usual if case.group == "ops"}
    features = {(8, 144, 56, 56), (8, 128, 28, 28), (128, 16, 32, 32)}
    assert shapes == features | {(32, 3, 224, 224), (1024, 1000), (8, 197, 3, 6, 64)}

"""The authors' loop, restated: against its equations, and against the package's own version of their function."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from alignfast.bench.reference.alignment import Recipe, accuracies, align, distillation
from alignfast.compat.model_alignment import DistillKL, model_alignment


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return network(), network()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 7))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(6, 3, 8, 8), torch.randint(7, (6,))) for _ in range(count)]


def test_distillation_is_the_divergence() -> None:
    logits, taught = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (torch.softmax(part / 4, 1) for part in (taught, logits))
    expected = (p * (p.log() - q.log())).sum(1).mean() * 16
    assert distillation(logits, taught, 4.0) == pytest.approx(float(expected))
    assert distillation(logits.bfloat16(), taught.bfloat16(), 4.0).dtype == torch.float32


@pytest.mark.parametrize("lambda_cls", [0.0, 0.5])
def test_the_loop_is_theirs(lambda_cls: float) -> None:
    source, witness = models()
    data, recipe = batches(), Recipe(lr=0.05, lambda_cls=lambda_cls)
    other = copy.deepcopy(source)
    losses = align(source, witness, data, recipe)
    optimizer = torch.optim.SGD(other.parameters(), 0.05, 0.9, weight_decay=1e-4, nesterov=True)
    steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    # Their schedule is told how far the pass has come, in epochs of which there is one.
    schedule = SimpleNamespace(step=lambda passed: steps.step())
    args = SimpleNamespace(lambda_kd=1.0, lambda_cls=lambda_cls, clip_grad_norm=None, debug=False, print_freq=100)
    distil, classify = DistillKL(4.0), nn.CrossEntropyLoss()
    *_, histories = model_alignment(
        data, other, witness, distil, classify, optimizer, schedule, None, "cpu", args, is_main_task=False
    )
    assert losses == pytest.approx(histories[0].tolist(), rel=1e-4)
    for mine, theirs in zip(source.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert source.training
    assert not witness.training


def test_under_autocast_the_passes_are_in_bf16() -> None:
    source, witness = models()
    seen: list[torch.dtype] = []
    source[4].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    losses = align(source, witness, batches(2), Recipe(), torch.autocast("cpu", torch.bfloat16))
    assert seen == [torch.bfloat16] * 2
    assert len(losses) == 2
    assert not torch.is_autocast_enabled("cpu")


def test_accuracies() -> None:
    logits = torch.eye(6) + torch.arange(6) * 1e-3
    first, five = accuracies(logits, torch.tensor([0, 1, 2, 3, 4, 4]))
    assert first == pytest.approx(5 / 6)
    assert five == 1.0
    assert accuracies(torch.eye(2), torch.tensor([1, 1])) == (0.5, 1.0)

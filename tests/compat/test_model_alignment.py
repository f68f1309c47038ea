"""The drop-in for the authors' loop, against that loop written out."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.data import DataLoader, TensorDataset

from alignfast.compat.model_alignment import DistillKL, model_alignment
from tests.attacks.no_sync import READING, tensors

STEPS, CLASSES = 20, 7
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in")


class Net(nn.Sequential):
    def __init__(self, width: int, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            super().__init__(*body, nn.Linear(4 * width, CLASSES))
        self.autocast: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        logits: Tensor = super().forward(images)
        return 5 * logits


def batches(count: int = STEPS, size: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    # The last batch is smaller, which the means over images have to mind.
    images = torch.randn((count * size - 2, 3, 8, 8), generator=generator)
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def arguments(**changes: Any) -> Namespace:
    return Namespace(
        **{"lambda_kd": 1.0, "lambda_cls": 0.0, "clip_grad_norm": None, "debug": False, "print_freq": 1000} | changes
    )


def optimiser(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1)


def run(
    source: nn.Module, witness: nn.Module, loader: Any, args: Namespace, scaler: Any = None, main: bool = False
) -> Any:
    optimizer, scheduler = optimiser(source)
    criteria = (DistillKL(4.0), nn.CrossEntropyLoss())
    return model_alignment(loader, source, witness, *criteria, optimizer, scheduler, scaler, CPU, args, main)


def plainly(source: nn.Module, witness: nn.Module, loader: Any, args: Namespace) -> list[tuple[float, ...]]:
    """The same in few words; (loss, cls, align, right in one, right in five, images) a step."""
    optimizer, scheduler = optimiser(source)
    source.train()
    witness.eval()
    rows = []
    for i, (images, labels) in enumerate(loader):
        logits, taught = source(images), witness(images).detach()
        align = kl_div(log_softmax(logits / 4, 1), softmax(taught / 4, 1), reduction="sum") * 16 / len(images)
        cls = cross_entropy(logits, labels)
        loss = args.lambda_kd * align + args.lambda_cls * cls
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(source.parameters(), args.clip_grad_norm)
        optimizer.step()
        scheduler.step((i + 1) / len(loader))
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
        rows.append((*(x.item() for x in (loss, cls, align, (ranks < 1).sum(), (ranks < 5).sum())), len(images)))
    return rows


@pytest.mark.parametrize(
    "changes", [{}, {"lambda_kd": 0.7, "lambda_cls": 0.3, "clip_grad_norm": 0.5}], ids=["default", "all"]
)
def test_weights_and_histories_are_those_of_the_plain_loop(changes: dict[str, Any]) -> None:
    args, witness = arguments(**changes), Net(6, 1)
    ours, theirs = Net(4, 0), Net(4, 0)
    top1, top5, loss, histories = run(ours, witness, batches(), args)
    rows = np.array(plainly(theirs, witness, batches(), args))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert len(histories) == 3
    for history, expected in zip(histories, rows[:, :3].T, strict=True):
        assert history.dtype == np.float64
        np.testing.assert_allclose(history, expected, rtol=1e-5, atol=5e-6)
    # So that it is seen to have learned.
    assert rows[-1, 2] < 0.7 * rows[0, 2]
    images = rows[:, 5].sum()
    # But for one image, whose order of logits rounding may turn.
    assert float(top1) == pytest.approx(100 * rows[:, 3].sum() / images, abs=1.0)
    assert float(top5) == pytest.approx(100 * rows[:, 4].sum() / images, abs=1.0)
    assert loss == pytest.approx((rows[:, 0] * rows[:, 5]).sum() / images, rel=1e-5)


def test_the_witness_is_left_as_it_was() -> None:
    witness = Net(4, 1)
    witness[0].weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in witness.parameters()]
    before = copy.deepcopy(witness.state_dict())
    source = Net(4, 0)
    run(source, witness, batches(3), arguments(lambda_cls=1.0))
    assert [parameter.requires_grad for parameter in witness.parameters()] == flags
    assert all(parameter.grad is None for parameter in witness.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in witness.state_dict().items())
    assert source.training
    assert not witness.training


def test_with_a_scaler_it_computes_under_autocast() -> None:
    def aligned(**amp: Any) -> tuple[Net, Net]:
        source, witness = Net(4, 0), Net(4, 1)
        scaler = torch.amp.GradScaler("cpu")
        run(source, witness, batches(), arguments(clip_grad_norm=0.5, **amp), scaler)
        return source, witness

    plain = Net(4, 0)
    run(plain, Net(4, 1), batches(), arguments(clip_grad_norm=0.5))
    for mixed, models in ((True, aligned(amp=True)), (True, aligned()), (False, aligned(amp=False))):
        assert {*models[0].autocast, *models[1].autocast} == {mixed}
        # Were gradients clipped before they are unscaled, the steps would be 65,536 times smaller.
        for ours, theirs in zip(models[0].parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 if mixed else 1e-5)
    assert set(plain.autocast) == {False}


def test_a_disabled_scaler_is_none() -> None:
    source = Net(4, 0)
    run(source, Net(4, 1), batches(2), arguments(amp=True), torch.amp.GradScaler("cpu", enabled=False))
    assert set(source.autocast) == {False}


def test_debug_stops_after_three_steps_and_prints_each(capsys: pytest.CaptureFixture[str]) -> None:
    source = Net(4, 0)
    _, _, _, histories = run(source, Net(4, 1), batches(), arguments(debug=True))
    assert [len(history) for history in histories] == [3, 3, 3]
    assert len(source.autocast) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"Model Alignment[ {i}/20]" for i in (1, 2, 3)]
    assert f"Loss {histories[0][2]:.4e} (" in lines[2]
    _, _, _, histories = run(Net(4, 0), Net(4, 1), batches(2), arguments(debug=True))
    assert [len(history) for history in histories] == [2, 2, 2]


@pytest.mark.parametrize(("main", "lines"), [(True, 3), (False, 0)])
def test_the_main_task_prints_now_and_then(main: bool, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    run(Net(4, 0), Net(4, 1), batches(), arguments(print_freq=8), main=main)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert all("Acc@5" in line for line in printed)


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reading(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # The loader reads its own indices.
            if READING & set(func.tags) and any(leaf.is_floating_point() for leaf in tensors(args)):
                type(self).count += 1
            return func(*args, **(kwargs or {}))

    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (reads.append(self.shape), tolist(self))[1])
    with Reading():
        run(Net(4, 0), Net(4, 1), list(batches(70)), arguments(clip_grad_norm=1.0, lambda_cls=0.5))
    assert Reading.count == 0
    assert reads == [(50, 5), (20, 5)]


def test_an_empty_loader() -> None:
    with pytest.raises(ValueError, match="train_loader: holds no batch"):
        run(Net(4, 0), Net(4, 1), [], arguments())


def test_few_classes_serve() -> None:
    source, witness = (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)) for _ in range(2))
    loader = [(torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 1]))]
    assert float(run(source, witness, loader, arguments())[1]) == 100.0


def test_distill_kl_is_the_authors_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    student = (4 * torch.randn((6, 9), generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 4 * torch.randn((6, 9), generator=generator, dtype=torch.float64)
    loss = DistillKL(3.0)(student, teacher)
    theirs = kl_div(log_softmax(student / 3, 1), softmax(teacher / 3, 1), reduction="sum") * 9 / 6
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(theirs, student))

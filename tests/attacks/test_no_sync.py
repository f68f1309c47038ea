from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alignfast.models import Classifier, Ensemble
from tests.attacks.no_sync import NoSync
from tests.attacks.samples import CLASSES, GENERAL, Network, build, labels_of, made, photos

FORBIDDEN: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": ("waits", lambda x: x.sum().item()),
    "float": ("waits", lambda x: float(x[0])),
    "list": ("waits", lambda x: [int(value) for value in x]),
    "truth": ("waits", lambda x: bool((x > 0).any())),
    "equal": ("waits", lambda x: torch.equal(x, x + 1)),
    "allclose": ("waits", lambda x: torch.allclose(x, x + 1)),
    "nonzero": ("waits", lambda x: x.nonzero()),
    "argwhere": ("waits", lambda x: torch.argwhere(x)),
    "where": ("waits", lambda x: torch.where(x > 0)),
    "masked_select": ("waits", lambda x: x.masked_select(x > 0)),
    "mask": ("waits", lambda x: x[x > 0]),
    "mask as target": ("waits", lambda x: x.index_put_((x > 0,), x.sum())),
    "unique": ("waits", lambda x: x.unique()),
    "unique_consecutive": ("waits", lambda x: x.unique_consecutive()),
    "bincount": ("waits", lambda x: x.long().bincount()),
    "repeat_interleave": ("waits", lambda x: torch.repeat_interleave(x, x.long())),
    "tensor": ("copies from the host", lambda x: x + torch.tensor([1.0, 2.0, 3.0])),
    "scalar tensor": ("copies from the host", lambda x: x * torch.as_tensor(2.0)),
    "other device": ("not on cpu", lambda x: x.to("meta")),
    "made elsewhere": ("not on cpu", lambda x: torch.zeros(3, device="meta")),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_the_mode_sees_what_it_should(case: str) -> None:
    message, offend = FORBIDDEN[case]
    x = torch.ones(3)
    with NoSync("cpu"), pytest.raises(AssertionError, match=message):
        offend(x)


def test_the_mode_sees_tensors_of_the_host() -> None:
    x, scale = torch.ones(3, device="meta"), torch.tensor(2.0)
    offences: list[Callable[[], object]] = [
        lambda: x * scale,
        lambda: torch.zeros(3),
        lambda: x.copy_(torch.empty(3)),
    ]
    for offend in offences:
        with NoSync("meta"), pytest.raises(AssertionError, match="not on meta"):
            offend()


def test_the_mode_allows_what_does_not_wait() -> None:
    x, order = torch.arange(3.0), torch.tensor([2, 0, 1])
    with NoSync("cpu"):
        assert x[order].shape == (3,)
        assert torch.where(x > 0, x, 0).shape == (3,)
        assert torch.repeat_interleave(x, order, output_size=3).shape == (3,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_no_step_waits_for_the_device(name: str, device: str) -> None:
    """On "meta" tensors a value cannot be read at all, and whatever is made on the host stands out by its device."""
    source = Classifier(Network().eval(), (0.5, 0.5), (0.2, 0.2), CLASSES).to(device)
    images, labels, indices = batch(device)
    with NoSync(device):
        adv = made(name, source)._run(source, images, labels, indices)
    assert adv.device.type == device
    assert adv.shape == images.shape


@pytest.mark.parametrize("combine", ["logits", "probabilities", "losses"])
def test_ensembles_do_not_wait_for_the_device(combine: Any) -> None:
    source = Ensemble([Network().eval(), Network().eval()], combine).to("meta")
    images, labels, indices = batch("meta")
    with NoSync("meta"):
        assert build("vnifgsm", source)._run(source, images, labels, indices).shape == images.shape


@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_every_tensor_of_a_step_is_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors, which know their device and hold nothing.

    Autograd asks the driver for the device of a backward pass, so that its place is taken here; the test with "meta"
    tensors has it.
    """

    def grad_of(gain: Tensor, leaf: Tensor) -> tuple[Tensor]:
        assert gain.requires_grad
        return (torch.ones_like(leaf),)

    monkeypatch.setattr(torch.autograd, "grad", grad_of)
    attack = made(name, Network(), cuda_graph=False)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        with torch.device("cuda"):
            source = Classifier(Network().eval(), (0.5, 0.5), (0.2, 0.2), CLASSES)
        images, labels, indices = (fake.from_tensor(tensor).to("cuda") for tensor in batch("cpu"))
        with NoSync("cuda:0"):
            adv = attack._run(source, images, labels, indices)
    assert adv.device == torch.device("cuda:0")
    assert adv.shape == images.shape


def batch(device: str) -> tuple[Tensor, Tensor, Tensor]:
    return photos(2, torch.float32).to(device), labels_of(2).to(device), torch.arange(2, device=device)

"""Losses, gradients and Hessian-vector products against dense ones."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

import alignfast as af
from alignfast.geometry import field
from alignfast.geometry.field import field_of, logits_of
from tests.geometry.networks import smooth_network

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dense(model: af.Classifier, images: Tensor, row: int) -> Tensor:
    def loss(flat: Tensor) -> Tensor:
        one = flat.view(1, *images.shape[1:])
        return nn.functional.cross_entropy(model.module((one - 0.5) / 0.25), LABELS[row : row + 1])

    return torch.autograd.functional.hessian(loss, images[row].flatten())


def test_logits_are_those_of_the_classifier(images: Tensor) -> None:
    model = smooth_network()
    torch.testing.assert_close(logits_of(model, images), model(images))


def test_images_of_another_size_are_resized(images: Tensor) -> None:
    model = smooth_network()
    model.input_size = (2, 3, 4)
    large = torch.rand(2, 2, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits_of(model, large), model(af.models.fit_size(large, model)))
    assert torch.autograd.gradcheck(lambda rows: logits_of(model, rows), large.requires_grad_())


def test_values_and_gradients_belong_to_their_image(images: Tensor) -> None:
    model = smooth_network()
    loss = field_of(model, LABELS)
    leaf = images.clone().requires_grad_()
    wanted = nn.functional.cross_entropy(model(leaf), LABELS, reduction="none")
    torch.testing.assert_close(loss.values(images), wanted.detach())
    torch.testing.assert_close(loss.gradients(images), torch.autograd.grad(wanted.sum(), leaf)[0])
    alone = field_of(model, LABELS[1:2]).gradients(images[1:2])
    torch.testing.assert_close(alone, loss.gradients(images)[1:2])


@pytest.mark.parametrize(("form", "tolerance"), [("exact", 1e-10), ("finite", 1e-4)])
def test_products_are_those_of_the_dense_hessian(
    images: Tensor, form: field.SecondDerivatives, tolerance: float
) -> None:
    model = smooth_network()
    directions = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = field_of(model, LABELS).hessian(images, form)(directions)
    for row in range(3):
        wanted = dense(model, images, row) @ directions[row].flatten()
        assert float((found[row].flatten() - wanted).norm() / wanted.norm()) < tolerance


def test_a_linear_loss_has_no_curvature() -> None:
    flat = field.Field(lambda images: images.flatten(1).sum(1))
    assert not flat.hessian(torch.rand(2, 1, 2, 2))(torch.ones(2, 1, 2, 2)).any()


class Attending(nn.Module):
    """timm's attention with torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, num_heads=2)
        self.attention.fused_attn = True
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.attention(images.flatten(2)).mean(1))
        return logits


def test_fused_attention_has_products_too() -> None:
    torch.manual_seed(0)
    model = af.Classifier(Attending().eval().requires_grad_(False))
    images = torch.rand(3, 4, 2, 4)
    directions = torch.randn(3, 4, 2, 4)
    exact, finite = (field_of(model, LABELS).hessian(images, form)(directions) for form in ("exact", "finite"))
    assert float((exact - finite).norm() / exact.norm()) < 2e-2


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        return 2 * rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


class OnceDifferentiable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = Once.apply(images.flatten(1))
        return rows.tanh()


class HardSwish(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.hardsigmoid(images.flatten(1) ** 2)


@pytest.mark.parametrize("module", [OnceDifferentiable(), HardSwish()])
def test_models_without_second_derivatives_are_refused_in_one_line(module: nn.Module) -> None:
    loss = field_of(af.Classifier(module), torch.tensor([1]))
    images = torch.rand(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"second_derivatives: got 'exact'.*allowed is 'finite'") as caught:
        loss.hessian(images)(torch.ones_like(images))
    assert "\n" not in str(caught.value)
    assert torch.isfinite(loss.hessian(images, "finite")(torch.ones_like(images))).all()


def test_other_failures_stay_what_they_are(images: Tensor) -> None:
    loss = field_of(smooth_network(), LABELS)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        loss.hessian(images[:, :, :2])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_prepared_models_have_the_same_products(name: str) -> None:
    """Folded, with layers that keep less for the backward pass, and in another layout."""
    torch.manual_seed(0)
    model = af.load_model(f"timm:{name}", num_classes=3, input_size=(3, 64, 64)).eval().requires_grad_(False)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    directions = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    prepared = af.prepare(model, images, "fp32")
    found, wanted = (field_of(one, LABELS[:2]).hessian(images)(directions) for one in (prepared, model))
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3

"""A loss as a function of images: its values, input gradients and Hessian-vector products, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignfast.models import Classifier, fit_size

SecondDerivatives = Literal["exact", "finite"]
Products = Callable[[Tensor], Tensor]

# Half the distance between the two gradients of a finite difference, root mean square over pixels: a quarter of an
# 8-bit level.
FINITE_STEP = 1e-3
# What autograd says of functions that can be differentiated once only.
MISSING = (
    "is not implemented",
    "once_differentiable",
    "second derivative",
    "element 0 of tensors does not require grad",
)


@dataclass(frozen=True)
class Field:
    """value: maps images [N, C, H, W] to one number each, [N], differentiably; that of an image depends on no other."""

    value: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def values(self, images: Tensor) -> Tensor:
        """[N]."""
        return self.value(images)

    def gradients(self, images: Tensor) -> Tensor:
        """[N, C, H, W]: of each image's own value."""
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
        return grad

    def hessian(self, images: Tensor, derivatives: SecondDerivatives = "exact") -> Products:
        """A function from directions [N, C, H, W] to the products with each image's own Hessian.

        exact: by differentiating the gradient, whose graph is kept as long as the function is. Networks of piecewise
        linear layers have the curvature of the loss alone then, that of no kink. finite: by central differences of
        gradients `FINITE_STEP` times sqrt(C H W) to either side, for models without second derivatives; kinks within
        that distance count.

        Raises:
            ValueError: "exact", and the model has no second derivatives.
        """
        return self._differentiated(images) if derivatives == "exact" else partial(self._difference, images)

    def _differentiated(self, images: Tensor) -> Products:
        leaf = images.detach().requires_grad_()
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _twice_differentiable():
            (grad,) = torch.autograd.grad(self.value(leaf).sum(), leaf, create_graph=True)
            _check_whole(grad)
        if not grad.requires_grad:
            return torch.zeros_like

        def product(directions: Tensor) -> Tensor:
            with _twice_differentiable():
                (result,) = torch.autograd.grad(grad, leaf, directions, retain_graph=True, materialize_grads=True)
            return result

        return product

    def _difference(self, images: Tensor, directions: Tensor) -> Tensor:
        norms = lengths(directions)
        step = FINITE_STEP * images[0].numel() ** 0.5
        moved = step * directions / norms.clamp_min(torch.finfo(images.dtype).tiny)
        turn = self.gradients(images + moved) - self.gradients(images - moved)
        products: Tensor = turn * (norms / (2 * step))
        return products


def field_of(model: Classifier, labels: Tensor) -> Field:
    """The cross-entropy of `labels`, int64 [N], for images in [0, 1], which may lie a little outside."""
    return Field(lambda images: F.cross_entropy(logits_of(model, images), labels, reduction="none"))


def logits_of(model: Classifier, images: Tensor) -> Tensor:
    """[N, num_classes], by operations that can be differentiated any number of times; resized where they must be."""
    fitted = fit_size(images, model)

    def render(
        mean: Tensor | None = None,
        std: Tensor | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        rows = fitted if mean is None or std is None else (fitted - mean[:, None, None]) / std[:, None, None]
        return rows.to(dtype=dtype or rows.dtype, memory_format=memory_format)

    return model.logits_of(render)


def lengths(rows: Tensor) -> Tensor:
    """[N, 1, 1, 1]: L2 norms of [N, C, H, W]."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.ndim)), keepdim=True)
    return norms


def _check_whole(grad: Tensor) -> None:
    """RuntimeError where a part of the gradient's graph is missing, which autograd would count as zero.

    A function that is marked as differentiable once puts a node there that raises when it is reached; but what it
    hides leads nowhere, so that nothing ever reaches it on the way to the images.
    """
    seen, waiting = set(), [grad.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            raise RuntimeError("the second derivative of a function is not implemented")
        waiting += [following for following, _ in node.next_functions]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Turns what autograd says of a missing second derivative into one line that offers the other form."""
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in MISSING):
            raise
        raise ValueError(
            f"second_derivatives: got 'exact', which this model does not have ({str(error).splitlines()[0]}); allowed "
            "is 'finite', by differences of gradients"
        ) from error

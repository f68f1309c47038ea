"""What all input transforms have in common."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from alignfast.attacks.component import Component
from alignfast.attacks.views import Views
from alignfast.draws import Draws

__all__ = ["Transform"]


class Transform(Component):
    """Turns views into others, each on its own; with `copies` above 1, each image is shown that many times."""

    copies: int

    @abstractmethod
    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        """`which`, int64 [K] in [0, copies), says which of its copies each view is to be."""

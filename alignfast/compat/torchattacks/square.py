"""Square: random search among square changes, without gradients."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alignfast.checks import check_choice, check_count, check_number, check_shape
from alignfast.compat.torchattacks.auto import TINY, Restarting

__all__ = ["Square"]

# Of 10000 queries, those after which the share of the image that a square covers is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Squares along a side of the first image in L2.
ALONG = 5

Window = tuple[Any, slice, slice]


class Square(Restarting):
    """Random squares, each kept if it lowers the loss (Andriushchenko et al., ECCV 2020).

    norm: "Linf" or "L2"; n_queries: squares tried in a run; p_init: the share of the image that the first squares
    cover; loss: "margin" or "ce"; resc_schedule: squares shrink over n_queries as they would over 10000; seed: None for
    the time.

    Raises:
        ValueError: an unknown norm or loss, or images that are too small or too narrow for the squares of L2.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Literal["Linf", "L2"] = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int | None = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__("Square", model)
        self.norm = norm
        self.n_queries = n_queries
        self.eps = eps
        self.p_init = p_init
        self.n_restarts = n_restarts
        self.seed = int(time.time()) if seed is None else seed
        self.verbose = verbose
        self.loss = loss
        self.rescale_schedule = resc_schedule
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        check_choice("loss", self.loss, ("margin", "ce"))
        check_count("n_queries", self.n_queries)
        check_number("p_init", self.p_init, low=0.0, high=1.0, open_low=True)
        check_shape("images", images.shape, (None,) * 4)
        if self.norm == "L2":
            least = max(ALONG, self._odd_side(images, 0))
            if min(images.shape[2:]) < least:
                sides = " x ".join(map(str, images.shape[2:]))
                raise ValueError(
                    f"images: got {sides}; allowed with the first squares in L2 is at least {least} a side"
                )
        return self._run_all(*self._wanted(images, labels), [self._single_run])

    def _resists(self, images: Tensor, labels: Tensor) -> Tensor:
        return super()._resists(images, labels) != self.targeted

    def _single_run(self, x: Tensor, y: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        """The best images found, and which are at the end."""
        start, propose = (self._stripes, self._square) if self.norm == "Linf" else (self._tiles, self._two_squares)
        best = start(x)
        margin, loss = self._margin_and_loss(best, y)
        for query in range(self.n_queries):
            left = (margin > 0).nonzero()[:, 0]
            if len(left) == 0:
                break
            found = propose(x[left], best[left], query)
            new_margin, new_loss = self._margin_and_loss(found, y[left])
            better = new_loss < loss[left]
            loss[left] = torch.where(better, new_loss, loss[left])
            kept = better | (new_margin <= 0)
            margin[left[kept]], best[left[kept]] = new_margin[kept], found[kept]
        return best, ~self._resists(best, y)

    def _margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """How far the attack is from its end, at 0 or below, and what it lowers, [N] each."""
        logits = self.get_logits(x)
        sign = -1 if self.targeted else 1
        others = logits.scatter(1, y[:, None], -math.inf).max(1).values
        margin = sign * (logits.gather(1, y[:, None])[:, 0] - others)
        return margin, margin.clone() if self.loss == "margin" else -sign * cross_entropy(logits, y, reduction="none")

    def _stripes(self, x: Tensor) -> Tensor:
        return (x + self.eps * _signs(len(x), x.shape[1], 1, x.shape[3]).to(x.device)).clamp(0, 1)

    def _square(self, x: Tensor, best: Tensor, query: int) -> Tensor:
        """One square of a colour changed alike in all images, as far as eps allows."""
        change = torch.zeros_like(x[0])
        window = _window(x, self._side(x, query, 1))
        change[window] = 2.0 * self.eps * _signs(x.shape[1], 1, 1).to(x.device)
        return self._in_cube(x, best + change)

    def _tiles(self, x: Tensor) -> Tensor:
        """Bumps side by side. Where torchattacks fails since the last ones do not fit, they are cut."""
        change = torch.zeros_like(x)
        height, width = x.shape[2:]
        side = height // ALONG
        margin = (height - side * ALONG) // 2
        for top in range(margin, margin + height // side * side, side):
            for left in range(margin, margin + width // side * side, side):
                tile = _bumps(x, side)
                place = change[..., top : top + side, left : left + side]
                place += tile[..., : place.shape[2], : place.shape[3]]
        return self._at_eps(x, change)

    def _two_squares(self, x: Tensor, best: Tensor, query: int) -> Tensor:
        """The change within a square mixed with bumps, of the size that eps and what another square gives up allow."""
        change = best - x
        side = self._odd_side(x, query)
        filled, emptied = _window(x, side), _window(x, side)
        either = torch.zeros_like(x)
        either[filled] = either[emptied] = 1.0
        size = self._sizes(change)
        allowed = (torch.full_like(size, self.eps) ** 2 - size**2).clamp(min=0) / x.shape[1]
        allowed = (allowed + self._sizes(change * either) ** 2).sqrt()
        new = _bumps(x, side) + change[filled] / (TINY + _norms_of_channels(change[filled]))
        new = new / (TINY + _norms_of_channels(new)) * allowed
        change[emptied] = 0.0
        change[filled] = new
        return self._at_eps(x, change)

    def _at_eps(self, x: Tensor, change: Tensor) -> Tensor:
        return (x + change / (self._sizes(change) + TINY) * self.eps).clamp(0, 1)

    def _side(self, x: Tensor, query: int, least: int) -> int:
        """Of a square, in pixels."""
        of_10000 = int(query / self.n_queries * 10000) if self.rescale_schedule else query
        share = self.p_init / 2 ** bisect_left(HALVINGS, of_10000)
        return max(round(math.sqrt(share * math.prod(x.shape[1:]) / x.shape[1])), least)

    def _odd_side(self, x: Tensor, query: int) -> int:
        return self._side(x, query, 3) | 1


def _signs(*shape: int) -> Tensor:
    return (2 * torch.rand(shape) - 1).sign()


def _window(x: Tensor, side: int) -> Window:
    top, left = (int((size - side) * torch.rand(1)) for size in x.shape[2:])
    return ..., slice(top, top + side), slice(left, left + side)


def _bumps(x: Tensor, side: int) -> Tensor:
    """[N, C, side, side]: for each image and channel, by chance up or down, a hill and a hollow beside or below it."""
    pair = torch.cat((_hill(side // 2, side), -_hill(side - side // 2, side)))
    pair /= (pair**2).sum().sqrt()
    if torch.rand(1) > 0.5:
        pair = pair.T.contiguous()
    return pair.to(x.device) * _signs(len(x), x.shape[1], 1, 1).to(x.device)


def _hill(rows: int, columns: int) -> Tensor:
    """[rows, columns] of norm 1: a sum of rectangles about the centre, of weight 1 / k^2 for the kth smallest."""
    height = torch.zeros(rows, columns)
    middle, centre = rows // 2, columns // 2
    for reach in range(max(middle, centre) + 1):
        place = slice(max(middle - reach, 0), middle + reach + 1), slice(max(centre - reach, 0), centre + reach + 1)
        height[place] += 1 / (reach + 1) ** 2
    return height / (height**2).sum().sqrt()


def _norms_of_channels(images: Tensor) -> Tensor:
    return (images**2).sum(dim=(2, 3), keepdim=True).sqrt()

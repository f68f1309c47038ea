"""What the attacks did to a few images, for the report."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from alignfast.evaluation.report import Picture


def examples(
    images: Tensor, titles: list[str], adversarial: Mapping[str, tuple[Tensor, list[str]]], eps: float
) -> Picture:
    """A row of clean images, and for each source a row of adversarial ones and one of their perturbations.

    images: [N, C, H, W] in [0, 1], with N titles. adversarial: by source, the same shape with what the target says.
    Perturbations are shown as 0.5 + (adversarial - image) / (2 eps).
    """
    rows: list[tuple[str, Tensor, list[str]]] = [("clean", images, titles)]
    for source, (adv, said) in adversarial.items():
        rows.append((source, adv, said))
        rows.append(("perturbation", 0.5 + (adv - images) / (2 * eps), [""] * len(images)))
    figure = Figure(figsize=(1.3 * len(images) + 1.2, 1.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (label, pictures, notes) in enumerate(rows):
        for column, picture in enumerate(pictures):
            panel = axes[row][column]
            panel.imshow(_pixels(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.set_title(notes[column], fontsize=8)
        axes[row][0].set_ylabel(label, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Picture(buffer.getvalue(), "Above each image, what a target that the attack has not seen says.")


def _pixels(picture: Tensor) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = picture.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return pixels[..., 0] if len(picture) == 1 else pixels

"""The field's attacks by name: components put together, with torchattacks' arguments and defaults.

`eps` and `alpha` are in units of [0, 1] images. Every preset also takes the keywords of `Options`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import VarianceTuning
from alignfast.attacks.objectives import CrossEntropy
from alignfast.attacks.shaping import Smoothing
from alignfast.attacks.steps import SignStep
from alignfast.attacks.transforms import InputDiversity, Scales
from alignfast.checks import check_choice, check_known

EPS = 8 / 255
ALPHA = 2 / 255
STEPS = 10


class Options(TypedDict, total=False):
    """seed: of all draws. targeted: labels are the classes to reach. max_batch, memory, cuda_graph: see `Attack`."""

    seed: int
    targeted: bool
    max_batch: int | None
    memory: int | None
    cuda_graph: bool


def FGSM(source: nn.Module, eps: float = EPS, **options: Unpack[Options]) -> Attack:
    """One step of size eps (Goodfellow et al., ICLR 2015)."""
    return _attack(source, eps, eps, 1, **options)


def BIM(
    source: nn.Module, eps: float = EPS, alpha: float = ALPHA, steps: int = STEPS, **options: Unpack[Options]
) -> Attack:
    """FGSM iterated from the image itself (Kurakin et al., ICLR 2017 workshop)."""
    return _attack(source, eps, alpha, steps, **options)


def PGD(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """BIM from a random point of the ball (Madry et al., ICLR 2018)."""
    return _attack(source, eps, alpha, steps, random_start=random_start, **options)


def MIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum (Dong et al., CVPR 2018)."""
    return _attack(source, eps, alpha, steps, step=SignStep(decay), **options)


def NIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Nesterov momentum (Lin et al., ICLR 2020)."""
    return _attack(source, eps, alpha, steps, step=SignStep(decay, nesterov=True), **options)


def SINIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    m: int = 5,
    **options: Unpack[Options],
) -> Attack:
    """Nesterov momentum over m scale copies (Lin et al., ICLR 2020)."""
    return _attack(source, eps, alpha, steps, transforms=[Scales(m)], step=SignStep(decay, nesterov=True), **options)


def VMIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    N: int = 5,
    beta: float = 1.5,
    **options: Unpack[Options],
) -> Attack:
    """Momentum with variance tuning over N neighbours (Wang and He, CVPR 2021)."""
    return _attack(source, eps, alpha, steps, estimator=VarianceTuning(N, beta), step=SignStep(decay), **options)


def VNIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    N: int = 5,
    beta: float = 1.5,
    **options: Unpack[Options],
) -> Attack:
    """Nesterov momentum with variance tuning over N neighbours (Wang and He, CVPR 2021)."""
    step = SignStep(decay, nesterov=True)
    return _attack(source, eps, alpha, steps, estimator=VarianceTuning(N, beta), step=step, **options)


def DIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    resize_rate: float = 0.9,
    diversity_prob: float = 0.5,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Attack:
    """Input diversity (Xie et al., CVPR 2019); `decay` 1 gives M-DI2-FGSM."""
    return _attack(
        source,
        eps,
        alpha,
        steps,
        transforms=[InputDiversity(resize_rate, diversity_prob)],
        step=SignStep(decay),
        random_start=random_start,
        **options,
    )


def TIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    kernel_name: Literal["gaussian", "uniform", "linear"] = "gaussian",
    len_kernel: int = 15,
    nsig: float = 3.0,
    resize_rate: float = 0.9,
    diversity_prob: float = 0.5,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Attack:
    """Translation invariance (Dong et al., CVPR 2019) over input diversity, as torchattacks defines it."""
    return _attack(
        source,
        eps,
        alpha,
        steps,
        transforms=[InputDiversity(resize_rate, diversity_prob)],
        shaping=[Smoothing(kernel_name, len_kernel, nsig)],
        step=SignStep(decay),
        random_start=random_start,
        **options,
    )


PRESETS: dict[str, Callable[..., Attack]] = {
    preset.__name__.lower(): preset
    for preset in (FGSM, BIM, PGD, MIFGSM, NIFGSM, SINIFGSM, VMIFGSM, VNIFGSM, DIFGSM, TIFGSM)
}


def create(name: str, source: nn.Module, **parameters: Any) -> Attack:
    """The preset `name` (any case) with `parameters`.

    Raises:
        ValueError: an unknown attack or parameter (with what is allowed), or a value outside its range.
    """
    preset = PRESETS[check_choice("attack", name.lower(), PRESETS)]
    check_known(name, "parameter", parameters, parameters_of(name))
    return preset(source, **parameters)


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters that a preset takes besides its source, with their defaults."""
    given = inspect.signature(PRESETS[name.lower()]).parameters.values()
    own = {p.name: p.default for p in given if p.name != "source" and p.kind is not p.VAR_KEYWORD}
    return {**own, "seed": 0, "targeted": False, "max_batch": None, "memory": None, "cuda_graph": True}


def _attack(
    source: nn.Module,
    eps: float,
    alpha: float,
    steps: int,
    *,
    seed: int = 0,
    targeted: bool = False,
    **components: Any,
) -> Attack:
    return Attack(source, eps, alpha, steps, seed, objective=CrossEntropy(targeted), **components)

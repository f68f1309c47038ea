"""Gradient estimators: which gradient a step follows."""

from __future__ import annotations

from alignfast.attacks.estimators import ahead, base, diverse_paths, inner, members, neighbors, patchout, paths, warps
from alignfast.attacks.estimators.ahead import *
from alignfast.attacks.estimators.base import *
from alignfast.attacks.estimators.diverse_paths import *
from alignfast.attacks.estimators.inner import *
from alignfast.attacks.estimators.members import *
from alignfast.attacks.estimators.neighbors import *
from alignfast.attacks.estimators.patchout import *
from alignfast.attacks.estimators.paths import *
from alignfast.attacks.estimators.warps import *

__all__: list[str] = []
__all__ += ahead.__all__
__all__ += base.__all__
__all__ += diverse_paths.__all__
__all__ += inner.__all__
__all__ += members.__all__
__all__ += neighbors.__all__
__all__ += patchout.__all__
__all__ += paths.__all__
__all__ += warps.__all__

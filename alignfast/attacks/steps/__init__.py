"""Step rules: how the images move along the gradient."""

from __future__ import annotations

from alignfast.attacks.steps import elementwise, sign, starts
from alignfast.attacks.steps.elementwise import *
from alignfast.attacks.steps.sign import *
from alignfast.attacks.steps.starts import *

__all__: list[str] = []
__all__ += elementwise.__all__
__all__ += sign.__all__
__all__ += starts.__all__

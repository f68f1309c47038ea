"""One attack loop, components that combine freely, and the field's attacks as presets over them."""

from alignfast.attacks import estimators, objectives, presets, shaping, steps, transforms, warping
from alignfast.attacks.component import Component, Memory, Position, Start
from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import *
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.objectives import *
from alignfast.attacks.observe import Seen
from alignfast.attacks.presets import *
from alignfast.attacks.shaping import *
from alignfast.attacks.steps import *
from alignfast.attacks.transforms import *
from alignfast.attacks.warping import *

__all__ = ["Attack", "Component", "Gradient", "Look", "Memory", "Position", "Seen", "Start"]
__all__ += estimators.__all__
__all__ += objectives.__all__
__all__ += presets.__all__
__all__ += shaping.__all__
__all__ += steps.__all__
__all__ += transforms.__all__
__all__ += warping.__all__

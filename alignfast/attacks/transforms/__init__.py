"""Input transforms: what the model is shown instead of the images themselves."""

from alignfast.attacks.transforms import blocks, geometry, linear, mixing, operators, spectrum, transform
from alignfast.attacks.transforms.blocks import *
from alignfast.attacks.transforms.geometry import *
from alignfast.attacks.transforms.linear import *
from alignfast.attacks.transforms.mixing import *
from alignfast.attacks.transforms.operators import *
from alignfast.attacks.transforms.spectrum import *
from alignfast.attacks.transforms.transform import *

__all__: list[str] = []
__all__ += blocks.__all__
__all__ += geometry.__all__
__all__ += linear.__all__
__all__ += mixing.__all__
__all__ += operators.__all__
__all__ += spectrum.__all__
__all__ += transform.__all__

"""One attack loop, components that combine freely, and the field's attacks as presets over them."""

from alignfast.attacks import shaping
from alignfast.attacks.component import Component, Memory, Position, Start
from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import ahead as ahead_estimators
from alignfast.attacks.estimators import base as base_estimators
from alignfast.attacks.estimators import diverse_paths as diverse_paths_estimators
from alignfast.attacks.estimators import inner as inner_estimators
from alignfast.attacks.estimators import members as members_estimators
from alignfast.attacks.estimators import neighbors as neighbors_estimators
from alignfast.attacks.estimators import patchout as patchout_estimators
from alignfast.attacks.estimators import paths as paths_estimators
from alignfast.attacks.estimators import warps as warps_estimators
from alignfast.attacks.estimators.ahead import *
from alignfast.attacks.estimators.base import *
from alignfast.attacks.estimators.diverse_paths import *
from alignfast.attacks.estimators.inner import *
from alignfast.attacks.estimators.members import *
from alignfast.attacks.estimators.neighbors import *
from alignfast.attacks.estimators.patchout import *
from alignfast.attacks.estimators.paths import *
from alignfast.attacks.estimators.warps import *
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.objectives import base as base_objectives
from alignfast.attacks.objectives import features as features_objectives
from alignfast.attacks.objectives import logits as logits_objectives
from alignfast.attacks.objectives.base import *
from alignfast.attacks.objectives.features import *
from alignfast.attacks.objectives.logits import *
from alignfast.attacks.observe import Seen
from alignfast.attacks.presets import PRESETS, combine, create, names_of, parameters_of
from alignfast.attacks.presets import ensembles as ensembles_presets
from alignfast.attacks.presets import gradients as gradients_presets
from alignfast.attacks.presets import inputs as inputs_presets
from alignfast.attacks.presets import objectives as objectives_presets
from alignfast.attacks.presets import surrogates as surrogates_presets
from alignfast.attacks.presets.ensembles import *
from alignfast.attacks.presets.gradients import *
from alignfast.attacks.presets.inputs import *
from alignfast.attacks.presets.objectives import *
from alignfast.attacks.presets.surrogates import *
from alignfast.attacks.shaping import *
from alignfast.attacks.steps import elementwise as elementwise_steps
from alignfast.attacks.steps import sign as sign_steps
from alignfast.attacks.steps import starts as starts_steps
from alignfast.attacks.steps.elementwise import *
from alignfast.attacks.steps.sign import *
from alignfast.attacks.steps.starts import *
from alignfast.attacks.transforms import blocks as blocks_transforms
from alignfast.attacks.transforms import geometry as geometry_transforms
from alignfast.attacks.transforms import linear as linear_transforms
from alignfast.attacks.transforms import mixing as mixing_transforms
from alignfast.attacks.transforms import operators as operators_transforms
from alignfast.attacks.transforms import spectrum as spectrum_transforms
from alignfast.attacks.transforms import transform as transform_transforms
from alignfast.attacks.transforms.blocks import *
from alignfast.attacks.transforms.geometry import *
from alignfast.attacks.transforms.linear import *
from alignfast.attacks.transforms.mixing import *
from alignfast.attacks.transforms.operators import *
from alignfast.attacks.transforms.spectrum import *
from alignfast.attacks.transforms.transform import *

__all__ = ["PRESETS", "Attack", "Component", "Gradient", "Look", "Memory", "Position", "Seen", "Start"]
__all__ += ["combine", "create", "names_of", "parameters_of"]
__all__ += ahead_estimators.__all__
__all__ += base_estimators.__all__
__all__ += diverse_paths_estimators.__all__
__all__ += inner_estimators.__all__
__all__ += members_estimators.__all__
__all__ += neighbors_estimators.__all__
__all__ += patchout_estimators.__all__
__all__ += paths_estimators.__all__
__all__ += warps_estimators.__all__
__all__ += base_objectives.__all__
__all__ += features_objectives.__all__
__all__ += logits_objectives.__all__
__all__ += ensembles_presets.__all__
__all__ += gradients_presets.__all__
__all__ += inputs_presets.__all__
__all__ += objectives_presets.__all__
__all__ += surrogates_presets.__all__
__all__ += shaping.__all__
__all__ += elementwise_steps.__all__
__all__ += sign_steps.__all__
__all__ += starts_steps.__all__
__all__ += blocks_transforms.__all__
__all__ += geometry_transforms.__all__
__all__ += linear_transforms.__all__
__all__ += mixing_transforms.__all__
__all__ += operators_transforms.__all__
__all__ += spectrum_transforms.__all__
__all__ += transform_transforms.__all__

"""torchattacks 3.5.1 over this package's engine: `from alignfast.compat import torchattacks`.

Names, arguments, defaults and modes are those of torchattacks, and on the CPU in float32 so are the numbers, to the
last bit and with the same draws from torch's global generator; docs/parity.md has the differences that were measured.

Here are the attacks that follow gradients in the L-inf or the L2 norm, and AutoAttack with FAB and Square in these.
Not here: the other norms; LGV, PGDRS and PGDRSL2; methods of single attacks that compute parts of them, such as
`input_diversity` or `perturb`.

What is different:
- Every module is put back into its own mode, training or evaluation; there, all of a model that was training is,
  also between the attacks of MultiAttack and AutoAttack.
  Batch norms and dropouts keep to `set_model_training_mode` when target labels are chosen by the model, too.
- `save` with save_type "int" rounds to the nearest of 256 levels; there, it cuts off, which takes most images to a
  lower level and undoes part of the attack. Files are written whole or not at all, after the last batch, and read with
  weights_only=True; each package reads the other's.
- Weights of the model get no gradients from PIFGSM and PIFGSMPP.
- Images outside [0, 1], eps or alpha above 1 in the L-inf norm, steps, queries or restarts below 1 and labels that
  are not int64 are refused before the model runs.
- Square in the L2 norm takes sides that leave a part of a tile over, such as 24, where torchattacks fails.
- Images of any number of channels serve, but for PIFGSMPP.
"""

from alignfast.compat.torchattacks import auto, auto_attack, fab, iterative, multi, one_step, square, transferable
from alignfast.compat.torchattacks.attack import Attack
from alignfast.compat.torchattacks.auto import *
from alignfast.compat.torchattacks.auto_attack import *
from alignfast.compat.torchattacks.fab import *
from alignfast.compat.torchattacks.iterative import *
from alignfast.compat.torchattacks.multi import *
from alignfast.compat.torchattacks.one_step import *
from alignfast.compat.torchattacks.square import *
from alignfast.compat.torchattacks.transferable import *

__all__ = ["Attack"]
__all__ += auto.__all__
__all__ += auto_attack.__all__
__all__ += fab.__all__
__all__ += iterative.__all__
__all__ += multi.__all__
__all__ += one_step.__all__
__all__ += square.__all__
__all__ += transferable.__all__

"""Measure how attacks on a CIFAR-10 ResNet-56 transfer to ResNet-20, 32 and 44, in float32 and in bfloat16.

    python examples/cifar10_attacks.py --data DIR --out DIR [--images N] [--attacks NAME ...]

DIR is that of examples/cifar10_alignment.py. Writes attacks.md and matrix.json; what is measured is kept in `out`, and
taken up by a further call. Ensemble attacks have ResNet-56 and ResNet-44 for a source and the other two for targets.
"""

from __future__ import annotations

NUMBERS = {"eps": 2 / 255, "alpha": 0.4 / 255, "steps": 10}
POOL = 64
# By title: the attack and its parameters besides the numbers above.
ATTACKS: dict[str, tuple[str, dict[str, object]]] = {
    "FGSM": ("fgsm", {}),
    "BIM": ("bim", {}),
    "PGD": ("pgd", {}),
    "MI": ("mifgsm", {}),
    "NI": ("nifgsm", {}),
    "DI": ("dim", {}),
    "TI": ("tim", {"kernel_size": 3}),
    "SI": ("sim", {}),
    "VMI": ("vmifgsm", {}),
    "DI + SI": ("dim+sim", {}),
    "DI + SI + VMI": ("dim+sim+vmifgsm", {}),
}

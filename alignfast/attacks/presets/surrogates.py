"""Attacks that differ in the model that they take gradients of.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

__all__: list[str] = []

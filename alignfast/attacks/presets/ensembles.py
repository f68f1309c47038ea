"""Attacks that differ in how they use several models.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

__all__: list[str] = []

"""Versions of what took part in a result, for the files written beside it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("alignfast", "torch", "torchvision", "timm", "numpy", "pillow", "triton")


def package_versions() -> dict[str, str]:
    """Version by name of Python and of each of `PACKAGES`; "absent" where no installed distribution tells one."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"

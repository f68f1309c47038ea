"""`alignfast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alignfast.checks import check_choice
from alignfast.commands.options import DATA_HELP
from alignfast.files import claim_folder


def demo_command(
    out: Annotated[Path, typer.Option(help="A new or empty folder, or that of an earlier demo.")] = Path("demo"),
    preset: Annotated[str, typer.Option(help="digits, or imagenet-lite for real ImageNet classifiers.")] = "digits",
    images: Annotated[str | None, typer.Option(help=f"Photos for imagenet-lite. {DATA_HELP}")] = None,
) -> None:
    """Align, attack and report on data that need no download."""
    from alignfast.demo import digits, imagenet_lite

    check_choice("preset", preset, ("digits", "imagenet-lite"))
    if preset == "digits":
        if images is not None:
            raise ValueError("images: allowed with --preset imagenet-lite only")
        digits.run(claim_folder(out, digits.settings(), resume=True), Console())
    else:
        plan = imagenet_lite.plan(images)
        imagenet_lite.run(plan, claim_folder(out, plan.settings(), resume=True), Console())

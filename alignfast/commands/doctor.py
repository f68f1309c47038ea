"""`alignfast doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """What was built, what is used, and a self-test of every op."""
    from alignfast import doctor

    report = doctor.report()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        table = Table(show_header=False, box=None)
        for section, entries in report.items():
            for name, value in entries.items():
                pairs = value.items() if isinstance(value, dict) else [("", value)]
                for key, item in pairs:
                    shown = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
                    table.add_row(f"{section} {name} {key}".strip(), shown)
        Console(soft_wrap=True).print(table)
    return 0 if all(verdict == "ok" for verdict in report["self_test"].values()) else 1

"""The command line: one line an error, and a code that says what kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from alignfast.bench.run import bench_command
from alignfast.commands.align import align_command
from alignfast.commands.attack import attack_command
from alignfast.commands.demo import demo_command
from alignfast.commands.doctor import doctor_command
from alignfast.commands.evaluate import evaluate_command
from alignfast.commands.geometry import geometry_command
from alignfast.commands.report import report_command
from alignfast.commands.transfer import transfer_command
from alignfast.memory import keep_memory

# Options that take several values after one name, which the parser knows only as a repeated option.
SPREAD = ("--targets", "--models", "--others")
INTERRUPTED = 130
# typer keeps its parser's exceptions to itself; every usage error has this base.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
BAD_INPUT = (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError, ConnectionError)

app = typer.Typer(
    name="alignfast",
    help="Align source classifiers to witnesses, attack them, and measure the transfer to unseen targets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo_command)
app.command("align")(align_command)
app.command("attack")(attack_command)
app.command("evaluate")(evaluate_command)
app.command("transfer")(transfer_command)
app.command("geometry")(geometry_command)
app.command("report")(report_command)


@app.command(
    "reproduce", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def reproduce_command(context: typer.Context) -> None:
    """The paper's authors' own main.py arguments: align, save, and measure errors and transfer by their protocol."""
    from alignfast.compat.reproduce import reproduce

    reproduce(context.args)


app.command("bench")(bench_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """The entry point of `alignfast`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; 0, or 2 after one line on bad input, 1 on another failure, 130 on an interrupt."""
    try:
        with keep_memory():
            result = app(args=spread(arguments), standalone_mode=False)
    except UsageError as error:
        return _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except BAD_INPUT as error:
        return _fail(str(error), 2)
    except (OSError, FloatingPointError) as error:
        return _fail(str(error), 1)
    # The parser turns an interrupt into this code, and says nothing.
    if result == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def spread(arguments: Sequence[str]) -> list[str]:
    """`--targets A B` as `--targets A --targets B`."""
    result: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in SPREAD else ""
        elif option and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result


def _fail(message: str, code: int) -> int:
    print(f"alignfast: {' '.join(message.split())}", file=sys.stderr)
    return code

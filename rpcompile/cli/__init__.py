"""The command `rpcompile`: plan, look at plans, ask what would change, measure, train.

A thin layer: each command reads its arguments, calls the library and prints. torch, OR-Tools and
transformers are imported inside the commands that need them, so that `--help` answers at once.

Exit status: 0 done, 1 a check failed (`verify`, `diff`, `fit`), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpcompile import __version__
from rpcompile.cli import asking, doctor, measuring, planning, reading, simulating, training
from rpcompile.errors import RpcompileError

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: As on the command line; by default those of the process.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where the locale has no `·`, `?` stands for it
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        status = _app()(args=given, prog_name="rpcompile", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        return _refuse(error.format_message(), error, debug)
    except RpcompileError as error:
        return _refuse(str(error), error, debug)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as end:  # typer's way to say that the output's reader, e.g. `head`, has enough
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return _stop_writing()
    except BrokenPipeError:
        return _stop_writing()
    except OSError as error:
        return _refuse(f"{error.filename or 'input or output'}: {error.strerror or error}", error, debug)
    if status == INTERRUPTED:
        print("Interrupted.", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _stop_writing() -> int:
    # What is left in the buffer would fail again when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _refuse(message: str, error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"rpcompile: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _app() -> Any:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Plan and run the fine-tuning of models bigger than your GPUs. Figures are simulated.",
    )
    app.callback()(_options)
    for module in (planning, reading, asking, simulating, measuring, training, doctor):
        for command in module.COMMANDS:
            app.command()(command)
    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rpcompile {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print tracebacks of errors; may stand anywhere.")
    ] = False,
) -> None:
    del version, debug  # `main` and `_version` have read them

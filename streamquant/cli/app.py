"""The command line of streamquant: parse -> call -> exit code.

0 done; 1 a fault of the input or the machine; 2 a wrong command; 3 a variant did not pass a gate; 130 interrupted (run
the same command again). What only some commands need is imported when they run.
"""

import gc
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from streamquant.cli import calibrate, convert, formats, imatrix, publish, readback, validate
from streamquant.cli.console import check_printed, guarded_streams, print_result, say
from streamquant.files.writing import os_errors_told
from streamquant.quant.errors import StreamquantError

app = typer.Typer(
    name="streamquant",
    help="One read of a BF16 Hugging Face checkpoint, every FP8 and GGUF variant of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "formats": formats.formats_command,
    "plan": convert.plan_command,
    "convert": convert.convert_command,
    "inspect": readback.inspect_command,
    "verify": readback.verify_command,
    "recipe": readback.recipe_command,
    "validate": validate.validate_command,
    "imatrix": imatrix.imatrix_command,
    "calibrate": calibrate.calibrate_command,
    "chat-check": validate.chat_check_command,
    "report": validate.report_command,
    "push": publish.push_command,
    "card": publish.card_command,
    "run": publish.run_command,
}
"""The commands, in the order of `--help`."""
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False) -> None:
    if version:
        from streamquant.convert.manifest import versions

        print_result(versions())
        raise typer.Exit


def _terminated(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    gc.freeze()  # what was imported stays, and a vocabulary of 400,000 strings is no garbage either:
    gc.set_threshold(200_000, 20, 100)  # walking them again and again costs a tenth of a second
    with guarded_streams():
        try:
            try:
                with os_errors_told():
                    app()
            except SystemExit as end:  # as typer ends every command
                if not end.code:
                    check_printed()
                raise
        except StreamquantError as error:
            say(f"error: {error}")
            sys.exit(error.exit_code)
        except BrokenPipeError:
            sys.exit(1)


if __name__ == "__main__":
    main()

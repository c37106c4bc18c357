"""The command `atelier`: the list of its verbs, and how errors end it.

Exit codes: 0 done, 1 failed, 2 wrong use, 75 interrupted with a checkpoint written for it (130:
interrupted at once, so that at most an earlier checkpoint can be resumed).
"""

import errno
import importlib
import sys
from collections.abc import Sequence

import typer

from common.errors import AtelierError

VERBS = (
    "new",
    "ls",
    "check",
    "plan",
    "schema",
    "pack",
    "train",
    "resume",
    "watch",
    "convert",
    "sample",
    "score",
    "eval",
    "compare",
    "power",
    "geneval",
    "dpg",
    "report",
    "card",
    "push",
    "serve_reward",
    "doctor",
)
"""Modules of this package, in the order of the help; each has `register(app)`."""


def build_app() -> typer.Typer:
    """Return the command line with all its verbs."""
    app = typer.Typer(
        name="atelier",
        help="Reinforcement learning for native image generation.",
        epilog="Start with: atelier train geneval-scenes",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def atelier(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=_version),
    ) -> None:
        """Reinforcement learning for native image generation."""

    for verb in VERBS:
        importlib.import_module(f"cli.{verb}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; unexpected exceptions keep their traceback."""
    from cli import console

    try:
        build_app()(args=arguments, prog_name="atelier")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except AtelierError as error:
        console.error(str(error))
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        console.error(
            f"the disk is full{where}. What was finished before is intact.\n"
            "Fix: free some space; an interrupted run goes on with `atelier resume RUN`."
        )
        return 1
    return 0


def run() -> None:
    """Entry point of the command `atelier`."""
    sys.exit(main())


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"atelier {version('atelier')}")
        except PackageNotFoundError:
            typer.echo("atelier (not installed, run from its source folder)")
        raise typer.Exit

"""Registration of the verbs, and their options and errors as a command of the shell."""

import logging
import os
import signal
import sys
import warnings
from importlib import metadata
from typing import Annotated

import typer

from ..modeling.errors import ExpertokenError
from . import (
    cache,
    calibrate,
    chat,
    collect,
    evaluate,
    expert,
    export,
    generate,
    keys,
    lm_eval,
    prepare,
    select,
    serve,
    train,
)

app = typer.Typer(
    name="expertoken",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich tables truncate the names of options in narrow terminals
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"expertoken {metadata.version('expertoken')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make many LLMs answer as one: one trained token per expert, learnt from benchmark results."""


app.command()(collect.collect)
app.command()(prepare.prepare)
app.command(context_settings=train.PASS_THROUGH, add_help_option=False)(train.train)
app.command()(evaluate.evaluate)
app.command()(select.select)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(calibrate.calibrate)
app.command()(export.export)
app.command("lm-eval", context_settings=lm_eval.PASS_THROUGH, add_help_option=False)(lm_eval.lm_eval)
app.add_typer(expert.app, name="expert")
app.add_typer(cache.app, name="cache")
app.add_typer(keys.app, name="keys")


def run() -> None:
    """Run the command. An error that the user can fix ends in one line, with exit status 1.

    Raises:
        KeyboardInterrupt: The user interrupted the command.
    """
    # Deprecation warnings between libraries hide the command's own lines, and a user cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("expertoken").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that are not used here
    try:
        app()
    except (ExpertokenError, ImportError) as error:
        sys.exit(f"error: {error}")
    except SystemExit as ended:
        if ended.code == 128 + signal.SIGINT:  # typer turns an interruption into this exit
            raise KeyboardInterrupt from None
        raise

"""`expertoken train`: `python -m expertoken.train` in this process or under a launch configuration."""

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Train expert tokens and write a composite folder."""
    from ..train.entry import main
    from ..train.launch import relaunch

    relaunch(context.args)
    main(context.args)

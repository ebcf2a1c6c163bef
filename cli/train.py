"""`expertoken train`: `python -m expertoken.train` in this process or under a launch configuration."""

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Train expert tokens (arguments as `accelerate launch -m expertoken.train`). --accelerate_config NAME launches."""
    from ..train.entry import main
    from ..train.launch import relaunch

    relaunch(context.args)
    main(context.args)

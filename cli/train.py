"""`expertoken train`: the same as `python -m expertoken.train`, in this process."""

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Train expert tokens (arguments as `accelerate launch -m expertoken.train`)."""
    from ..train.entry import main

    main(context.args)

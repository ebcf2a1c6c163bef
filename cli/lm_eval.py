"""`expertoken lm-eval`: lm-evaluation-harness's own command, with composites as a model."""

import sys

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on a composite.

    The arguments are the same as for its own command, with --model expertoken.
    """
    from ..modeling.errors import require_extra

    require_extra("lm_eval", "collect")
    from lm_eval.__main__ import cli_evaluate

    from ..inference import lm_eval_model  # noqa: F401 - registers the model

    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()

"""The `expertoken` command: one small module per verb, without logic.

The verbs import heavy packages inside their functions, so that `--help` stays fast.
"""


def main() -> None:
    """Run the command. Ctrl-C ends it in one line, also in the second that the imports take."""
    try:
        from .app import run

        run()
    except KeyboardInterrupt:
        from ..inference.loop import end_interrupted

        end_interrupted()

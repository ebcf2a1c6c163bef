"""`expertoken chat`: a conversation with a composite in the terminal."""

from pathlib import Path
from typing import Annotated

import typer


def chat(
    composite: Annotated[Path, typer.Argument(help="Composite folder, or YAML file of a gateway.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="Sampling temperature, 0 is greedy. Default: greedy for local models, an endpoint's own."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
    send_keys: Annotated[
        bool, typer.Option(help="Agree that your API keys are sent to the addresses in the composite.")
    ] = False,
) -> None:
    """Start a chat with a composite. /why shows which candidate answered, /help lists the commands."""
    from transformers.utils import logging as transformers_logging

    from ..inference.factory import open_model
    from ..inference.terminal import TerminalChat

    transformers_logging.disable_progress_bar()
    model = open_model(composite, device=device, trust_remote_code=trust_remote_code, send_keys=send_keys)
    TerminalChat(model, max_new_tokens=max_new_tokens, temperature=temperature).run()

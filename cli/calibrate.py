"""`expertoken calibrate`: a threshold or a cost weight, fitted on the user's own prompts."""

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    composite: Annotated[Path, typer.Argument(help="Composite folder.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Typical prompts of users: a text file with one per line, or a table with `query`."),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of requests that experts answer, 0 to 1. The default answers the rest."),
    ] = None,
    cost: Annotated[
        float | None, typer.Option(min=0, help="Average cost of a request in USD, by the pool's prices.")
    ] = None,
    default: Annotated[
        str | None, typer.Option(help="Candidate that answers below the threshold. Default: self.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the stored calibration.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Set how often experts answer, or what answers cost.

    Finds the threshold (--share) or the cost weight (--cost), and stores it in the composite.

    An earlier calibration is replaced.
    """
    from dataclasses import asdict, replace

    import numpy as np

    from ..data_prep.reading import read_queries
    from ..inference.calibrate import calibrate as run
    from ..inference.composite_model import CompositeModel
    from ..modeling.composite import load_composite, write_calibration
    from ..modeling.errors import ExpertokenError

    if not composite.is_dir():
        raise ExpertokenError(
            f"{composite}: expected a composite folder to store the calibration in, found no such folder"
        )
    if clear:
        write_calibration(composite, None)
        typer.echo(f"{composite}: calibration removed, decisions are as trained")
        return
    if prompts is None:
        raise typer.BadParameter("expected a file of prompts. Only --clear needs none.", param_hint="--prompts")
    if (share is None) == (cost is None):
        raise typer.BadParameter("expected exactly one of the two", param_hint="--share, --cost")
    asked = read_queries(prompts)
    loaded = load_composite(composite, device=device, trust_remote_code=trust_remote_code)
    model = CompositeModel(replace(loaded, folder=None))  # no expert is called, so that no key is sent
    found = run(model, asked, share=share, cost=cost, default=default)
    reached = {key: value for key, value in asdict(found).items() if key != "policy"}
    target = {"share": share} if cost is None else {"cost": cost}
    write_calibration(composite, {"policy": found.policy.document(), "target": target, **reached})
    typer.echo(f"policy: {found.policy.document()}")
    typer.echo(f"on {found.prompts} prompts: {found.share:.1%} to experts instead of the default")
    usd = model.chooser.known_usd(1)
    if unknown := [name for name, price in zip(model.pool.names, usd, strict=True) if np.isnan(price)]:
        typer.echo(f"costs are unknown: no price for {', '.join(unknown)}")
    else:
        typer.echo(f"expected cost of a request: {found.cost:.3g} USD, without the policy {found.before:.3g} USD")

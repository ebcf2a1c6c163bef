"""`expertoken calibrate`: a threshold or a weight of costs from the user's own prompts."""

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    composite: Annotated[Path, typer.Argument(help="Composite folder.")],
    prompts: Annotated[
        Path | None, typer.Option(help="As users ask: a text file, one a line, or a table with `query`.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of requests that experts may answer; the default the rest."),
    ] = None,
    cost: Annotated[float | None, typer.Option(min=0, help="USD a request may cost, by the pool's prices.")] = None,
    default: Annotated[str | None, typer.Option(help="Who answers below the threshold. Default: self.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Forget the calibration: as trained.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Set a composite's threshold (--share) or its weight of costs (--cost), and store it in the composite.

    What was calibrated before is replaced.
    """
    from dataclasses import asdict, replace

    import numpy as np

    from ..data_prep.reading import read_queries
    from ..inference.calibrate import calibrate as run
    from ..inference.composite_model import CompositeModel
    from ..modeling.composite import load_composite, write_calibration
    from ..modeling.errors import ExpertokenError
    from ..modeling.utility import expected_usd

    if not composite.is_dir():
        raise ExpertokenError(f"{composite}: no such folder; expected a composite's, where what is found is stored")
    if clear:
        write_calibration(composite, None)
        typer.echo(f"{composite}: decides as it was trained")
        return
    if prompts is None:
        raise typer.BadParameter("needed, but for --clear", param_hint="--prompts")
    if (share is None) == (cost is None):
        raise typer.BadParameter("give one of the two", param_hint="--share, --cost")
    asked = read_queries(prompts)
    loaded = load_composite(composite, device=device, trust_remote_code=trust_remote_code)
    model = CompositeModel(replace(loaded, folder=None))  # nobody is asked, so that no key is sent
    found = run(model, asked, share=share, cost=cost, default=default)
    reached = {key: value for key, value in asdict(found).items() if key != "policy"}
    target = {"share": share} if cost is None else {"cost": cost}
    write_calibration(composite, {"policy": found.policy.document(), "target": target, **reached})
    typer.echo(f"policy: {found.policy.document()}")
    typer.echo(f"on {found.prompts} prompts: {found.share:.1%} to experts instead of the default")
    usd = expected_usd(model.pool.candidates, 1, model.chooser.usd_per_query)
    if unknown := [name for name, price in zip(model.pool.names, usd, strict=True) if np.isnan(price)]:
        typer.echo(f"costs are unknown: no price of {', '.join(unknown)}")
    else:
        typer.echo(f"{found.cost:.3g} USD a request expected; {found.before:.3g} without")

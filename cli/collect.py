"""`expertoken collect`: benchmark results of a pool's experts, measured by lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer

from ..modeling.cluster import ENGINES, Cluster
from .choice import RayAddress, one_of


def collect(
    pool: Annotated[Path, typer.Argument(help="Pool file (YAML).")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-evaluation-harness: NAME[,NAME].")],
    out: Annotated[Path, typer.Option(help="Folder for the results, the input of `expertoken prepare`.")],
    meta: Annotated[str | None, typer.Option(help="Meta LLM. self and adapters that name no base use it.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own tasks (YAML).")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of questions per task, taken from its beginning. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Number of examples in the prompt. Default: the task's.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option(help="Prompt local models through their chat template, as a composite does.")
    ] = True,
    metric: Annotated[
        str | None, typer.Option(help="Metric that becomes the score. Default: the first known metric of the task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size for local models.")] = 8,
    engine: Annotated[
        str,
        typer.Option(
            **one_of("engine", ENGINES), help="local: pairs of expert and task in turn. ray: pairs on a Ray cluster."
        ),
    ] = "local",
    ray_address: RayAddress = None,
    cpus: Annotated[float, typer.Option(help="ray: CPUs per pair.")] = 1,
    gpus: Annotated[float, typer.Option(help="ray: GPUs per pair with a local model.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Let repositories run their own code.")] = False,
) -> None:
    """Run a pool's experts on lm-evaluation-harness tasks. An interrupted run resumes."""
    from ..data_prep import collect as collecting
    from ..modeling.pool import ExpertPool

    evaluation = collecting.Evaluation(
        include_path=None if include_path is None else str(include_path.absolute()),
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=chat_template,
        metric=metric,
        batch_size=batch_size,
        meta=meta,
        trust_remote_code=trust_remote_code,
    )
    cluster = Cluster(ray_address, cpus, gpus)
    read = ExpertPool.from_yaml(pool)
    files = collecting.collect(read, tasks.split(","), out, evaluation, engine=engine, cluster=cluster)
    typer.echo(f"{len(files)} results in {out}. Next: expertoken prepare {out} --pool {pool} --out supervision/")

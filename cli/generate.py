"""`expertoken generate`: answers for a file of conversations."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..modeling.cluster import ENGINES, Cluster
from ..modeling.source import QUANTIZATIONS
from .choice import RayAddress, one_of


def generate(
    composite: Annotated[Path, typer.Argument(help="Composite folder, or YAML file of a gateway.")],
    source: Annotated[Path, typer.Argument(help="JSONL file to read: `messages`, `prompt` or `query` on each line.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write: the same lines with `answer`, `expert`, `cost`, ...")],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with the pictures that `image` on a line names. Files outside it are refused."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="Sampling temperature, 0 is greedy. Default: greedy for local models, an endpoint's own."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling. Default: random.")] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Maximum number of concurrent requests to endpoints.")] = 16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the answers in --out and answer all lines again.")
    ] = False,
    expert_memory: Annotated[
        float | None,
        typer.Option(min=0.01, help="Memory for all local experts together, in GiB. The meta LLM is not counted."),
    ] = None,
    expert_quantization: Annotated[
        str | None, typer.Option(**one_of("quantization", QUANTIZATIONS), help="Quantization of local experts.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(**one_of("engine", ENGINES), help="local: in this process. ray: in workers on a Ray cluster."),
    ] = "local",
    ray_address: RayAddress = None,
    workers: Annotated[int, typer.Option(min=1, help="ray: number of workers, each with the whole composite.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="ray: CPUs per worker.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="ray: GPUs per worker.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
    send_keys: Annotated[
        bool, typer.Option(help="Agree that your API keys are sent to the addresses in the composite.")
    ] = False,
) -> None:
    """Answer a file of conversations, expert by expert.

    The same command resumes an interrupted run, and retries lines that no candidate could answer.
    """
    from ..inference.batch import generate_file
    from ..inference.factory import open_model
    from ..modeling.backend import Generation

    options: dict[str, Any] = {
        "device": device,
        "trust_remote_code": trust_remote_code,
        "send_keys": send_keys,
        "budget": None if expert_memory is None else int(expert_memory * 2**30),
        "quantization": expert_quantization,
    }
    generation = Generation(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    opened: Any
    if engine == "ray":
        from ..inference.spread import RayWorkers

        opened = RayWorkers(composite, workers, Cluster(ray_address, cpus, gpus), **options)
    else:
        opened = nullcontext(open_model(composite, **options))
    with opened as answering:
        counts = generate_file(
            answering,
            source,
            out,
            generation=generation,
            concurrent=concurrent,
            overwrite=overwrite,
            images=images,
        )
    typer.echo(f"{out}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))

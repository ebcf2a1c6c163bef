"""`expertoken generate`: answers for a file of conversations."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..modeling.cluster import ENGINES, Cluster
from ..modeling.source import QUANTIZATIONS
from .choice import RayAddress, one_of


def generate(
    composite: Annotated[Path, typer.Argument(help="Composite folder, or a gateway's YAML file.")],
    source: Annotated[Path, typer.Argument(help="JSONL: `messages`, `prompt` or `query` on each line.")],
    out: Annotated[Path, typer.Option(help="JSONL: the same lines with `answer`, `expert`, `cost`, ...")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures that `image` names on a line; nothing else is read.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy. Default: greedy here, and as endpoints do.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests to endpoints at a time.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Answer anew what --out holds already.")] = False,
    expert_memory: Annotated[
        float | None, typer.Option(min=0.01, help="GiB that local experts may take together; the meta LLM not counted.")
    ] = None,
    expert_quantization: Annotated[
        str | None, typer.Option(**one_of("quantization", QUANTIZATIONS), help="Quantization of local experts.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(**one_of("engine", ENGINES), help="local: in this process. ray: by workers on a Ray cluster."),
    ] = "local",
    ray_address: RayAddress = None,
    workers: Annotated[int, typer.Option(min=1, help="ray: workers; each holds the whole composite.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="ray: CPUs that a worker asks for.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="ray: GPUs that a worker asks for.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
    send_keys: Annotated[bool, typer.Option(help="Agree to where the composite sends your keys.")] = False,
) -> None:
    """Answer a file of conversations, expert by expert.

    The same command goes on where an interrupted one ended, and asks again what nobody could answer.
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

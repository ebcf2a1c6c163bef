"""`expertoken serve`: a composite as an OpenAI-compatible server with a web page."""

from pathlib import Path
from typing import Annotated

import typer

from ..modeling.source import QUANTIZATIONS
from .choice import one_of


def serve(
    composite: Annotated[
        Path, typer.Argument(help="Composite folder, `owner/name` on the hub, or a gateway's YAML file.")
    ],
    host: Annotated[str, typer.Option(help="Address; off loopback only with API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call it. Default: the name of the folder or file.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens. Default: what the expert's context leaves.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request, in bytes.")] = 16 * 2**20,
    max_messages: Annotated[int, typer.Option(min=1, help="Longest conversation, in messages.")] = 512,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest conversation, in tokens. Default: what the experts can read.")
    ] = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 256,
    rate: Annotated[int | None, typer.Option(min=1, help="Requests a minute of one key (or address).")] = None,
    decision_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a decision; then the default answers.")
    ] = 300.0,
    first_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an endpoint's first piece.")] = 60.0,
    idle_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds between two pieces of an endpoint.")] = 30.0,
    check_interval: Annotated[
        float, typer.Option(min=0, help="Seconds between health checks of replicated addresses; 0 for none.")
    ] = 10.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds before that for which /ready says no.")] = 0.0,
    shutdown: Annotated[int, typer.Option(min=0, help="Seconds that answers may go on when it is stopped.")] = 30,
    expert_memory: Annotated[
        float | None, typer.Option(min=0.01, help="GiB that local experts may take together; the meta LLM not counted.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(help="A local expert that stays in memory; may be repeated.")] = None,
    expert_quantization: Annotated[
        str | None, typer.Option(**one_of("quantization", QUANTIZATIONS), help="Quantization of local experts.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Without keys: a name besides localhost to be asked by; may be repeated.")
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A host whose addresses of pictures experts may be given; none are fetched here. Repeatable."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A page elsewhere that may ask (https://chat.example); may be repeated.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of hashed API keys, as `expertoken keys add` writes it.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(help="JSONL file for what people think of answers, with what they asked.")
    ] = None,
    session_store: Annotated[
        str | None, typer.Option(help="redis://HOST:PORT/N, where several servers remember who answered a chat.")
    ] = None,
    trust_proxy: Annotated[
        bool, typer.Option(help="Believe X-Forwarded-For of a proxy here (others: FORWARDED_ALLOW_IPS).")
    ] = False,
    log_content: Annotated[bool, typer.Option(help="Write questions and answers to the log.")] = False,
    otel: Annotated[bool, typer.Option(help="Trace requests with OpenTelemetry (extra `otel`).")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
    send_keys: Annotated[bool, typer.Option(help="Agree to where the composite sends your keys.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Tell who would answer, where keys go and what is wrong; serve nothing.")
    ] = False,
) -> None:
    """Serve a composite: POST /v1/chat/completions, GET /v1/models, /health, /ready, /metrics, a chat page at /.

    API keys, separated by commas, come from the environment variable EXPERTOKEN_API_KEYS.
    """
    from ..modeling.errors import require_extra

    require_extra("fastapi", "serve")
    from ..inference.factory import open_model
    from ..inference.server import Settings
    from ..inference.server.keys import keys_from_environment
    from ..inference.server.serve import check_free, run
    from ..modeling.backend import Timeouts

    settings = Settings(
        name=name or composite.resolve().name.removesuffix(".yaml").removesuffix(".yml"),
        host=host,
        api_keys=keys_from_environment(),
        key_file=keys,
        max_body=max_body,
        max_messages=max_messages,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_concurrent=max_concurrent,
        rate=rate,
        log_content=log_content,
        image_hosts=tuple(host.lower() for host in image_host or ()),
        hosts=tuple(name.lower() for name in allow_host or ()),
        origins=tuple(cors_origin or ()),
        session_store=session_store,
        check_interval=check_interval,
        feedback=feedback,
    )
    if check:
        _check(composite, keys)
        return
    check_free(host, port)  # before a model is loaded for nothing
    timeouts = Timeouts(decision=decision_timeout, first=first_timeout, idle=idle_timeout)
    model = open_model(
        composite,
        device=device,
        trust_remote_code=trust_remote_code,
        send_keys=send_keys,
        timeouts=timeouts,
        budget=None if expert_memory is None else int(expert_memory * 2**30),
        pinned=pin or (),
        quantization=expert_quantization,
    )
    run(model, settings, port=port, drain=drain, shutdown=shutdown, trust_proxy=trust_proxy, otel=otel)


def _check(composite: Path, keys: Path | None) -> None:
    """Print what is known of what would be served; leave with 1 where something is wrong."""
    from rich.table import Table

    from ..inference.check import check
    from ..inference.server.keys import read_keys
    from .tables import wide_console

    rows, wrong = check(composite)
    table = Table("candidate", "backend", "where", "key from", "USD in / out", "may answer", "wrong")
    for row in rows:
        answers = "yes" if row.may_answer else "no"
        table.add_row(row.name, row.kind, row.where, row.key, row.price, answers, row.wrong or "")
    console = wide_console()
    console.print(table)
    for client in read_keys(keys) if keys is not None else ():
        unknown = set(client.experts or ()) - {row.name for row in rows}
        may = "all" if client.experts is None else ", ".join(client.experts)
        console.print(f"key of {client.name}: {may}")
        wrong += [f"the key of {client.name} names {name!r}, which is no candidate" for name in sorted(unknown)]
    for told in wrong:
        console.print(f"wrong: {told}", markup=False)
    if wrong or any(row.wrong for row in rows if row.may_answer):
        raise typer.Exit(1)

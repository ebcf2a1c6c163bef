"""`expertoken serve`: a composite as an OpenAI-compatible server with a web page."""

from pathlib import Path
from typing import Annotated

import typer

from ..modeling.source import QUANTIZATIONS
from .choice import one_of


def serve(
    composite: Annotated[
        Path, typer.Argument(help="Composite folder, `owner/name` on the hub, or YAML file of a gateway.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to bind to. An address other than loopback needs API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients. Default: the name of the folder or file.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum length of an answer, in tokens. Default: the rest of the expert's context."),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum size of a request, in bytes.")] = 16 * 2**20,
    max_messages: Annotated[int, typer.Option(min=1, help="Maximum length of a conversation, in messages.")] = 512,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum length of a conversation, in tokens. Default: the experts' own limits."),
    ] = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Maximum number of concurrent requests.")] = 256,
    rate: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of requests per minute for one key (or address). Default: no limit."),
    ] = None,
    decision_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a decision. After that the policy's default answers.")
    ] = 300.0,
    first_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until the first chunk of an endpoint.")] = 60.0,
    idle_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds between two chunks of an endpoint.")] = 30.0,
    check_interval: Annotated[
        float, typer.Option(min=0, help="Seconds between health checks of replicated addresses. 0: none.")
    ] = 10.0,
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds to report 'not ready' on /ready after SIGTERM before refusing new requests, so that a load "
            "balancer can drain traffic.",
        ),
    ] = 0.0,
    shutdown: Annotated[
        int, typer.Option(min=0, help="Seconds for in-flight requests to finish after new ones are refused.")
    ] = 30,
    expert_memory: Annotated[
        float | None,
        typer.Option(min=0.01, help="Memory for all local experts together, in GiB. The meta LLM is not counted."),
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="Local expert that is never evicted from memory. Repeatable.")
    ] = None,
    expert_quantization: Annotated[
        str | None, typer.Option(**one_of("quantization", QUANTIZATIONS), help="Quantization of local experts.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Without API keys: another name of this server. Other machines may then use it. Repeatable."),
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(help="Host whose picture URLs are passed on to experts. The server fetches none. Repeatable."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of another web page that may send requests (https://chat.example). Repeatable."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File with hashed API keys, written by `expertoken keys add`.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(help="JSONL file for users' judgements of answers. It contains their questions.")
    ] = None,
    session_store: Annotated[
        str | None,
        typer.Option(
            help="Session store that several servers share, redis://HOST:PORT/N. Default: this process's memory."
        ),
    ] = None,
    trust_proxy: Annotated[
        bool, typer.Option(help="Trust X-Forwarded-For from a proxy on this machine (others: FORWARDED_ALLOW_IPS).")
    ] = False,
    log_content: Annotated[bool, typer.Option(help="Write questions and answers to the log.")] = False,
    ext_proc: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the external processor for Envoy, which returns the expert for each request (extra `envoy`, "
            "Python 3.11 or newer). Clients need API keys. Default: no processor.",
        ),
    ] = None,
    otel: Annotated[bool, typer.Option(help="Trace requests with OpenTelemetry (extra `otel`).")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
    send_keys: Annotated[
        bool, typer.Option(help="Agree that your API keys are sent to the addresses in the composite.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Report candidates that may answer, addresses that get keys, and problems. Nothing is served.",
        ),
    ] = False,
) -> None:
    """Serve a composite: HTTP APIs and a chat page.

    Paths: POST /v1/chat/completions, /v1/responses, /v1/messages and /v1/route. GET /v1/models, /health, /ready,
    /metrics, and the chat page at /.

    API keys, separated by commas, are read from the environment variable EXPERTOKEN_API_KEYS.
    """
    from ..inference.signals import delay_reloads
    from ..modeling.errors import require_extra

    delay_reloads()  # before the imports that take seconds
    require_extra("fastapi", "serve")
    if ext_proc is not None:
        require_extra("envoy_data_plane", "envoy")
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
        ext_proc=ext_proc,
    )
    if check:
        _check(composite, keys)
        return
    if ext_proc is not None:
        check_free(host, ext_proc)
    check_free(host, port)  # fails before a model is loaded
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
    """Print the candidates, the clients' keys and all problems. Exit with status 1 if there is a problem."""
    from rich.table import Table

    from ..inference.check import check
    from ..inference.server.keys import read_keys
    from .tables import wide_console

    rows, wrong = check(composite)
    table = Table("candidate", "backend", "where", "key from", "USD in / out", "may answer", "problem")
    for row in rows:
        answers = "yes" if row.may_answer else "no"
        table.add_row(row.name, row.kind, row.where, row.key, row.price, answers, row.wrong or "")
    console = wide_console()
    console.print(table)
    for client in read_keys(keys) if keys is not None else ():
        unknown = set(client.experts or ()) - {row.name for row in rows}
        may = "all" if client.experts is None else ", ".join(client.experts)
        console.print(f"key of {client.name}: {may}")
        wrong += [f"the key of {client.name} names {name!r}, which is not a candidate" for name in sorted(unknown)]
    for told in wrong:
        console.print(f"problem: {told}", markup=False)
    if wrong or any(row.wrong for row in rows if row.may_answer):
        raise typer.Exit(1)

"""A mock expert without a model: an OpenAI-compatible process that streams words, with latency and faults on demand.

The command `python -m expertoken.tests.inference.mock_expert --port 0` prints its port. The option `--fault` sets a
fault for all requests. A text such as `do: hang` in the last message sets one for this request.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

FAULTS = ("refuse", "busy", "hang", "garbage", "html", "empty", "cut", "stall", "die", "toolong", "odd", "unended",
          "hollow", "huge", "redirect", "error", "abort")  # fmt: skip


def chunk(delta: dict, finish: str | None = None, usage: dict | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    body = {"id": "mock", "object": "chat.completion.chunk", "created": 1, "model": "mock", "choices": choices}
    return f"data: {json.dumps(body | ({'usage': usage} if usage else {}))}\n\n".encode()


def _garbage(*lines: bytes) -> Response:
    return StreamingResponse(iter(lines), media_type="text/event-stream")


_AT_ONCE = {
    "refuse": lambda: JSONResponse({"error": {"message": "no"}}, 500),
    "busy": lambda: JSONResponse({"error": {"message": "no"}}, 429),
    "toolong": lambda: JSONResponse({"error": {"message": "no"}}, 400),
    "html": lambda: PlainTextResponse("<html>proxy error</html>", 200, media_type="text/html"),
    "garbage": lambda: _garbage(b"data: {not json}\n\n"),
    "odd": lambda: _garbage(chunk({"tool_calls": "none"})),
    "huge": lambda: _garbage(chunk({"content": "x" * 5_000_000}), chunk({}, "stop")),
    "redirect": lambda: Response(status_code=307, headers={"location": "/elsewhere"}),
    "error": lambda: _garbage(chunk({"role": "assistant"}), chunk({}, "error")),
    "abort": lambda: _garbage(chunk({"role": "assistant"}), chunk({}, "abort")),
}


def create(  # noqa: C901
    name: str, words: int, first: float, between: float, spread: float, fault: str | None
) -> Starlette:
    """Create the application. It streams `words` words, the first after `first` seconds, each other after `between`.

    An answer is slower or faster by up to the share `spread`.
    """

    answering: list = []

    async def open_answers(_: Request) -> Response:
        return PlainTextResponse(str(len(answering)))

    async def answer(request: Request) -> Response:
        body = await request.json()
        asked = body["messages"]
        begun = asked[-1]["content"] if asked[-1]["role"] == "assistant" else ""
        text = next(m["content"] for m in reversed(asked) if m["role"] == "user")
        text = text if isinstance(text, str) else " ".join(part.get("text", "") for part in text)
        wrong = fault or next((kind for kind in FAULTS if f"{name} do: {kind}" in text), None)
        if wrong == "hang":
            await asyncio.sleep(3600)
        if wrong in _AT_ONCE:
            return _AT_ONCE[wrong]()

        async def events():
            done = len(begun.split())
            count = min(words, body.get("max_tokens") or words)
            pace = random.uniform(1 - spread, 1 + spread)
            while wrong == "hollow":
                yield chunk({"content": ""})
                await asyncio.sleep(0.01)
            await asyncio.sleep(pace * first)
            for number in range(done, 0 if wrong == "empty" else count):
                if wrong in ("cut", "stall", "die") and number == done + 2:
                    if wrong == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if wrong == "stall":
                        await asyncio.sleep(3600)
                    return
                word = f"{' ' if number else ''}{name}{number}"
                yield chunk({"content": word} if number > done else {"role": "assistant", "content": word})
                await asyncio.sleep(pace * between)
            if wrong == "unended":
                yield chunk({}, "")
                return
            usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
            yield chunk({}, "stop", usage)
            yield b"data: [DONE]\n\n"

        async def counted():
            answering.append(body)
            try:
                async for event in events():
                    yield event
            finally:
                answering.remove(body)

        return StreamingResponse(counted(), media_type="text/event-stream")

    return Starlette(
        routes=[Route("/v1/chat/completions", answer, methods=["POST"]), Route("/open", open_answers, methods=["GET"])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="word")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--words", type=int, default=5)
    parser.add_argument("--first", type=float, default=0.0)
    parser.add_argument("--between", type=float, default=0.0)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--fault", choices=FAULTS)
    options = parser.parse_args()
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", options.port))
    listening.listen(1024)
    print(listening.getsockname()[1], flush=True)  # noqa: T201 - the parent process reads the port
    app = create(options.name, options.words, options.first, options.between, options.spread, options.fault)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    main()

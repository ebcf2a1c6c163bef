"""Real endpoints' responses, sent by a test server: each is read, or is one clear failure."""

import asyncio
import gzip
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from expertoken.inference.backends.endpoint import EndpointBackend
from expertoken.inference.gateway import GatewayModel
from expertoken.modeling.backend import Generation, Timeouts
from expertoken.modeling.errors import ExpertFailedError, NoAnswerError, RequestRefusedError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

ASKED = [{"role": "user", "content": "Where is the Louvre?"}]


def event(delta, finish=None, **more):
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'choices': choices} | more)}\n\n"


END = event({}, "stop")
DONE = "data: [DONE]\n\n"
PARIS = event({"content": "Paris "}) + event({"content": "it is."})


class Server:
    """A server that records its requests and answers by `answer(body)`: status, headers, bytes or an iterable."""

    def __init__(self, answer):
        self.seen = seen = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                seen.append((body, dict(self.headers)))
                status, headers, content = answer(body)
                self.send_response(status)
                self.send_header("connection", "close")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for part in [content] if isinstance(content, bytes) else content:
                        self.wfile.write(part)
                except OSError:  # the client has closed the connection
                    pass
                self.close_connection = True

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def streaming(text):
    return lambda body: (200, {"content-type": "text/event-stream"}, text.encode())


def ask(server, generation=None, **more):
    backend = EndpointBackend(Expert("e", "openai", "m", base_url=server.url, **more), Timeouts(retries=0))

    async def collect():
        return [piece async for piece in backend.stream(ASKED, generation or Generation())]

    return asyncio.run(collect())


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    "stream",
    [
        PARIS + DONE,  # no finish reason
        "retry: 3000\n\n" + PARIS + END + DONE,
        event({"content": ""}) + "event: ping\n\n" + PARIS + END + DONE,
        event({"content": ""}) + "data:\n\n" + PARIS + END + DONE,
        ": a comment\n\n" + PARIS + END,
        event({"content": [{"type": "text", "text": "Paris "}]}) + event({"content": "it is."}) + END + DONE,
        PARIS.replace("\n\n", "\r\n\r\n") + END,
    ],
)
def test_what_servers_put_around_an_answer_is_not_the_answer(stream):
    with Server(streaming(stream)) as server:
        assert text_of(ask(server)) == "Paris it is."


def test_thoughts_keep_the_name_under_which_they_come_and_are_no_text():
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 4},
             "prompt_tokens_details": {"cached_tokens": 8, "odd": "x"}}  # fmt: skip
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]
    for delta, name in (
        ({"content": None, "reasoning_content": "Hm."}, "reasoning_content"),
        ({"reasoning": "Hm."}, "reasoning"),
        ({"content": parts}, "reasoning_content"),
    ):
        with Server(streaming(event(delta) + PARIS + event({}, "stop", usage=usage) + DONE)) as server:
            pieces = ask(server)
        assert pieces[0].thought == {name: "Hm."}
        assert text_of(pieces) == "Paris it is."
        assert pieces[-1].usage == (9, 7)
        assert pieces[-1].details == {
            "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 4}
        }  # fmt: skip


def test_a_call_in_the_old_form_is_a_call():
    old = event({"function_call": {"name": "look", "arguments": '{"a"'}}) + event(
        {"function_call": {"arguments": ": 1}"}}
    )
    with Server(streaming(old + event({}, "function_call"))) as server:
        pieces = ask(server)
    calls = [call for piece in pieces for call in piece.tool_calls or ()]
    assert [call["function"].get("name") for call in calls] == ["look", None]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1}'


@pytest.mark.parametrize("finish", ["error", "abort"])
def test_an_answer_that_ends_in_an_error_is_none(finish):
    fails = pytest.raises(ExpertFailedError, match=f"ended its answer with '{finish}'")
    with Server(streaming(event({"content": "Pa"}) + event({}, finish) + DONE)) as server, fails:
        ask(server)
    fails = pytest.raises(ExpertFailedError, match="reported an error")
    with Server(streaming(event({}) + 'data: {"error": {"message": "boom"}}\n\n')) as server, fails:
        ask(server)


@pytest.mark.parametrize(
    ("parameter", "error"),
    [
        ("max_tokens", {"message": "Unsupported parameter: 'max_tokens' is not supported", "param": "max_tokens"}),
        ("stream_options", {"message": "Unknown parameter: 'stream_options'.", "param": None}),
    ],
)
def test_a_parameter_of_ours_that_is_refused_is_left_out_and_that_is_remembered(parameter, error):
    def answer(body):
        if parameter in body:
            return 400, {"content-type": "application/json"}, json.dumps({"error": error}).encode()
        return streaming(PARIS + END)(body)

    with Server(answer) as server:
        backend = EndpointBackend(Expert("e", "openai", "m", base_url=server.url), Timeouts(retries=0))

        async def twice():
            first = [piece async for piece in backend.stream(ASKED, Generation(max_new_tokens=9))]
            return first, [piece async for piece in backend.stream(ASKED, Generation(max_new_tokens=9))]

        assert list(map(text_of, asyncio.run(twice()))) == ["Paris it is."] * 2
    assert [parameter in body for body, _ in server.seen] == [True, False, False]
    if parameter == "max_tokens":
        assert server.seen[-1][0]["max_completion_tokens"] == 9


def test_what_the_user_asked_for_is_not_left_out():
    error = {"error": {"message": "Unsupported value: 'temperature'", "param": "temperature"}}
    with Server(lambda body: (400, {}, json.dumps(error).encode())) as server, pytest.raises(RequestRefusedError):
        ask(server, Generation(temperature=0.5))
    assert len(server.seen) == 1


def test_redirects_are_not_followed():
    fails = pytest.raises(ExpertFailedError)
    with Server(streaming(PARIS + END)) as other:
        with Server(lambda body: (307, {"location": other.url}, b"")) as server, fails:
            ask(server)
        assert not other.seen


def test_what_this_machine_says_of_openai_goes_to_nobody(monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "of-this-machine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: of-this-machine\nAuthorization: Bearer of-this-machine")
    with Server(streaming(PARIS + END)) as server:
        ask(server)
    assert "of-this-machine" not in str(server.seen)
    headers = {name.lower(): value for name, value in server.seen[0][1].items()}
    assert headers["accept-encoding"] == "identity"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    backend = EndpointBackend(Expert("e", "openai", "m", api_key_env="OPENAI_API_KEY"))

    async def address():
        return str(backend.client().base_url)

    assert asyncio.run(address()) == "https://api.openai.com/v1/"


def test_an_answer_is_cut_at_its_limit_even_within_a_chunk():
    with Server(streaming(event({"content": "x" * 100_000}) + PARIS + END)) as server:
        pieces = ask(server, Generation(max_new_tokens=10))
    assert len(text_of(pieces)) <= 320
    assert pieces[-1].finish == "length"


def endless():
    while True:
        yield b"x" * 65_536


def test_a_chunk_without_an_end_is_not_read_into_memory():
    fails = pytest.raises(ExpertFailedError, match="expected chunks of at most")
    with Server(lambda body: (200, {"content-type": "text/event-stream"}, endless())) as server, fails:
        ask(server)


@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_error_is_not_read_whole(packed):
    def answer(body):
        if packed:
            return 500, {"content-encoding": "gzip"}, gzip.compress(b"x" * 50_000_000)
        return 500, {}, endless()

    with Server(answer) as server, pytest.raises(ExpertFailedError, match="answered 500"):
        ask(server)


def first_token(tokens):
    content = [{"token": "x", "bytes": [], "logprob": -1.0, "top_logprobs": tokens}]
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": ""},
                         "logprobs": {"content": content}}]}  # fmt: skip
    return lambda asked: (200, {"content-type": "application/json"}, json.dumps(body).encode())


def decided(server, ids):
    pool = ExpertPool([Expert("law", "openai", "m", base_url=server.url), Expert("self", "self")])
    gateway = GatewayModel(Expert("meta", "openai", "m", base_url=server.url), pool, token_ids=ids)
    return gateway.route("Who may sue?")


WITHOUT_TEXT = [
    {"id": 49153, "token": "", "bytes": [], "logprob": -0.05},
    {"id": 504, "token": "The", "bytes": [84, 104, 101], "logprob": -3.2},
]


def test_log_probabilities_without_a_tokens_text_are_read_by_its_id():
    with Server(first_token(WITHOUT_TEXT)) as server:
        assert decided(server, {"law": 49153}).expert == "law"


def test_log_probabilities_that_can_not_be_read_are_no_decision_for_self():
    for tokens, ids in (
        (WITHOUT_TEXT, None),
        ([{"token": "", "bytes": [], "logprob": -0.05}], {"law": 49153}),
        ([{"token": "The", "bytes": [], "logprob": 7.0}], {"law": 49153}),
    ):
        fails = pytest.raises(NoAnswerError, match="the meta LLM is unavailable: its endpoint")
        with Server(first_token(tokens)) as server, fails:
            decided(server, ids)
    with Server(first_token([{"id": 504, "token": "The", "bytes": [], "logprob": -0.1}])) as server:
        assert decided(server, {"law": 49153}).expert == "self"


def test_pieces_without_anything_in_them_are_no_sign_of_life():
    def empties(first):
        yield first.encode()
        while True:
            time.sleep(0.02)
            yield event({"content": ""}).encode()

    for first, told in ((event({"role": "assistant"}), "sent nothing within"), (PARIS, "sent nothing more for")):
        with Server(lambda body, first=first: (200, {"content-type": "text/event-stream"}, empties(first))) as server:
            backend = EndpointBackend(
                Expert("e", "openai", "m", base_url=server.url), Timeouts(first=0.5, idle=0.5, retries=0)
            )

            async def collect(backend=backend):
                return [piece async for piece in backend.stream(ASKED, Generation())]

            with pytest.raises(ExpertFailedError, match=told):
                asyncio.run(collect())


def test_who_reads_slowly_is_not_held_against_the_endpoint():
    with Server(streaming(PARIS + END + DONE)) as server:
        backend = EndpointBackend(Expert("e", "openai", "m", base_url=server.url), Timeouts(idle=0.2, retries=0))

        async def collect():
            pieces = []
            async for piece in backend.stream(ASKED, Generation()):
                pieces.append(piece)
                await asyncio.sleep(0.4)
            return pieces

        assert text_of(asyncio.run(collect())) == "Paris it is."


@pytest.mark.parametrize(
    "told",
    [
        {"message": "'max_tokens' or 'max_completion_tokens' is too large: 900. This model's maximum context length is "
         "512 tokens and your request has 39 input tokens.", "type": "BadRequestError", "code": 400},
        {"message": "max_tokens is too large: 900. This model supports at most 500 completion tokens.",
         "param": "max_tokens", "code": "invalid_value"},
        {"message": "This model's maximum context length is 512 tokens.", "code": "context_length_exceeded"},
    ],
)  # fmt: skip
def test_an_answer_is_as_long_as_the_endpoints_context_leaves(told):
    def answer(body):
        if body.get("max_tokens", 0) > 500:
            return 400, {"content-type": "application/json"}, json.dumps({"error": told}).encode()
        return streaming(PARIS + END + DONE)(body)

    with Server(answer) as server:
        backend = EndpointBackend(Expert("e", "openai", "m", base_url=server.url), Timeouts(retries=0))

        async def collect(count):
            return text_of([piece async for piece in backend.stream(ASKED, Generation(count))])

        assert [asyncio.run(collect(count)) for count in (900, 100, None)] == ["Paris it is."] * 3
        # A request that is too long does not mark the parameter as unsupported.
        assert [body.get("max_tokens") for body, _ in server.seen] == [900, None, 100, None]


def test_pieces_without_anything_in_them_use_up_nothing_of_an_answers_length():
    """Otherwise enough empty pieces would end the answer at its limit, without text."""
    with Server(streaming(1000 * event({"content": ""}) + PARIS + END + DONE)) as server:
        assert text_of(ask(server, Generation(8))) == "Paris it is."

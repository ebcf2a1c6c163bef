import asyncio
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

from expertoken.inference import decider
from expertoken.inference.backends.local import LocalBackend
from expertoken.inference.backends.models import LocalModels
from expertoken.inference.breaker import Breaker
from expertoken.inference.composite_model import CompositeModel
from expertoken.inference.loop import BackgroundLoop
from expertoken.inference.observer import Observer
from expertoken.modeling.backend import Backend, Generation, Opening, Piece
from expertoken.modeling.chat import Query, as_messages
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.errors import ExpertFailedError, ExpertokenError, NoAnswerError
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.policy import Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source
from expertoken.tests.inference.conftest import composite_of
from expertoken.tests.tiny import tiny_folder

CHAT = [
    {"role": "user", "content": "Compute 12 plus 30."},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And the capital of France?"},
]


PROMPTS = ("hello", "hello there", "Compute 12 plus 30.", CHAT)


def answer_of(backend, messages, generation, begun=""):
    return "".join(piece.text for piece in BackgroundLoop.iterate(backend.stream(messages, generation, begun=begun)))


def lean_towards(meta, winner, count=2, with_self=True):
    """Set rows by which one candidate wins clearly on the prompts used here. The others rank in the pool's order."""
    hidden, _ = meta.states([meta.encode(prompt) for prompt in PROMPTS])
    one = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1)).solution[:, 0]
    lifts = [-20 if winner is None else 20 if index == winner else 10 - index for index in range(count)]
    meta.rows = torch.stack([lift * one for lift in [*lifts, *([0] * with_self)]])


@pytest.fixture
def make(meta, pool):
    def build(winner=None, experts=None):
        chosen = experts or pool
        lean_towards(meta, winner, len(chosen), chosen.has_self)
        return CompositeModel(Composite(meta, chosen, Manifest(describe_base(meta), [e.name for e in chosen])))

    return build


def test_the_chosen_expert_answers_and_pieces_add_up(make, meta, base_folder):
    composite = make(winner=0)
    stream = composite.stream("Compute 12 plus 30.", max_new_tokens=8)
    assert stream.dispatch.expert == "math"
    pieces = list(stream)
    reply = composite.chat("Compute 12 plus 30.", max_new_tokens=8)
    assert reply.text == "".join(pieces)
    assert reply.expert == "math"
    alone = LocalBackend(LocalModels(), Source(str(base_folder)))
    assert reply.text == answer_of(alone, [{"role": "user", "content": "Compute 12 plus 30."}], Generation(8))


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("tokens", [1, 2, 12])
def test_selfs_answer_from_the_decisions_cache_is_the_plain_models_answer(tmp_path, pool, architecture, tokens):
    base = tiny_folder(tmp_path / "base", architecture)
    meta = MetaLLM.from_pretrained(Source(str(base)), 3, device="cpu")
    lean_towards(meta, None)
    composite = CompositeModel(Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"])))
    reply = composite.chat(CHAT, max_new_tokens=tokens)
    assert reply.expert == "self"
    plain = composite.backend("self")
    assert reply.text == answer_of(plain, CHAT, Generation(tokens))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_selfs_first_token_heeds_the_models_own_generation_settings(make, temperature):
    """The repetition penalty excludes every token of the prompt, and top-k is one."""
    composite = make(winner=None)
    for model in (composite.meta.model, composite.meta.plain):
        model.generation_config.repetition_penalty = 1e6
        model.generation_config.top_k = 1
    options = Generation(8, temperature=temperature, seed=1)
    plain = answer_of(composite.backend("self"), CHAT, options)
    assert composite.chat(CHAT, max_new_tokens=8, temperature=temperature, seed=1).text == plain


def test_where_lora_was_trained_self_answers_without_it(make, base_folder, tmp_path):
    composite = make(winner=None)
    adapter(base_folder, tmp_path / "lora", seed=1)
    composite.meta.load_adapter(tmp_path / "lora")
    lean_towards(composite.meta, None)
    reply = composite.chat(CHAT, max_new_tokens=8)
    assert reply.expert == "self"
    plain = LocalBackend(LocalModels(), Source(str(base_folder)))
    assert reply.text == answer_of(plain, CHAT, Generation(8))


def test_detection_is_by_token_id_never_by_text(make):
    """An expert token spelt out in the meta LLM's answer is text and hands nothing over."""
    composite = make(winner=None)
    spelled = composite.meta.tokenizer("<|expert:math|>", add_special_tokens=False).input_ids
    assert max(spelled) < composite.meta.vocab_size

    def generate(input_ids, streamer, **_):
        streamer.put(input_ids)
        streamer.put(torch.tensor(spelled))
        streamer.end()

    composite.meta.plain.generate = generate
    reply = composite.chat("hello", max_new_tokens=30)
    assert reply.expert == "self"
    assert reply.text.endswith("<|expert:math|>")


def test_self_needs_no_second_prefill(make, meta, monkeypatch):
    composite = make(winner=None)
    lengths = []
    for model in (meta.model, meta.plain):
        model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    composite.chat(CHAT, max_new_tokens=6)
    assert lengths[0] == len(meta.encode(CHAT))
    assert lengths[1:]
    assert set(lengths[1:]) == {1}


def test_the_decision_reads_the_whole_chat(make):
    composite = make(winner=0)
    composite.meta.rows = torch.randn(3, 32) * 2
    short, whole = composite.route([CHAT[-1:], CHAT])
    assert short.probabilities != whole.probabilities


def test_alone_or_in_a_batch_the_decision_is_the_same(make):
    composite = make(winner=0)
    composite.meta.rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "Compute 12 plus 30.", "What is the capital of France? " * 6]
    for alone, batched in zip(map(composite.route, prompts), composite.route(prompts), strict=True):
        assert alone.expert == batched.expert
        assert alone.probabilities == pytest.approx(batched.probabilities, abs=1e-5)


def test_without_self_probabilities_are_over_the_experts(make, base_folder):
    experts = ExpertPool([Expert("math", model=str(base_folder)), Expert("law", model=str(base_folder))])
    dispatch = make(winner=1, experts=experts).route("hello")
    assert dispatch.expert == "law"
    assert sum(dispatch.probabilities.values()) == pytest.approx(1)


def test_a_failing_expert_costs_a_fallback_and_not_the_turn(make, base_folder, tmp_path):
    broken = ExpertPool(
        [
            Expert(
                "math", backend="openai", model="m", base_url="http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY_HERE"
            ),
            Expert("law", model=str(tmp_path / "gone")),
            Expert("self", backend="self"),
        ]
    )
    reply = make(winner=0, experts=broken).chat("hello", max_new_tokens=3)
    assert reply.expert == "self"
    assert "NO_SUCH_KEY_HERE" in reply.failures["math"]
    assert "got a path that does not exist" in reply.failures["law"]


def test_when_nobody_can_answer_the_reasons_are_told(make, tmp_path):
    nobody = ExpertPool([Expert("a", model=str(tmp_path / "x")), Expert("b", model=str(tmp_path / "y"))])
    with pytest.raises(ExpertokenError, match="no expert could answer .*a: .*b: "):
        make(winner=0, experts=nobody).chat("hello")


def test_sampling_is_repeatable_with_a_seed(make):
    composite = make(winner=None)
    options = {"max_new_tokens": 10, "temperature": 1.5, "seed": 7}
    assert composite.chat("hello", **options).text == composite.chat("hello", **options).text


def test_an_unknown_generation_argument_is_refused(make):
    with pytest.raises(ExpertokenError, match="max_tokens"):
        make(winner=0).chat("hello", max_tokens=3)
    with pytest.raises(ExpertokenError, match="'max_tokens', did you mean 'max_new_tokens'"):
        make(winner=0).chat("hello", max_tokens=3)
    with pytest.raises(ExpertokenError, match="stop: expected a text or a list of texts, got 3"):
        make(winner=0).chat("hello", stop=3)


def test_closing_a_stream_stops_generating(make):
    composite = make(winner=0)
    steps = []
    with composite.local_models.lease(composite.backend("math").source) as resident:
        model = resident.model
    model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(time.sleep(0.01)))
    stream = composite.stream("Compute 12 plus 30.", max_new_tokens=400)
    next(iter(stream))
    stream.close()
    stopped = len(steps)
    assert stopped < 200
    time.sleep(0.2)
    assert len(steps) == stopped


def adapter(base_folder, path, seed, target="q_proj", rank=4):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=[target], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return model.eval()


def test_adapters_share_the_metas_base_and_change_nothing_of_it(make, meta, base_folder, tmp_path):
    solo = {name: adapter(base_folder, tmp_path / name, seed) for seed, name in enumerate(("one", "two.b"))}
    pool = ExpertPool([Expert(name, "adapter", str(tmp_path / name)) for name in solo])
    composite = make(winner=0, experts=pool)
    before = composite.route("hello").probabilities
    messages = [{"role": "user", "content": "hello there"}]
    ids = torch.tensor([list(meta.encode(messages))])
    for name in ("one", "two.b", "one"):
        text = answer_of(composite.backend(name), messages, Generation(6))
        out = solo[name].generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert text == meta.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert composite.route("hello").probabilities == before
    with composite.local_models.lease(composite.backend("one").source) as resident:
        assert len(resident.slots) == 2
    shared = resident.adapted.get_base_model().get_input_embeddings().weight
    assert shared.data_ptr() == meta.head.weight.data_ptr()


@pytest.mark.parametrize("kind", ["wrong base", "missing", "not an adapter", "damaged"])
def test_an_adapter_that_does_not_fit_is_one_clear_line(make, meta, base_folder, tmp_path, kind):
    folder = tmp_path / "adapter"
    if kind == "wrong base":
        adapter(tiny_folder(tmp_path / "other", "gpt2"), folder, 0, target="c_attn")
    elif kind == "not an adapter":
        folder.mkdir()
    elif kind == "damaged":
        adapter(base_folder, folder, 0)
        (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    expert = Expert("x", "adapter", str(folder))
    models = LocalModels()
    with pytest.raises(ExpertFailedError) as error:
        expert.kind.open(expert, Opening(Source(str(base_folder)), models))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


CHUNK = (
    '{"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    '"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}'
)


class Endpoint(BaseHTTPRequestHandler):
    seen: ClassVar[list] = []
    status = 200

    def do_POST(self):
        type(self).seen.append(
            (
                self.path,
                {k.lower(): v for k, v in self.headers.items()},
                self.rfile.read(int(self.headers["Content-Length"])),
            )
        )
        self.send_response(self.status)
        if self.status != 200:
            self.end_headers()
            return
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece, finish in (("Hel", "null"), ("lo", "null"), ("", '"stop"')):
            self.wfile.write(f"data: {CHUNK % (piece, finish)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Endpoint, "seen", [])
    monkeypatch.setattr(Endpoint, "status", 200)
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "very-secret")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Expert("remote", "openai", "some/model", base_url=url, api_key_env="TEST_ENDPOINT_KEY")
    server.shutdown()


def test_an_endpoint_streams_through_the_openai_client(make, endpoint):
    composite = make(winner=0, experts=ExpertPool([endpoint, Expert("self", backend="self")]))
    stream = composite.stream(CHAT, max_new_tokens=9)
    assert list(stream) == ["Hel", "lo"]
    [(path, headers, body)] = Endpoint.seen
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer very-secret"
    assert b'"max_tokens":9' in body.replace(b" ", b"")
    assert b"expert:" not in body


def test_an_endpoint_that_refuses_falls_back_without_telling_the_key(make, endpoint, monkeypatch):
    monkeypatch.setattr(Endpoint, "status", 401)
    composite = make(winner=0, experts=ExpertPool([endpoint, Expert("self", backend="self")]))
    reply = composite.chat("hello", max_new_tokens=3)
    assert reply.expert == "self"
    assert reply.failures["remote"] == "the endpoint answered 401"
    assert "very-secret" not in repr(reply)


def test_a_key_goes_to_nobody_it_was_not_meant_for(make, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my-openai-key")
    stranger = Expert("remote", "openai", "m", base_url=endpoint.base_url)
    make(winner=0, experts=ExpertPool([stranger, Expert("self", backend="self")])).chat("hello", max_new_tokens=3)
    assert "my-openai-key" not in repr(Endpoint.seen)


class Odd(Backend):
    """A backend that misbehaves in one way."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.begun = []

    async def stream(self, messages, generation, *, begun=""):
        self.begun.append(begun)
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece if isinstance(piece, Piece) else Piece(piece)


@pytest.mark.parametrize(
    "pieces", [[], [IndexError("index out of range")], [torch.OutOfMemoryError("CUDA out of memory")]]
)
def test_whatever_an_expert_fails_with_the_next_one_answers(make, pieces):
    composite = make(winner=0)
    composite._backends["math"] = Odd(pieces)
    reply = composite.chat("hello", max_new_tokens=3)
    assert reply.expert == reply.dispatch.ranking[1]
    assert list(reply.failures) == ["math"]


def test_where_an_answer_breaks_off_the_next_best_goes_on_with_it(make):
    composite = make(winner=0)
    composite._backends["math"] = Odd(["half an ", "answer", RuntimeError("gone")])
    composite._backends["law"] = Odd([", and the rest of it"])
    stream = composite.stream("hello")
    assert list(stream) == ["half an ", "answer", ", and the rest of it"]
    assert stream.reply.text == "half an answer, and the rest of it"
    assert stream.reply.expert == "law"
    assert stream.reply.failures == {"math": "gone"}
    assert composite._backends["law"].begun == ["half an answer"]


def test_a_local_model_goes_on_with_what_another_began(make, meta):
    composite = make(winner=0)
    composite._backends["math"] = Odd(["The capital of", RuntimeError("gone")])
    reply = composite.chat("hello", max_new_tokens=12)
    ids = meta.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "The capital of"}],
        continue_final_message=True, return_dict=False,
    )  # fmt: skip
    used = len(meta.tokenizer("The capital of").input_ids)
    out = meta.plain.generate(torch.tensor([ids]), max_new_tokens=12 - used, do_sample=False)
    assert reply.text == "The capital of" + meta.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_an_answer_that_nobody_can_go_on_with_is_marked_never_silent(make):
    composite = make(winner=0)
    for name in ("math", "law", "self"):
        composite._backends[name] = Odd(["half an ans", RuntimeError("gone")] if name == "math" else [OSError("no")])
    stream = composite.stream("hello")
    with pytest.raises(ExpertokenError, match="the answer broke off .*math: gone; law: no; self: no"):
        list(stream)
    assert stream.reply.text == "half an ans"
    assert stream.reply.finish is None


def test_an_expert_that_fails_again_and_again_is_left_alone_until_nobody_else_is_left(make):
    composite = make(winner=0)
    broken = composite._backends["math"] = Odd([RuntimeError("down")])
    for turn in range(5):
        reply = composite.chat("hello", max_new_tokens=2)
        assert reply.expert == "law"
        assert reply.skipped == (() if turn < 3 else ("math",))  # the reply names skipped experts
    assert len(broken.begun) == 3
    composite._backends["law"] = composite._backends["self"] = Odd([RuntimeError("down too")])
    with pytest.raises(ExpertokenError, match="math: down"):
        composite.chat("hello")
    assert len(broken.begun) == 4


def test_an_answer_ends_before_a_stop_text_however_its_pieces_fall(make):
    composite = make(winner=0)
    composite._backends["math"] = Odd(["one", " two EN", "D three", " four"])
    for stop, text, finish in [(("END",), "one two ", "stop"), (("four", "E"), "one two ", "stop"),
                               ("END", "one two ", "stop"), (None, "one two END three four", "stop"),
                               (("nowhere", "fourteen"), "one two END three four", "stop")]:  # fmt: skip
        reply = composite.chat("hello", stop=stop)
        assert (reply.text, reply.finish) == (text, finish)


def test_a_reply_tells_why_it_ended_what_it_took_and_what_it_cost(make, base_folder, meta):
    experts = ExpertPool([Expert("math", model=str(base_folder), cost={"input": 2.0, "output": 5.0})])
    reply = make(winner=0, experts=experts).chat("hello", max_new_tokens=4)
    assert reply.finish == "length"
    assert (reply.prompt_tokens, reply.completion_tokens) == (len(meta.encode("hello")), 4)
    assert reply.cost == pytest.approx((2 * reply.prompt_tokens + 5 * 4) / 1e6)
    assert 0 < reply.first <= reply.seconds


def test_decisions_that_come_together_are_made_in_one_pass_and_each_self_answer_is_its_own(make, meta):
    """The batch shares a left-padded cache. Each answer continues as if it were alone."""
    composite = make(winner=None)
    prompts = ["hello", "hello there", "Compute 12 plus 30."]
    alone = [composite.chat(prompt, max_new_tokens=8).text for prompt in prompts]
    passes, began, held = [], threading.Event(), threading.Event()
    forward = composite._decider._forward

    def slowly(questions, *rest):
        began.set()
        held.wait(30)
        passes.append(len(questions))
        return forward(questions, *rest)

    composite._decider._forward = slowly

    async def together():
        first = asyncio.ensure_future(composite.achat(CHAT, max_new_tokens=8))
        await asyncio.to_thread(began.wait, 30)
        others = [asyncio.ensure_future(composite.achat(prompt, max_new_tokens=8)) for prompt in prompts]
        while composite._decider._lanes[False].qsize() < len(prompts):
            await asyncio.sleep(0.01)
        held.set()
        await first
        return [(await other).text for other in others]

    assert asyncio.run(together()) == alone
    assert passes == [1, 3]


@pytest.mark.parametrize("architecture", ["mistral-window", "lfm2", "falcon-h1"])
def test_so_it_is_where_layers_keep_a_window_or_a_state(tmp_path, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    composite = composite_of(base, [Expert("math", model=str(base)), Expert("self", "self")])
    composite.policy = Policy(allow=("self",))
    prompts = ["hello", "hello there, and a good deal more than that", "Compute 12 plus 30."]
    alone = [composite.chat(prompt, max_new_tokens=8) for prompt in prompts]
    assert {reply.expert for reply in alone} == {"self"}
    questions = [composite._question(as_messages(prompt), None, answer=True) for prompt in prompts]
    decisions = composite._decider.decide(questions)
    assert all(decision.own is not None for decision in decisions)
    for prompt, decision, reply in zip(prompts, decisions, alone, strict=True):
        stream = composite.answer(as_messages(prompt), decision, Generation(max_new_tokens=8))
        assert "".join(stream) == reply.text


def test_self_goes_on_from_what_an_expert_left_and_does_not_begin_again(make):
    """Self is chosen, but its breaker is open, so it comes last."""
    composite = make(winner=None)
    for _ in range(3):
        composite._breakers["self"].failed()
    composite._backends["math"] = Odd(["half an answer", ExpertFailedError("cut")])
    composite._backends["law"] = Odd([ExpertFailedError("refused")])
    asked = []
    backend = composite.backend("self")
    stream = backend.stream

    def noting(messages, generation, begun=""):
        asked.append(begun)
        return stream(messages, generation, begun=begun)

    backend.stream = noting
    reply = composite.chat("hello", max_new_tokens=20)
    assert reply.expert == "self"
    assert asked == ["half an answer"]
    assert reply.text.startswith("half an answer")


def test_an_answer_is_no_longer_than_the_positions_that_are_left(make, meta, base_folder):
    composite = make(winner=None)
    prompt = "hello " * 100
    while len(meta.encode(prompt + "hello ")) < 508:
        prompt += "hello "
    left = 512 - len(meta.encode(prompt))
    composite._breakers["self"] = Breaker(failures=1)
    for _ in range(2):
        reply = composite.chat(prompt, max_new_tokens=50)
        assert (reply.expert, reply.failures) == ("self", {})
        assert reply.completion_tokens <= left
    expert = composite.chat(prompt, max_new_tokens=50, policy=Policy(allow=("math",)))
    assert expert.completion_tokens <= left


def test_many_who_wait_for_self_hold_no_cache_each(make, monkeypatch):
    composite = make(winner=None)
    monkeypatch.setattr(decider, "_MOST_STARTS", 2)
    questions = [composite._question(as_messages(f"hello {number}"), None, answer=True) for number in range(5)]
    decisions = composite._decider.decide(questions)
    assert sum(decision.own is not None for decision in decisions) == 2
    expected = [composite.chat(f"hello {number}", max_new_tokens=4).text for number in range(5)]
    for number, decision in enumerate(decisions):
        stream = composite.answer(as_messages(f"hello {number}"), decision, Generation(max_new_tokens=4))
        assert "".join(stream) == expected[number]


@pytest.mark.parametrize("lora", [False, True])
def test_trained_for_anywhere_self_hands_over_where_the_meta_llm_calls_for_an_expert(make, base_folder, tmp_path, lora):
    """The expert continues the text so far, which is streamed once. The test finds the position with the rows alone."""
    composite = make(winner=None)
    meta = composite.meta
    if lora:
        adapter(base_folder, tmp_path / "lora", seed=1)
        meta.load_adapter(tmp_path / "lora")
        lean_towards(meta, None)
    composite.policy = Policy(deny=("law",))
    alone = composite.chat(CHAT, max_new_tokens=12).text
    prompt = list(meta.encode(CHAT))
    answer = meta.plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    states = [meta.states([Query.of(prompt + answer[:count])])[0] for count in range(12)]
    # The row wins at the sixth position, and at no earlier one.
    wanted = torch.tensor([-15.0] * 6 + [15.0] + [-15.0] * 5)
    row = torch.linalg.lstsq(torch.cat(states), wanted[:, None]).solution[:, 0]
    meta.rows = torch.stack([row, torch.zeros_like(row), torch.zeros_like(row)])
    before = meta.tokenizer.decode(answer[:6], skip_special_tokens=True)
    composite.anywhere = True
    stream = composite.stream(CHAT, max_new_tokens=12)
    pieces = list(stream)
    assert stream.dispatch.expert == "self"
    assert stream.expert == "math"
    assert stream.reply.handed_over.expert == "math"
    assert "".join(pieces).startswith(before)
    used = len(meta.tokenizer(before, add_special_tokens=False).input_ids)
    rest = answer_of(composite.backend("math"), CHAT, Generation(12 - used), begun=before)
    assert "".join(pieces) == before + rest
    # If handing over is not allowed, the expert's token is not a token of the answer either.
    assert composite.chat(CHAT, max_new_tokens=12, policy=Policy(deny=("math", "law"))).text == alone
    composite.anywhere = False
    assert composite.chat(CHAT, max_new_tokens=12).text == alone


def handing_over(make):
    """Build a composite whose self calls for `math` at its second token or sooner. Return it with the text before."""
    composite = make(winner=None)
    meta = composite.meta
    composite.anywhere, composite.policy = True, Policy(deny=("law",))
    prompt = list(meta.encode(CHAT))
    answer = meta.plain.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
    states = [meta.states([Query.of(prompt + answer[:count])])[0] for count in range(2)]
    wanted = torch.tensor([-15.0, 15.0])
    row = torch.linalg.lstsq(torch.cat(states), wanted[:, None]).solution[:, 0]
    meta.rows = torch.stack([row, torch.zeros_like(row), torch.zeros_like(row)])
    return composite, meta.tokenizer.decode(answer[:1], skip_special_tokens=True)


def test_self_answers_where_the_expert_fails_that_it_called_before_anything_was_out(make):
    """A stop text holds back the beginning. The decision's cache is used up then, so self does not continue from it."""
    composite, before = handing_over(make)
    composite._backends["math"] = Odd([RuntimeError("down")])
    reply = composite.chat(CHAT, max_new_tokens=4, stop=(before + "\x00",))
    assert reply.expert == "self"
    assert list(reply.failures) == ["math"]
    assert reply.text
    assert reply.handed_over_after == 0


def test_self_that_calls_for_an_expert_has_done_well(make):
    composite, before = handing_over(make)
    composite._backends["math"] = Odd([" and more", Piece(finish="stop")])
    breaker = composite._breakers["self"]
    for _ in range(3):
        breaker.failed()
    breaker._until = 0.0
    reply = composite.chat(CHAT, max_new_tokens=4)
    assert (reply.text, reply.expert, reply.handed_over_after) == (before + " and more", "math", len(before))
    assert not breaker.is_open
    assert breaker.admits()
    assert breaker.admits()


def test_an_image_is_nothing_that_self_answers_though_it_may_hand_over(make):
    composite = make(winner=None)
    parts = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    for composite.anywhere in (False, True):
        with pytest.raises(ExpertokenError, match="self can't read images"):
            composite.chat([{"role": "user", "content": parts}], policy=Policy(allow=("self",)))


@pytest.mark.parametrize("lora", [False, True])
def test_where_self_stands_in_for_an_expert_it_does_not_call_for_that_expert_again(make, base_folder, tmp_path, lora):
    composite = make(winner=0)
    if lora:
        adapter(base_folder, tmp_path / "lora", seed=1)
        composite.meta.load_adapter(tmp_path / "lora")
        lean_towards(composite.meta, 0)
    composite.anywhere, composite.policy = True, Policy(deny=("law",))
    broken = composite._backends["math"] = Odd([RuntimeError("down")])
    for turn in range(5):
        reply = composite.chat("hello", max_new_tokens=4)
        assert reply.expert == "self"
        assert len(broken.begun) == min(turn + 1, 3)


@pytest.mark.parametrize("late", [OSError("cut"), TimeoutError(), ValueError("usage")])
def test_what_fails_behind_the_end_of_an_answer_takes_nothing_away_and_adds_nothing(make, late):
    composite = make(winner=0)
    composite._backends["math"] = Odd(["Hello", Piece(finish="stop"), late])
    reply = composite.chat("hello")
    assert (reply.text, reply.expert, reply.finish, reply.failures) == ("Hello", "math", "stop", {})


def test_an_answer_that_a_stop_text_or_a_limit_leaves_empty_is_one_and_no_failure(make):
    composite = make(winner=0)
    composite._backends["math"] = Odd(["Hello"])
    for _ in range(5):
        reply = composite.chat("hello", stop=("H",))
        assert (reply.text, reply.expert, reply.finish) == ("", "math", "stop")
    composite._backends["math"] = Odd([Piece(finish="length")])
    assert composite.chat("hello").expert == "math"


def test_an_end_at_once_may_be_a_stop_text_that_the_server_applied(make):
    composite = make(winner=0)
    composite._backends["math"] = Odd([Piece(finish="stop")])
    for _ in range(5):
        reply = composite.chat("hello", stop=("H",))
        assert (reply.text, reply.expert, reply.finish, reply.stopped_by) == ("", "math", "stop", None)
    composite._backends["math"] = Odd(["one ", Piece(finish="stop", stopped_by="END")])
    assert composite.chat("hello", stop=("H", "END")).stopped_by == "END"
    assert composite.chat("hello", stop=("H",)).stopped_by is None  # no stop text of this request


def test_an_answer_that_a_stop_text_left_empty_counts_what_was_read(make):
    composite = make(winner=0)
    composite._backends["math"] = Odd(["Hello"])
    assert composite.chat("hello", stop=("H",)).prompt_tokens > 0


def test_a_request_that_an_expert_can_not_take_is_not_held_against_it(make):
    composite = make(winner=0)
    with composite.backend("math").models.lease(composite.backend("math").source) as resident:
        resident.model.config.max_position_embeddings = 3
    for _ in range(4):
        with pytest.raises(NoAnswerError) as error:
            composite.chat("hello")
        assert error.value.refused
    assert composite._breakers["math"].admits()


def test_what_each_part_of_an_answer_took_is_counted_to_who_gave_it(make, base_folder):
    spent = []

    class Book(Observer):
        def spent(self, part):
            spent.append(part)

    experts = [Expert(name, model=str(base_folder), cost={"input": 1.0, "output": 1.0}) for name in ("math", "law")]
    composite = make(winner=0, experts=ExpertPool(experts))
    composite.observe(Book())
    composite._backends["math"] = Odd(["Hello", RuntimeError("gone")])
    composite._backends["law"] = Odd([" there", Piece(finish="stop", usage=(20, 7))])
    reply = composite.chat("hello")
    read = len(composite.meta.encode("hello"))
    assert [(part.expert, part.prompt_tokens, part.completion_tokens) for part in spent] == [
        ("math", read, composite.count("Hello")), ("law", 20, 7),
    ]  # fmt: skip
    assert reply.completion_tokens == composite.count("Hello") + 7
    assert reply.cost == pytest.approx(sum(part.cost for part in spent))


def test_a_decision_that_fails_takes_no_other_along(make):
    composite = make(winner=0)
    forward = composite._decider._forward

    def fails_with_the_long_one(questions, *rest):
        time.sleep(0.1)
        if any(len(question.query) > 60 for question in questions):
            raise IndexError("index out of range")
        return forward(questions, *rest)

    composite._decider._forward = fails_with_the_long_one

    async def together():
        asked = [
            composite.achat(text, max_new_tokens=2) for text in ("hello", "hello there", "very long " * 20, "hello")
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    for _ in range(2):  # the thread survives the failure
        first, second, third, fourth = asyncio.run(together())
        assert [reply.expert for reply in (first, second, fourth)] == ["math"] * 3
        assert isinstance(third, NoAnswerError)
        assert "index out of range" in str(third)


@pytest.mark.parametrize("winner", [0, None])
def test_a_chat_that_the_meta_llm_can_not_read_is_answered_by_who_can(make, words, winner):
    """The decision reads a part of the chat's hundred thousand tokens. If it chooses self, the next expert answers."""
    experts = ExpertPool([*words, Expert("self", "self")])
    composite = make(winner=winner, experts=experts)
    chat = [{"role": "user", "content": "word " * 50_000}, {"role": "assistant", "content": "word " * 50_000}, *CHAT]
    reply = composite.chat(chat)
    assert reply.expert in (("one",) if winner == 0 else ("one", "two"))  # after self the two experts are equal
    assert composite.decide([chat])[0].prompt_tokens > 50_000
    assert list(reply.failures) == ([] if winner == 0 else ["self"])


def test_an_error_of_one_decision_is_its_own(make):
    composite = make(winner=0)

    async def both():
        good = composite.achat("hello", max_new_tokens=2)
        bad = composite.achat("hello", policy=Policy(threshold=0.5, default="nobody"))
        return await asyncio.gather(good, bad, return_exceptions=True)

    good, bad = asyncio.run(both())
    assert good.expert == "math"
    assert isinstance(bad, ExpertokenError)


def test_two_streams_of_two_adapters_in_turns_do_not_disturb_each_other(make, base_folder, tmp_path):
    for seed, name in enumerate(("one", "two")):
        adapter(base_folder, tmp_path / name, seed)
    composite = make(winner=0, experts=ExpertPool([Expert(n, "adapter", str(tmp_path / n)) for n in ("one", "two")]))
    messages = [{"role": "user", "content": "hello there"}]
    alone = {n: answer_of(composite.backend(n), messages, Generation(12)) for n in ("one", "two")}
    streams = {n: BackgroundLoop.iterate(composite.backend(n).stream(messages, Generation(12))) for n in alone}
    got = {n: next(stream).text for n, stream in streams.items()}
    for name, stream in streams.items():
        got[name] += "".join(piece.text for piece in stream)
    assert got == alone


def test_one_stop_text_is_one_however_a_generation_is_made():
    assert Generation(stop="END").stop == ("END",)
    assert Generation(stop=["a", ""]).stop == ("a",)
    assert Generation(stop=None).stop == ()


def test_the_tokens_of_a_long_text_are_counted_about_and_at_once(make):
    composite = make()
    text = "Compute 12 plus 30. " * 1000
    exact = composite.count(text)
    started = time.perf_counter()
    assert composite.count(text * 5000) == pytest.approx(5000 * exact, rel=0.01)  # 100 million characters
    assert time.perf_counter() - started < 5

import json
import tracemalloc

import pytest
import torch

from expertoken.inference import batch
from expertoken.inference.batch import generate_file
from expertoken.inference.calibrate import calibrate
from expertoken.inference.server import create_app
from expertoken.modeling.backend import Generation
from expertoken.modeling.composite import read_manifest, write_calibration
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.policy import Policy
from expertoken.tests.inference.conftest import composite_of

GENERATION = Generation(max_new_tokens=6)


@pytest.fixture
def composite(base_folder, words):
    """Build a composite of two endpoints, a local model and self. Its random rows choose each for some prompts."""
    experts = [
        *words,
        Expert("local", model=str(base_folder), cost={"input": 0.1, "output": 0.1}),
        Expert("self", "self"),
    ]
    made = composite_of(base_folder, experts)
    made.meta.rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    made.manifest.training["objective"] = "correctness"  # only this objective can weigh costs
    made.chooser = made.composite.chooser
    return made


@pytest.fixture
def source(tmp_path):
    rows = [{"id": number, "prompt": f"question {number} of {number * 7}"} for number in range(40)]
    rows[3] = {"id": 3, "messages": [{"role": "user", "content": "hello"}], "more": [1, 2]}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return tmp_path / "in.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered_in_its_order_as_a_chat_would_be(composite, source, tmp_path):
    counts = generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    rows = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(40))
    assert rows[3]["more"] == [1, 2]
    assert sum(counts.values()) == 40
    assert len(counts) > 1
    for row in rows[:8]:
        reply = composite.chat(row.get("messages") or row["prompt"], max_new_tokens=6)
        assert (row["answer"], row["expert"]) == (reply.text, reply.expert)
    assert list(tmp_path.glob(".*part")) == []


def test_an_interrupted_run_goes_on_and_answers_nothing_twice(composite, source, tmp_path, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    generate_file(composite, source, whole, generation=GENERATION)
    monkeypatch.setattr(batch, "_BLOCK", 10)
    answers, asked = batch._answers, []

    def break_off(composite, conversations, *more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(conversations))
        yield from answers(composite, conversations, *more)

    monkeypatch.setattr(batch, "_answers", break_off)
    with pytest.raises(KeyboardInterrupt):
        generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    assert not (tmp_path / "out.jsonl").exists()
    part = tmp_path / ".out.jsonl.part"
    part.write_text(part.read_text()[:-20])  # an unfinished line

    def counting(composite, conversations, *more):
        asked.append(len(conversations))
        yield from answers(composite, conversations, *more)

    monkeypatch.setattr(batch, "_answers", counting)
    generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    assert sum(asked) == 41
    assert lines(tmp_path / "out.jsonl") == lines(whole)


def test_a_row_that_can_not_be_decided_on_is_told_and_takes_no_other_along(composite, tmp_path):
    rows = [{"prompt": "hello"}, {"prompt": "word " * 3000}, {"prompt": "hello there", "odd": "\ud800"}]
    composite.policy = Policy(allow=("self",))
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl", generation=GENERATION)
    assert counts["nobody"] == 1
    first, second, third = lines(tmp_path / "out.jsonl")
    assert first["answer"]
    assert "at most 511 tokens, got" in second["error"]
    assert (third["odd"], bool(third["answer"])) == ("\ud800", True)


def test_a_batch_tells_of_its_answers_what_a_chat_tells(composite, source, tmp_path):
    generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    for row in lines(tmp_path / "out.jsonl")[:12]:
        reply = composite.chat(row.get("messages") or row["prompt"], max_new_tokens=6)
        told = {"answer": reply.text, "expert": reply.expert, "finish": reply.finish, "cost": reply.cost}
        assert {key: row[key] for key in told} == told


def test_neither_a_file_nor_its_answers_need_to_fit_into_memory(composite, tmp_path, monkeypatch):
    def long(composite, conversations, *_):
        for place in range(len(conversations)):
            yield place, {"answer": "word " * 200_000, "expert": "one"}

    monkeypatch.setattr(batch, "_answers", long)
    monkeypatch.setattr(batch, "_BLOCK", 8)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} " * 100_000}) for n in range(80)))
    tracemalloc.start()
    assert generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == {"one": 80}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out.jsonl").stat().st_size > 80e6
    assert peak < 20e6


def test_a_question_that_is_asked_twice_is_answered_twice(composite, tmp_path, monkeypatch):
    numbers = iter(range(10))
    monkeypatch.setattr(
        batch, "_answers", lambda _, chats, *more: ((p, {"answer": str(next(numbers))}) for p in range(len(chats)))
    )
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n' * 3)
    generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [row["answer"] for row in lines(tmp_path / "out.jsonl")] == ["0", "1", "2"]


def test_a_conversation_that_nobody_can_answer_is_told_and_the_others_are_answered(base_folder, words, tmp_path):
    composite = composite_of(base_folder, words[:1])
    rows = [{"prompt": "hello one do: refuse"}, {"prompt": "hello"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == {"nobody": 1, "one": 1}
    first, second = lines(tmp_path / "out.jsonl")
    assert "the endpoint answered 500" in first["error"]
    assert second["answer"].startswith("one0")


def test_what_nobody_could_answer_is_asked_again_by_the_same_call_and_nothing_else_is(
    base_folder, words, tmp_path, monkeypatch
):
    composite = composite_of(base_folder, words[:1])
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "hello there"}\n')
    answers, asked = batch._answers, []

    def counting(composite, conversations, *more):
        asked.append([chat[-1]["content"] for chat in conversations])
        for place, answer in answers(composite, conversations, *more):
            failing = len(asked) == 1 and place == 1
            yield place, {"answer": None, "expert": None, "error": "down"} if failing else answer

    monkeypatch.setattr(batch, "_answers", counting)
    assert generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == {"one": 1, "nobody": 1}
    assert generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == {"one": 2}
    assert asked == [["hello", "hello there"], ["hello there"]]
    assert all(row["answer"] for row in lines(tmp_path / "out.jsonl"))
    assert list(tmp_path.glob(".*part")) == []


def test_a_second_run_on_one_file_is_kept_out(composite, source, tmp_path, monkeypatch):
    answers = batch._answers

    def meanwhile(*arguments):
        with pytest.raises(ExpertokenError, match="out.jsonl: another run is writing this file"):
            generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
        yield from answers(*arguments)

    monkeypatch.setattr(batch, "_answers", meanwhile)
    generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]


def test_an_answer_carries_no_error_of_an_earlier_run(composite, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "hello", "error": "no connection", "id": 7}) + "\n")
    generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl", generation=GENERATION)
    [row] = lines(tmp_path / "out.jsonl")
    assert row["answer"]
    assert row["id"] == 7
    assert "error" not in row


def test_a_whole_file_is_answered_anew_on_demand_only_and_never_over_its_questions(composite, source, tmp_path):
    generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    with pytest.raises(ExpertokenError, match="out.jsonl: exists already and is complete. Pass --overwrite"):
        generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION)
    before = lines(tmp_path / "out.jsonl")
    generate_file(composite, source, tmp_path / "out.jsonl", generation=GENERATION, overwrite=True)
    assert lines(tmp_path / "out.jsonl") == before
    asked = source.read_text()
    for overwrite in (False, True):
        with pytest.raises(ExpertokenError, match="expected a file for the answers, got the input file"):
            generate_file(composite, source, source, generation=GENERATION, overwrite=overwrite)
    assert source.read_text() == asked


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "empty"), ('{"prompt": "a"}\n3', "line 2: expected a JSON object"), ('{"prompt"', "at character 9"),
     ('{"prompt": "a"}\n{"promt": "b"}', "line 2"), ('{"prompt": 3}', "line 1"), ("[1]", "line 1"),
     ('{"messages": [{"role": "user"}]}', "line 1: messages[0]"), ('{"prompt": "a', "line 1")],
)  # fmt: skip
def test_a_malformed_file_is_one_line(composite, tmp_path, text, told):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ExpertokenError) as error:
        generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


PROMPTS = [f"question {number} of {number * 7}" for number in range(50)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_a_threshold_gives_experts_the_share_that_was_asked_for(composite, share):
    found = calibrate(composite, PROMPTS, share=share)
    assert found.share == pytest.approx(share, abs=1 / len(PROMPTS))
    composite.policy = found.policy
    answered = [dispatch.expert != "self" for dispatch in composite.route(PROMPTS)]
    assert sum(answered) / len(PROMPTS) == pytest.approx(found.share, abs=1 / len(PROMPTS))


def test_calibrating_starts_anew_whatever_was_set_before(composite):
    found = calibrate(composite, PROMPTS, share=0.3)
    composite.policy = Policy(threshold=0.99, default="one", cost_weight=1e5)
    assert calibrate(composite, PROMPTS, share=0.3) == found
    assert calibrate(composite, PROMPTS, cost=1.0).policy == Policy()


def test_a_cost_without_prices_and_a_default_that_is_nobody_are_refused(base_folder):
    free = composite_of(base_folder, [Expert("local", model=str(base_folder)), Expert("self", "self")])
    with pytest.raises(ExpertokenError, match="expected a composite trained with `--objective correctness`"):
        calibrate(free, PROMPTS, cost=0.1)
    with pytest.raises(ExpertokenError, match="policy.default: no candidate 'locl', did you mean 'local'"):
        calibrate(free, PROMPTS, share=0.1, default="locl")


def test_a_share_that_no_threshold_gives_is_refused(composite):
    rows = composite.meta.rows.clone()
    rows[-1] += 100 * composite.meta.states([composite.meta.encode("hello")])[0][0]  # self has a probability of 1
    composite.meta.rows = rows
    with pytest.raises(ExpertokenError, match="Use a share up to that"):
        calibrate(composite, PROMPTS, share=0.9)


def test_a_share_that_no_threshold_comes_near_is_refused(composite):
    composite.meta.rows = composite.meta.rows * 1000  # every decision has a probability of almost 1
    sure = [max(dispatch.probabilities.values()) for dispatch in composite.route(PROMPTS)]
    assert sum(share == 1 for share in sure) > 40
    with pytest.raises(ExpertokenError, match="the nearest threshold gives"):
        calibrate(composite, PROMPTS, share=0.1)


def test_a_weight_of_costs_keeps_requests_within_the_cost_that_was_asked_for(composite):
    free = calibrate(composite, PROMPTS, cost=1.0)
    assert free.policy.cost_weight == 0
    found = calibrate(composite, PROMPTS, cost=free.cost / 2)
    assert 0 < found.cost <= free.cost / 2
    assert found.before == pytest.approx(free.cost)
    composite.policy = found.policy
    spent = [
        composite.chooser.usd(len(composite.meta.encode(prompt)))[composite.pool.names.index(dispatch.expert)]
        for prompt, dispatch in zip(PROMPTS, composite.route(PROMPTS), strict=True)
    ]
    assert sum(spent) / len(spent) == pytest.approx(found.cost)


def test_what_was_calibrated_is_stored_in_the_composite_and_holds_when_it_is_loaded(composite, tmp_path):
    composite.save_pretrained(tmp_path / "c", verify=False)
    write_calibration(tmp_path / "c", {"policy": {"threshold": 0.25}, "prompts": 3})
    assert read_manifest(tmp_path / "c").calibration["prompts"] == 3
    loaded = type(composite).from_pretrained(tmp_path / "c", device="cpu")
    assert loaded.policy == Policy(threshold=0.25)


def test_what_was_calibrated_decides_who_answers_chats_files_and_requests(composite, source, tmp_path):
    """No expert reaches the threshold, so self answers everything."""
    from starlette.testclient import TestClient

    assert {dispatch.expert for dispatch in composite.route(PROMPTS)} != {"self"}
    composite.save_pretrained(tmp_path / "c", verify=False)
    write_calibration(tmp_path / "c", {"policy": {"threshold": 1.0}})
    loaded = type(composite).from_pretrained(tmp_path / "c", device="cpu")
    assert loaded.chat(PROMPTS[0], max_new_tokens=2).expert == "self"
    assert generate_file(loaded, source, tmp_path / "out.jsonl", generation=GENERATION) == {"self": 40}
    chat = [{"role": "user", "content": PROMPTS[0]}]
    body = {"model": "composite", "messages": chat, "max_tokens": 2, "expertoken": {"show": True}}
    answer = TestClient(create_app(loaded), "http://localhost").post("/v1/chat/completions", json=body).json()
    assert answer["expertoken"][0]["expert"] == "self"


def test_calibration_reads_cached_states_in_batches(base_folder, monkeypatch):
    experts = [Expert(name, model=str(base_folder)) for name in ("one", "two")]
    composite = composite_of(base_folder, [*experts, Expert("self", "self")])
    prompts = [f"question {number} of {number * 7}" for number in range(40)]
    sizes, states = [], MetaLLM.states
    monkeypatch.setattr(MetaLLM, "states", lambda self, queries: sizes.append(len(queries)) or states(self, queries))
    first = calibrate(composite, prompts, share=0.5)
    assert sum(sizes) == 40
    assert len(sizes) < 10
    assert calibrate(composite, prompts, share=0.5) == first
    assert sum(sizes) == 40

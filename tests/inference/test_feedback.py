import json
from dataclasses import replace

import httpx
import pytest

from expertoken.data_prep.reading import read_results
from expertoken.inference.server import Settings, create_app, feedback
from expertoken.inference.server.feedback import Feedback, FeedbackRequest
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served

HELLO = [{"role": "user", "content": "hello"}]
KEYS = ("a" * 16, "b" * 16)


@pytest.fixture
def serving(tmp_path, base_folder, words):
    composite = composite_of(base_folder, [*words, Expert("self", "self")])
    shares = {"one": 1.0, "two": 0.0, "self": 0.0}
    composite.manifest = replace(composite.manifest, calibration={"shares": shares})
    file = tmp_path / "feedback.jsonl"
    with served(create_app(composite, Settings(name="comp", api_keys=KEYS, feedback=file))) as address:
        yield address, file


def post(address, path, body, key=KEYS[0]):
    return httpx.post(f"{address}/v1/{path}", json=body, headers={"authorization": f"Bearer {key}"})


def metrics(address):
    return httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {KEYS[0]}"}).text


def test_judgements_become_results_that_can_be_learnt_from(serving):
    address, file = serving
    chat = [*HELLO, {"role": "assistant", "content": "hi"}, *HELLO]
    first = post(address, "chat/completions", {"model": "comp", "messages": HELLO}).json()["id"]
    second = post(address, "messages", {"model": "comp", "messages": chat, "max_tokens": 5}).json()["id"]
    third = post(address, "responses", {"model": "comp/two", "input": "hello"}).json()["id"]
    for answer, judgement in ((first, {"thumb": "up"}), (second, {"score": 0.25}), (third, {"thumb": "down"})):
        told = post(address, "feedback", {"id": answer} | judgement)
        assert told.status_code == 200, told.text
    results = read_results(file, "table", repeats="mean")
    assert results.models == ["one", "two"]
    scores = {tuple(row) for row in results.scores.tolist()}
    assert {1.0, 0.25} <= {row[0] for row in scores}
    assert 'expertoken_feedback_total{expert="one"} 2.0' in metrics(address)
    assert 'expertoken_feedback_score_total{expert="one"} 1.25' in metrics(address)


def test_nobody_judges_what_another_client_was_answered(serving):
    address, file = serving
    answer = post(address, "chat/completions", {"model": "comp", "messages": HELLO}).json()["id"]
    assert post(address, "feedback", {"id": answer, "thumb": "up"}, KEYS[1]).status_code == 400
    assert not file.exists()


@pytest.mark.parametrize(
    "judgement", [{}, {"thumb": "up", "score": 1}, {"thumb": "sideways"}, {"score": 2}, {"stars": 5}]
)
def test_a_judgement_is_a_thumb_or_a_score(serving, judgement):
    address, _ = serving
    answer = post(address, "chat/completions", {"model": "comp", "messages": HELLO}).json()["id"]
    assert post(address, "feedback", {"id": answer} | judgement).status_code == 400


def test_without_a_file_there_is_no_such_route(base_folder, words):
    with served(create_app(composite_of(base_folder, words))) as address:
        assert httpx.post(f"{address}/v1/feedback", json={"id": "x", "thumb": "up"}).status_code in (404, 405)


def test_of_more_answers_than_are_kept_the_oldest_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "_WAITING", 2)
    kept = Feedback(tmp_path / "f.jsonl")
    for answer in ("chatcmpl-1", "chatcmpl-2", "chatcmpl-3"):
        kept.remember(answer, HELLO, "one", "")
    with pytest.raises(ExpertokenError, match="expected the id of a recent answer"):
        kept.judge(FeedbackRequest(id="chatcmpl-1", thumb="up"), "")
    assert kept.judge(FeedbackRequest(id="resp_3", thumb="up"), "")["expert"] == "one"
    [line] = (tmp_path / "f.jsonl").read_text().splitlines()
    assert json.loads(line) == {"query": "hello", "model": "one", "score": 1.0, "benchmark": "feedback", "id": "3"}


def test_metrics_tell_margins_switches_and_the_drift_from_the_calibration(serving):
    address, _ = serving
    answer = post(address, "chat/completions", {"model": "comp", "messages": HELLO}).json()
    assert "expertoken_share_drift 0.0" in metrics(address)
    chat = [*HELLO, answer["choices"][0]["message"], *HELLO]
    for _ in range(3):
        extra = {"policy": {"deny": ["one"]}}
        post(address, "chat/completions", {"model": "comp", "messages": chat, "expertoken": extra})
    told = metrics(address)
    assert 'expertoken_session_turns_total{switched="yes"} 3.0' in told
    assert "expertoken_share_drift 0.75" in told
    assert "expertoken_decision_margin_count 4.0" in told

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.modeling.chat import Query
from expertoken.modeling.composite import load_composite
from expertoken.modeling.errors import ExpertokenError
from expertoken.train import positions
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.positions import Positions, own_answers
from expertoken.train.run import train

TEXTS = ["Compute 1 plus 3.", "What is the law in case 7?", "hello"]


def test_answers_are_the_meta_llms_own_and_come_from_the_cache_the_second_time(meta, monkeypatch):
    encoded = [meta.encode(text) for text in TEXTS]
    answers = own_answers(meta, encoded, 6)
    for ids, answer in zip(encoded, answers, strict=True):
        asked = torch.tensor([list(ids)])
        alone = meta.plain.generate(asked, max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
        stop = alone.index(meta.tokenizer.eos_token_id) if meta.tokenizer.eos_token_id in alone else len(alone)
        assert answer.tolist() == alone[:stop]
    monkeypatch.setattr(positions, "_generate", lambda *_: pytest.fail("generated again"))
    again = own_answers(meta, encoded, 6)
    assert all(np.array_equal(one, two) for one, two in zip(answers, again, strict=True))


def test_out_of_memory_says_what_to_change(meta, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(meta.plain, "generate", full)
    with pytest.raises(
        ExpertokenError, match=r"out of memory in a batch of 3 x \d+ \+ 6 tokens\. Try --max_tokens \d+"
    ):
        own_answers(meta, [meta.encode(text) for text in TEXTS], 6)


def test_positions_begin_with_the_starts_and_share_a_querys_weight():
    answers = [np.arange(10), np.zeros(0, int), np.arange(2)]
    found = Positions.inside(answers, 3)
    assert found.query.tolist() == [0, 1, 2, 0, 0, 0, 2, 2]
    assert all(len(prefix) == 0 for prefix in found.prefixes[:3])
    for query, prefix in zip(found.query[3:], found.prefixes[3:], strict=True):
        assert len(prefix) > 0
        assert prefix.tolist() == answers[query][: len(prefix)].tolist()
    np.testing.assert_allclose(found.share, [1, 1, 1, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    queries = found.queries([Query.of(ids) for ids in ([7, 7], [8], [9])])
    assert list(queries[0]) == [7, 7]
    assert list(queries[-1]) == [9, 0, 1]


@pytest.mark.parametrize("method", ["tokens", "lora"])
def test_a_composite_trained_anywhere_decides_better_inside_answers_and_as_well_at_the_start(
    tmp_path, base_folder, results, pool, method
):
    """Inside an answer a random model of 32 dimensions keeps little of the question, and the rows use it."""
    build_supervision(results, pool, test=0.4).save(tmp_path / "s")
    side = Supervision.load(tmp_path / "s").side("test")
    right = {}
    for each in (0, 4):
        options = ExpertokenArguments(
            meta=str(base_folder), data=str(tmp_path / "s"), method=method, verify=False, anywhere=each,
            anywhere_tokens=12,
        )  # fmt: skip
        arguments = TrainingArguments(output_dir=str(tmp_path / f"c{each}"), use_cpu=True, report_to="none",
                                      max_steps=4, save_steps=4, learning_rate=1e-4)  # fmt: skip
        composite = load_composite(train(options, arguments), device="cpu")
        assert composite.manifest.training["dispatch"] == ("anywhere" if each else "start")
        encoded = [composite.meta.encode(messages) for messages in side["messages"]]
        found = Positions.inside(own_answers(composite.meta, encoded, 12), 4)
        logits = [composite.meta.candidate_logits([query]) for query in found.queries(encoded)]
        wanted = np.array([np.argmax(target) for target in side["target"]])[found.query]
        right[each] = torch.cat(logits).argmax(1).numpy() == wanted
    starts, inside = slice(0, len(side)), slice(len(side), None)
    assert right[4][inside].mean() > right[0][inside].mean() + 0.1
    assert right[4][inside].mean() > 0.5  # chance is one third
    assert right[4][starts].mean() > 0.9


def test_positions_inside_own_answers_need_self(tmp_path, base_folder, results):
    build_supervision(results.select(["math", "law"])).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), anywhere=2)
    with pytest.raises(ExpertokenError, match="--anywhere: .* need `self` in the pool"):
        train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))

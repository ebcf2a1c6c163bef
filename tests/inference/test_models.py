import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from expertoken.inference import batch
from expertoken.inference.backends import models as module
from expertoken.inference.backends.local import LocalBackend
from expertoken.inference.backends.models import LocalModels
from expertoken.inference.loop import BackgroundLoop
from expertoken.modeling.backend import Generation
from expertoken.modeling.errors import ExpertFailedError, ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Policy
from expertoken.modeling.source import Source
from expertoken.tests.inference.conftest import composite_of
from expertoken.tests.tiny import tiny_folder

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Make four different models of one size."""
    folder = tmp_path_factory.mktemp("experts")
    return [Source(str(tiny_folder(folder / str(seed), seed=seed))) for seed in range(4)]


@pytest.fixture
def size(sources):
    models = LocalModels("cpu")
    with models.lease(sources[0]) as resident:
        return resident.size


def answer(models, source):
    pieces = BackgroundLoop.iterate(LocalBackend(models, source).stream(CHAT, Generation(4)))
    return "".join(piece.text for piece in pieces)


def test_what_is_loaded_stays_within_the_budget_and_answers_are_the_same(sources, size):
    free, bounded = LocalModels("cpu"), LocalModels("cpu", budget=int(2.5 * size))
    for source in [*sources, *sources]:
        assert answer(bounded, source) == answer(free, source)
        assert len(bounded.resident) <= 2
    assert free.loads == 4
    assert bounded.loads == 8


def test_the_size_is_known_from_the_files_before_anything_is_loaded(sources, size):
    assert module._size_on_disk(sources[0], "cpu", None, None) == pytest.approx(size, rel=0.01)
    assert module._size_on_disk(sources[0], "cpu", torch.bfloat16, None) == pytest.approx(size / 2, rel=0.01)


def test_the_one_that_was_used_longest_ago_makes_room_and_a_pinned_one_never(sources, size):
    a, b, c, d = sources
    models = LocalModels("cpu", budget=int(2.5 * size))
    for source in (a, b, a, c):
        answer(models, source)
    assert models.resident == [a, c]
    pinned = LocalModels("cpu", budget=int(2.5 * size), pinned=(a,))
    for source in (a, b, c, d):
        answer(pinned, source)
    assert pinned.resident == [a, d]


def test_a_model_larger_than_the_budget_is_an_expert_that_failed(sources, size):
    with pytest.raises(ExpertFailedError, match="GiB for local experts"):
        answer(LocalModels("cpu", budget=size // 2), sources[0])


def test_a_model_that_has_no_room_beside_a_pinned_one_is_an_expert_that_failed_and_nobody_waits(sources, size):
    models = LocalModels("cpu", budget=int(1.5 * size), pinned=(sources[0],))
    answer(models, sources[0])
    with pytest.raises(ExpertFailedError, match="pinned experts use"):
        answer(models, sources[1])


def test_where_no_room_comes_free_the_next_best_expert_is_asked(sources, size, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 0.5)
    models = LocalModels("cpu", budget=int(1.5 * size))
    with models.lease(sources[0]), pytest.raises(ExpertFailedError, match="no room in memory within"):
        models.acquire(sources[1])


def test_a_lease_ends_with_the_generation_though_nobody_reads(sources):
    models = LocalModels("cpu")
    stream = BackgroundLoop.iterate(LocalBackend(models, sources[0]).stream(CHAT, Generation(4)))
    next(stream)
    for _ in range(100):
        if not any(resident.users for resident in models._residents.values()):
            break
        time.sleep(0.05)
    assert not any(resident.users for resident in models._residents.values())
    stream.close()


def test_a_model_that_answers_is_not_taken_away_and_who_waits_gets_it_next(sources, size):
    models = LocalModels("cpu", budget=int(1.5 * size))
    order = []
    first = models.acquire(sources[0])

    def wait():
        with models.lease(sources[1]):
            order.append("second")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    assert models.resident == [sources[0]]
    order.append("first")
    models.release(first)
    waiting.join(10)
    assert order == ["first", "second"]


def test_all_who_wait_for_one_model_get_it_by_one_loading(sources, size):
    models = LocalModels("cpu", budget=int(1.5 * size))
    held = models.acquire(sources[0])
    threads = [threading.Thread(target=answer, args=(models, sources[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    models.release(held)
    for thread in threads:
        thread.join(20)
    assert models.loads == 2


@pytest.mark.parametrize("count", [1, 2])
def test_busy_models_can_not_keep_another_out_for_good_nor_two_by_turns(sources, size, monkeypatch, count):
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    models = LocalModels("cpu", budget=int((count + 0.5) * size))
    over = threading.Event()

    def busy(source, since):
        time.sleep(since)
        while not over.is_set():
            with models.lease(source):
                time.sleep(0.05)

    threads = [threading.Thread(target=busy, args=(source, n / 40)) for source in sources[:count] for n in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    load, loaded = module.load_causal_lm, []
    monkeypatch.setattr(
        module, "load_causal_lm", lambda source, **rest: [loaded.append(source), load(source, **rest)][1]
    )
    for _ in range(3):
        with models.lease(sources[count]):
            time.sleep(0.05)
    over.set()
    for thread in threads:
        thread.join(10)
    # The others want room as well. A model that they evict before its first use would be loaded again.
    assert 1 <= loaded.count(sources[count].resolved()) <= 3


def test_a_model_is_not_evicted_between_its_loading_and_its_first_use(sources, size, monkeypatch):
    models = LocalModels("cpu", budget=int(1.5 * size))
    original = LocalModels._load

    def slowly(self, *arguments, **options):
        resident = original(self, *arguments, **options)
        time.sleep(0.5)  # a busy processor runs the threads that wait for room first
        return resident

    monkeypatch.setattr(LocalModels, "_load", slowly)
    threads = [threading.Thread(target=answer, args=(models, source)) for source in sources[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert models.loads == 2


def test_others_answer_while_a_model_is_loaded(sources, size, monkeypatch):
    models = LocalModels("cpu")
    answer(models, sources[0])
    load, begun, go_on = module.load_causal_lm, threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        begun.set()
        go_on.wait(20)
        return load(*arguments, **options)

    monkeypatch.setattr(module, "load_causal_lm", slowly)
    loading = threading.Thread(target=answer, args=(models, sources[1]))
    loading.start()
    begun.wait(10)
    assert answer(models, sources[0])
    assert loading.is_alive()
    go_on.set()
    loading.join(20)


def test_models_that_are_loaded_at_the_same_time_have_all_their_weights(sources):
    """While transformers loads a model it patches torch for all threads."""
    models, found = LocalModels("cpu"), {}

    def run(source):
        found[source] = answer(models, source)

    threads = [threading.Thread(target=run, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {source: answer(LocalModels("cpu"), source) for source in sources}


def test_a_load_that_fails_leaves_room_for_others(sources, size, tmp_path):
    broken = tiny_folder(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    models = LocalModels("cpu", budget=int(1.5 * size))
    with pytest.raises(ExpertFailedError):
        answer(models, Source(str(broken)))
    assert answer(models, sources[0])


def test_a_composite_with_room_for_one_of_its_experts_answers_as_one_with_room_for_all(base_folder, sources, size):
    experts = [Expert(f"e{index}", model=source.model) for index, source in enumerate(sources)]
    free = composite_of(base_folder, experts)
    bounded = composite_of(base_folder, experts, budget=int(2.5 * size), pinned=("e1",))
    for name in ("e0", "e2", "e1"):
        policy = type(free.policy)(allow=(name,))
        assert bounded.chat("hello", policy=policy, max_new_tokens=4).text == free.chat(
            "hello", policy=policy, max_new_tokens=4
        ).text  # fmt: skip
    assert len(bounded.local_models.resident) == 3  # the meta LLM's own base, the pinned model, and one more


def until(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends:
        time.sleep(0.02)
    return condition()


def test_a_model_is_loaded_ahead_only_where_those_that_are_used_leave_room_for_it(sources, size):
    models = LocalModels("cpu", budget=int(2.5 * size))
    with models.lease(sources[0]), models.lease(sources[1]):
        models.prefetch(sources[2])
        assert models.resident == sources[:2]
    with models.lease(sources[1]):
        models.prefetch(sources[2])
        assert models.resident == sources[1:3]
    models.prefetch(Source("/no/such/folder"))  # the request for this model reports the error
    assert models.loads == 3


def test_the_expert_that_a_chat_sticks_to_is_loaded_while_the_meta_llm_decides(base_folder, sources, monkeypatch):
    composite = composite_of(base_folder, [Expert("far", model=sources[1].model), Expert("self", "self")])
    decide = composite._decider._pass
    loaded = []

    def slow(*arguments):
        loaded.append(until(lambda: sources[1] in composite.local_models.resident))
        return decide(*arguments)

    monkeypatch.setattr(composite._decider, "_pass", slow)
    chat = [*CHAT, {"role": "assistant", "content": "hello", "name": "far"}, *CHAT]
    assert composite.chat(chat, policy=Policy(sticky=100), max_new_tokens=2).expert == "far"
    assert loaded == [True]


def test_an_evicted_model_leaves_memory_though_somebody_still_reads_its_answer(sources, size):
    models = LocalModels("cpu", budget=int(1.5 * size))
    stream = BackgroundLoop.iterate(LocalBackend(models, sources[0]).stream(CHAT, Generation(8)))
    next(stream)
    assert until(lambda: not any(resident.users for resident in models._residents.values()))
    model = weakref.ref(models._residents[sources[0]].model)
    answer(models, sources[1])
    gc.collect()
    assert model() is None
    assert "".join(piece.text for piece in stream)


def test_a_model_whose_size_was_not_known_before_makes_the_others_go_or_is_an_expert_that_failed(
    sources, size, monkeypatch
):
    monkeypatch.setattr(module, "_size_on_disk", lambda *_: 0)  # as for a model on the hub
    models = LocalModels("cpu", budget=int(1.5 * size))
    for source in sources[:3]:
        answer(models, source)
        assert models.taken <= 1.5 * size
    with pytest.raises(ExpertFailedError, match="GiB for local experts"):
        answer(LocalModels("cpu", budget=size // 2), sources[0])


def test_who_does_not_want_a_model_any_more_has_nothing_loaded(sources, size):
    models = LocalModels("cpu", budget=int(1.5 * size))
    given_up, told = threading.Event(), []

    def wait():
        with pytest.raises(ExpertFailedError, match="cancelled before the model was loaded") as error:
            models.acquire(sources[1], given_up)
        told.append(error)

    with models.lease(sources[0]):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        given_up.set()
        waiting.join(5)
    assert told
    assert models.loads == 1


def test_batches_end_where_answers_do_though_the_tokenizer_has_nothing_to_pad_with(sources):
    chats = [[{"role": "user", "content": f"question {number} of {number * 7}"}] for number in range(24)]
    backend = LocalBackend(LocalModels("cpu"), sources[0])
    with backend.models.lease(sources[0]) as resident:
        resident.tokenizer.pad_token = None
        # A random model rarely generates the real end token, so fifteen tokens end an answer here.
        resident.model.generation_config.eos_token_id = [*range(100, 115)]
    found = backend.complete(chats, Generation(12))
    single = [BackgroundLoop.iterate(backend.stream(chat, Generation(12))) for chat in chats]
    single = [list(pieces) for pieces in single]
    assert ["".join(piece.text for piece in pieces) for pieces in single] == [answer.text for answer in found]
    assert [pieces[-1].finish for pieces in single] == [answer.finish for answer in found]
    assert [pieces[-1].usage for pieces in single] == [answer.usage for answer in found]
    assert {answer.finish for answer in found} == {"stop", "length"}


def test_a_long_conversation_takes_nothing_of_the_answers_that_are_batched_with_it(sources):
    chats = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "word " * 97}]]
    backend = LocalBackend(LocalModels("cpu"), sources[0])
    together = backend.complete(chats, Generation(50))
    alone = [backend.complete([chat], Generation(50))[0] for chat in chats]
    assert together == alone
    assert alone[0].usage[1] == 50
    assert 0 < alone[1].usage[1] < 50  # limited by the model's positions


def test_in_batches_too_a_stop_text_ends_the_work(sources):
    """Tokens after a stop text are neither generated nor counted, as in a chat."""
    chats = [[{"role": "user", "content": f"question {number} of {number * 7}"}] for number in range(8)]
    backend = LocalBackend(LocalModels("cpu"), sources[0])
    plain = backend.complete(chats, Generation(40))
    stop = plain[0].text[3:5]
    found = backend.complete(chats, Generation(40, stop=("", stop)))
    for before, after in zip(plain, found, strict=True):
        assert before.text.startswith(after.text)
        assert (stop in after.text, after.finish) in ((True, "stop"), (False, before.finish))
        assert stop in after.text or after == before
    assert found[0].usage[1] < 20 < plain[0].usage[1]


@pytest.mark.parametrize("wrong", [{"dtype": "float23"}, {"quantization": "int3"}])
def test_a_type_that_does_not_exist_is_told_before_anything_is_loaded(wrong):
    with pytest.raises(ExpertokenError, match="float23|int3"):
        LocalModels("cpu", **wrong)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_experts_answer_and_take_less(sources, quantization):
    models, plain = LocalModels("cpu", quantization=quantization, budget=2**30), LocalModels("cpu", budget=2**30)
    assert answer(models, sources[0])
    assert answer(plain, sources[0])
    assert models.taken < plain.taken


@pytest.mark.parametrize("temperature", [1e-45, 1e-4])
def test_a_temperature_next_to_zero_is_greedy_and_no_failure(sources, temperature):
    """Logits divided by such a temperature are infinite, and sampling from them would fail."""
    backend = LocalBackend(LocalModels("cpu"), sources[0])
    greedy, found = (
        "".join(piece.text for piece in BackgroundLoop.iterate(backend.stream(CHAT, Generation(8, value, seed=1))))
        for value in (0.0, temperature)
    )
    assert found == greedy


def test_a_loading_is_waited_for_however_long_it_takes(sources, monkeypatch):
    load = module.load_causal_lm

    def slow(*arguments, **options):
        time.sleep(2)
        return load(*arguments, **options)

    monkeypatch.setattr(module, "_LONGEST", 0.2)
    monkeypatch.setattr(module, "load_causal_lm", slow)
    models = LocalModels("cpu")
    with ThreadPoolExecutor(3) as threads:
        held = [threads.submit(models.acquire, sources[0]) for _ in range(3)]
        assert len({id(future.result()) for future in held}) == 1


def test_while_one_expert_answers_its_part_of_a_file_the_next_one_is_loaded(base_folder, sources, size, monkeypatch):
    names = ["a", "b", "c"]
    experts = [Expert(name, model=source.model) for name, source in zip(names, sources[1:], strict=True)]
    composite = composite_of(base_folder, experts, budget=int(2.5 * size))
    composite.meta.rows = torch.randn(len(composite.pool.names), 32, generator=torch.Generator().manual_seed(0))
    prompts = [f"question {number} of {number * 7}" for number in range(40)]
    assert {dispatch.expert for dispatch in composite.route(prompts)} == set(names)
    complete, ahead = LocalBackend.complete, []

    def slow(backend, *arguments, **options):
        following = names.index(next(e.name for e in experts if e.model == backend.source.model)) + 1
        ahead.append(following == 3 or until(lambda: sources[1 + following] in composite.local_models.resident))
        return complete(backend, *arguments, **options)

    monkeypatch.setattr(LocalBackend, "complete", slow)
    monkeypatch.setattr(batch, "_BATCH", 4)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = batch.answer_all(composite, chats, Generation(2))
    assert all(answer["expert"] == answer["chosen"] for answer in answers)
    assert len(ahead) > 3
    assert all(ahead)
    assert composite.local_models.loads == 3

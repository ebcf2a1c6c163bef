import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments

from expertoken.data_prep.images import with_pictures
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision, supervision_of
from expertoken.examples.pictures.draw import KINDS, draw_pictures
from expertoken.modeling.composite import (
    ADAPTER_WEIGHTS,
    ROWS_FILE,
    Composite,
    Manifest,
    describe_base,
    load_composite,
    read_manifest,
    write_rows,
)
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.tests.seeing import seeing_folder
from expertoken.tests.tiny import ARCHITECTURES, tiny_folder
from expertoken.tests.train.launching import assert_same, trained
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.checkpoints import last_complete_checkpoint
from expertoken.train.config import parse_arguments
from expertoken.train.plugin import add_expert
from expertoken.train.run import train, train_composite

pytestmark = pytest.mark.usefixtures("checked_at_once")

STEPS = {"max_steps": 8, "save_steps": 4, "eval_steps": 4, "save_strategy": "steps", "eval_strategy": "steps"}


@pytest.fixture
def supervision(tmp_path, results, pool):
    build_supervision(results, pool).save(tmp_path / "supervision")
    return tmp_path / "supervision"


def arguments(folder, **more):
    given = STEPS | {"learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "weight_decay": 0.1} | more
    return TrainingArguments(output_dir=str(folder), **given)


def options(base, data, **more):
    # With one strength. Choosing among nine would take most of a short run's time, and test_tokens.py tests that.
    given = {"method": "lora", "verify": False, "lora_r": 4, "l2": [0.1]} | more
    return ExpertokenArguments(meta=str(base), data=str(data), **given)


@pytest.mark.parametrize("objective", ["cross_entropy", "correctness"])
def test_lora_and_rows_are_trained_saved_and_loaded(tmp_path, base_folder, supervision, objective):
    folder = train(options(base_folder, supervision, objective=objective), arguments(tmp_path / "c"))
    manifest = json.loads((folder / "expertoken.json").read_text())
    assert manifest["training"]["steps"] == 8
    assert 0 <= manifest["training"]["validation_score"] <= 1
    composite = load_composite(folder, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    wrapped = PeftModel.from_pretrained(plain, folder).eval()  # PEFT reads the folder as a plain adapter
    ids = composite.meta.encode("Compute 1 plus 3.")
    with torch.no_grad():
        logits = wrapped(torch.tensor([list(ids)])).logits[0, -1].logsumexp(-1)
    ours = composite.meta.probe([ids])
    torch.testing.assert_close(ours[0, -1], logits, rtol=1e-4, atol=1e-4)
    untouched = composite.meta.plain.state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in AutoModelForCausalLM.from_pretrained(base_folder).state_dict().items())  # fmt: skip  # noqa: E501


def test_a_fresh_process_loads_a_lora_composite_to_the_same_logits(tmp_path, base_folder, supervision):
    train(options(base_folder, supervision, verify=True), arguments(tmp_path / "c", max_steps=4))


def test_training_from_descriptions_learns(tmp_path, base_folder, supervision):
    cold = options(base_folder, supervision, warm_start=False)
    folder = train(cold, arguments(tmp_path / "c", max_steps=60, save_steps=20, eval_steps=20))
    assert json.loads((folder / "expertoken.json").read_text())["training"]["validation_score"] > 0.6


def test_resuming_equals_the_straight_run(tmp_path, base_folder, supervision):
    straight = train(options(base_folder, supervision), arguments(tmp_path / "a", seed=3))
    rows = load_composite(straight, device="cpu").meta.rows
    again = options(base_folder, supervision, resume=str(straight / "checkpoint-4"))
    resumed = train(again, arguments(tmp_path / "b", seed=3))
    assert torch.equal(load_composite(resumed, device="cpu").meta.rows, rows)
    for name in ("adapter_model.safetensors", ROWS_FILE):
        one, two = ((folder / "checkpoint-8" / name).read_bytes() for folder in (straight, resumed))
        assert one == two


def test_a_resume_by_name_does_not_adopt_later_checkpoints_of_another_run(tmp_path, base_folder, supervision):
    """A later resume with auto would continue from those."""
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c"))
    by_name = options(base_folder, supervision, resume=str(folder / "checkpoint-4"))
    with pytest.raises(
        ExpertokenError, match=r"holds later checkpoints of a run with other arguments \(checkpoint-8\)"
    ):
        train(by_name, arguments(folder, learning_rate=5e-3))


@pytest.mark.parametrize("change", [{"adam_beta2": 0.9}, {"bf16": True}, {"data_seed": 4}])
def test_auto_resume_tells_every_argument_that_the_result_depends_on(tmp_path, base_folder, supervision, change):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4))
    with pytest.raises(ExpertokenError, match=next(iter(change))):
        train(options(base_folder, supervision), arguments(folder, max_steps=4, **change))


def test_auto_resume_refuses_checkpoints_of_another_run(tmp_path, base_folder, supervision):
    train(options(base_folder, supervision), arguments(tmp_path / "c"))
    with pytest.raises(ExpertokenError, match="holds checkpoints of a run with other arguments"):
        train(options(base_folder, supervision, lora_r=2), arguments(tmp_path / "c"))
    train(options(base_folder, supervision, lora_r=2, resume="never"), arguments(tmp_path / "c", max_steps=4))
    # The old run's checkpoint-8 is removed, because a later resume must not continue from it.
    assert last_complete_checkpoint(tmp_path / "c").name == "checkpoint-4"


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"cut'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        for name in ("adapter_model.safetensors", ROWS_FILE):
            write_rows(torch.zeros(1, 2), ["x"], tmp_path / f"checkpoint-{step}" / name)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"cut short")
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-5"


def test_a_damaged_checkpoint_is_one_line(tmp_path, base_folder, supervision):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "a", max_steps=4))
    (folder / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"cut short")
    again = options(base_folder, supervision, resume=str(folder / "checkpoint-4"))
    with pytest.raises(ExpertokenError, match="adapter_model.safetensors: missing, damaged or of another model"):
        train(again, arguments(tmp_path / "b"))


def test_the_loss_of_a_large_batch_is_the_mean_of_its_parts(tmp_path, base_folder, supervision):
    """One process, two processes and accumulated batches rely on this. The queries have unequal weights here."""
    from expertoken.data_prep.supervision import Supervision
    from expertoken.train.lora import DispatchTrainer, Examples, wrap_with_lora

    meta = MetaLLM.from_pretrained(str(base_folder), 3, device="cpu")
    wrap_with_lora(meta, options(base_folder, supervision, lora_dropout=0.0))
    loaded = Supervision.load(supervision)
    weights = [0.0, 0.2, 1.0] * 4
    side = loaded.side("train").select(range(12))
    loaded.data["train"] = side.map(lambda _, i: {"weight": weights[i]}, with_indices=True)
    examples = list(Examples(loaded, "train", loaded.queries("train", meta), loaded.arrays("train"), learn=True))
    assert len(examples) == 8
    assert sum(example["weight"] for example in examples) == pytest.approx(8)
    quiet = arguments(tmp_path, eval_strategy="no", save_strategy="no")
    composite = Composite(meta, loaded.pool, Manifest(describe_base(meta), ["math", "law"]))
    trainer = DispatchTrainer(composite, "cross_entropy", rows_learning_rate=None, args=quiet)
    whole, *parts = (trainer.compute_loss(meta.model, trainer._collate(e)).item() for e in (examples, examples[:4], examples[4:]))  # fmt: skip  # noqa: E501
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_queries_at_fault(tmp_path, base_folder, supervision, monkeypatch):
    from expertoken.data_prep.supervision import Supervision
    from expertoken.train import lora

    chosen = next(row["id"] for row in Supervision.load(supervision).side("train") if row["weight"])

    class Broken(lora.Examples):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return example | {"scores": example["scores"] * np.nan} if self.query(example["row"]) == chosen else example

    def objective(logits, targets, scores, weights):
        broken = scores.isnan().all(1, keepdim=True)
        logits.masked_fill_(broken, float("nan"))
        return (logits * targets).sum(), weights.sum()

    monkeypatch.setattr(lora, "Examples", Broken)
    monkeypatch.setitem(lora.OBJECTIVES, "cross_entropy", objective)
    cold = options(base_folder, supervision, warm_start=False, objective="cross_entropy")
    with pytest.raises(
        FloatingPointError, match=rf"loss is nan at step \d+, with queries '{chosen}' \(the others of the batch"
    ):
        train(cold, arguments(tmp_path / "c", max_steps=100, save_steps=100, num_train_epochs=3))


def test_out_of_memory_says_what_to_change(tmp_path, base_folder, supervision, monkeypatch):
    from expertoken.train import lora

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(lora, "dispatch_forward", full)
    cold = options(base_folder, supervision, warm_start=False)
    with pytest.raises(
        ExpertokenError, match=r"out of memory at step 0 with 8 queries per batch. Try --per_device_train_batch"
    ) as e:
        train(cold, arguments(tmp_path / "c", gradient_accumulation_steps=2))
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 (the same batches)" in str(e.value)


def test_method_tokens_reports_its_path_to_any_tracker(tmp_path, base_folder, supervision, monkeypatch, caplog):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    seen = []

    class Notebook(GeneralTracker):
        name, requires_logging_directory = "wandb", False

        def __init__(self, run_name):
            super().__init__()
            seen.append(run_name)

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            seen.append(values)

        def log(self, values, step):
            seen.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    given = arguments(tmp_path / "c", report_to=["wandb", "tensorboard"])
    given.report_to.append("codecarbon")
    train(options(base_folder, supervision, method="tokens", l2=[1.0, 0.1]), given)
    assert seen[0] == "expertoken"
    assert [step for step, _ in seen[2:]] == [0, 1]
    assert {"tokens/l2", "tokens/validation_score"} <= set(seen[2][1])
    assert list((tmp_path / "c" / "runs").glob("events.*"))
    assert "--report_to codecarbon: not known to method tokens" in caplog.text


def test_every_checkpoint_is_a_composite(tmp_path, base_folder, supervision):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c"))
    for step in (4, 8):
        composite = load_composite(folder / f"checkpoint-{step}", device="cpu")
        assert composite.manifest.training["steps"] == step
        assert composite.pool.names == ["math", "law", "self"]
        assert composite.meta.adapted


def test_a_run_killed_behind_its_last_step_makes_no_further_one(tmp_path, base_folder, supervision):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c"))
    before = trained(folder)
    (folder / "expertoken.json").unlink()  # as if killed before the composite was written
    train(options(base_folder, supervision), arguments(tmp_path / "c"))
    assert sorted(entry.name for entry in folder.glob("checkpoint-*"))[:2] == ["checkpoint-4", "checkpoint-8"]
    assert all(torch.equal(value, before[name]) for name, value in trained(folder).items())
    assert json.loads((folder / "expertoken.json").read_text())["training"]["steps"] == 8


def test_merged_weights_give_the_same_logits(tmp_path, base_folder, supervision):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c"))
    apart, merged = (load_composite(folder, device="cpu").meta for _ in range(2))
    merged.model = merged.model.merge_and_unload()
    assert not merged.adapted
    sequences = [apart.encode(text) for text in ("Compute 1 plus 3.", "hello")]
    one, two = (meta.candidate_logits(sequences) for meta in (apart, merged))
    assert (one - apart.candidate_logits(sequences[:1])).abs().max() > 0
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_an_expert_is_plugged_into_a_lora_composite_and_what_is_trained_stays(
    tmp_path, base_folder, supervision, results
):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c"))
    before = trained(folder)
    queries = results.queries.assign(id=[f"n{i}" for i in range(120)], prompt=[f"Draw {i} now" for i in range(120)])
    drawn = BenchmarkResults(queries.assign(benchmark="pictures"), ["painter"], np.ones((120, 1)))
    add_expert(folder, Expert("painter", model=str(base_folder)), drawn, l2=[0.1], verify=True)
    after = trained(folder)
    assert torch.equal(after.pop("expert_rows")[[0, 1, 3]], before.pop("expert_rows"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    composite = load_composite(folder, device="cpu")
    logits = composite.meta.candidate_logits([composite.meta.encode("Draw 7 now")])
    assert composite.pool.names[int(logits.argmax())] == "painter"


def test_gradient_checkpointing_and_eager_attention_change_nothing(tmp_path, base_folder, supervision):
    plain = train(options(base_folder, supervision), arguments(tmp_path / "a", seed=3, max_steps=4))
    other = options(base_folder, supervision, attn_implementation="eager")
    folder = train(other, arguments(tmp_path / "b", seed=3, max_steps=4, gradient_checkpointing=True))
    assert_same(plain, folder, rtol=1e-3)


def test_mixed_precision_is_for_training_alone(tmp_path, base_folder, supervision):
    """A float32 model trained with --bf16 decides in float32. A fresh process computes the same logits."""
    train(options(base_folder, supervision, verify=True), arguments(tmp_path / "c", max_steps=4, bf16=True))


def test_the_same_batches_cut_otherwise_go_on_and_another_batch_is_refused(tmp_path, base_folder, supervision):
    train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4, **cut))
    with pytest.raises(ExpertokenError, match=r"other arguments or data \(batch 8 then, 4 now\)"):
        train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4, per_device_train_batch_size=4))


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ("llama-tied", "cohere-scaled")]
)
def test_lora_trains_heads_and_backbones_of_many_kinds(tmp_path, supervision, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    folder = train(options(base, supervision, verify=True), arguments(tmp_path / "c", max_steps=4))
    assert trained(folder)["expert_rows"].shape == (3, 32)


def test_only_what_texts_pass_is_adapted(tmp_path, supervision):
    """Adapters of a vision tower would get no gradients, and training in several processes would fail."""
    base = seeing_folder(tmp_path / "base", "gemma3")
    folder = train(options(base, supervision, verify=True, warm_start=False), arguments(tmp_path / "c", max_steps=4))
    adapted = [name for name in trained(folder) if "lora_B" in name]
    assert adapted
    assert all("vision" not in name and "projector" not in name for name in adapted)
    assert all(value.abs().max() > 0 for name, value in trained(folder).items() if name in adapted)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_tokens_are_learnt_on_a_meta_llm_in_few_bits(tmp_path, base_folder, supervision, bits):
    pytest.importorskip("bitsandbytes")
    given = options(base_folder, supervision, method="tokens", quantization=bits, verify=True)
    folder = train(given, arguments(tmp_path / "c"))
    assert load_composite(folder, device="cpu").meta.quantization == bits
    with pytest.raises(ExpertokenError, match="--quantization nf4: not supported by method lora"):
        train(options(base_folder, supervision, quantization="nf4"), arguments(tmp_path / "d"))


def test_qlora_trains_on_four_bits_and_the_composite_is_loaded_so_again(tmp_path, base_folder, supervision):
    pytest.importorskip("bitsandbytes")
    folder = train(
        options(base_folder, supervision, method="qlora", verify=True, warm_start=False), arguments(tmp_path / "c")
    )
    assert json.loads((folder / "expertoken.json").read_text())["base"]["quantization"] == "nf4"
    composite = load_composite(folder, device="cpu")
    layers = [type(module).__name__ for module in composite.meta.plain.modules()]
    assert "Linear4bit" in layers
    assert type(composite.meta.head).__name__ == "ExpertHead"
    assert composite.meta.head.weight.dtype == torch.float32  # the head stays as it is
    assert composite.meta.plain.get_output_embeddings().weight is composite.meta.head.weight
    before = composite.meta.candidate_logits([composite.meta.encode("Compute 1 plus 3.")])
    state = composite.meta.adapter_state()
    assert all(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name)
    assert torch.isfinite(before).all()


def test_rows_have_no_weight_decay(tmp_path, base_folder, supervision, monkeypatch):
    from expertoken.train import lora

    seen = []
    create = lora.DispatchTrainer.create_optimizer

    def spy(self, *a, **k):
        optimizer = create(self, *a, **k)
        seen.append([(g["weight_decay"], [p.shape for p in g["params"]]) for g in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr(lora.DispatchTrainer, "create_optimizer", spy)
    train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4))
    adapters, rows = seen[0]
    assert adapters[0] == 0.1
    assert rows == (0.0, [torch.Size([3, 32])])


def heed_ctrl_c():
    """Restore Ctrl-C, because a shell makes its background processes ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_ctrl_c_in_training_ends_in_one_line_and_the_same_command_goes_on(tmp_path, base_folder, supervision):
    command = [sys.executable, "-m", "expertoken.train", "lora", "--meta", base_folder, "--data", supervision,
               "--out", tmp_path / "c", "--max_steps", "3000", "--save_steps", "10",
               "--report_to", "none", "--verify", "false", "--num_train_epochs", "100"]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    deadline = time.monotonic() + 120
    while not last_complete_checkpoint(tmp_path / "c") if (tmp_path / "c").exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Interrupted. Finished work is kept" in shown
    assert "Traceback" not in shown
    deadline = time.monotonic() + 120
    stopped = int(last_complete_checkpoint(tmp_path / "c").name.removeprefix("checkpoint-"))
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    while int(last_complete_checkpoint(tmp_path / "c").name.removeprefix("checkpoint-")) <= stopped:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert f"resuming from {tmp_path / 'c' / 'checkpoint-'}" in process.communicate(timeout=60)[1]


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_are_refused():
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    code = "from expertoken.train.processes import check_world\ncheck_world(1)"  # like a plain launcher on a CPU
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected 2 processes in one group, as launched, found 1" in done.stderr


def test_no_path_of_this_machine_is_in_a_lora_composite(tmp_path, base_folder, supervision):
    folder = train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4))
    for file in folder.iterdir():
        if file.suffix in (".json", ".yaml", ".md"):
            assert str(tmp_path) not in file.read_text(), file.name
            assert str(base_folder) not in file.read_text(), file.name


@pytest.mark.parametrize("method", ["tokens", "lora"])
def test_every_query_is_encoded_once_per_run(tmp_path, base_folder, supervision, method, monkeypatch):
    encode, seen = MetaLLM.encode, []

    def counted(self, conversation):
        if not isinstance(conversation, str):  # probes are texts
            seen.append(json.dumps(conversation))
        return encode(self, conversation)

    monkeypatch.setattr(MetaLLM, "encode", counted)
    train(options(base_folder, supervision, method=method, warm_start=True), arguments(tmp_path / "c"))
    assert len(seen) == len(set(seen)) > 0


def test_a_supervision_in_memory_is_kept_inside_the_composite(tmp_path, base_folder, results, pool):
    folder = train_composite(str(base_folder), build_supervision(results, pool), tmp_path / "c", verify=False)
    kept = supervision_of(read_manifest(folder), folder)
    assert kept.info.fingerprint == build_supervision(results, pool).info.fingerprint
    assert [entry.name for entry in (folder / "supervision").iterdir()] == [kept.info.fingerprint]
    assert not list(folder.glob("runs/events*"))


def test_a_run_goes_on_in_a_folder_that_was_moved(tmp_path, base_folder, supervision):
    """The run of a checkpoint does not depend on its path."""
    argv = ["lora", "--meta", str(base_folder), "--data", str(supervision), "--report_to", "none", "--verify", "false",
            "--save_strategy", "steps", "--save_steps", "4", "--learning_rate", "1e-2"]  # fmt: skip
    train(*parse_arguments([*argv, "--out", str(tmp_path / "one"), "--max_steps", "8"]))
    (tmp_path / "one").rename(tmp_path / "two")
    train(*parse_arguments([*argv, "--out", str(tmp_path / "two"), "--max_steps", "8"]))
    assert read_manifest(tmp_path / "two").training["seconds"] == 0.0  # no step was left


@pytest.mark.parametrize("rate", ["1e-2", "1e-9"], ids=["a later checkpoint is the best", "the start is"])
def test_a_finished_run_is_not_trained_again_whichever_checkpoint_is_left(tmp_path, base_folder, supervision, rate):
    argv = ["lora", "--meta", str(base_folder), "--data", str(supervision), "--out", str(tmp_path / "c"),
            "--report_to", "none", "--verify", "false", "--max_steps", "8", "--save_steps", "2",
            "--learning_rate", rate, "--rows_learning_rate", rate, "--save_total_limit", "1"]  # fmt: skip
    train(*parse_arguments(argv))
    first = {name: (tmp_path / "c" / name).read_bytes() for name in ("expert_tokens.safetensors", ADAPTER_WEIGHTS)}
    assert read_manifest(tmp_path / "c").training["seconds"] > 0
    train(*parse_arguments(argv))
    assert read_manifest(tmp_path / "c").training["seconds"] == 0.0
    assert {name: (tmp_path / "c" / name).read_bytes() for name in first} == first
    train(*parse_arguments([*argv, "--seed", "7", "--resume", "never"]))  # another seed is another run
    assert read_manifest(tmp_path / "c").training["seconds"] > 0


def test_a_short_run_has_checkpoints_and_a_log_with_its_speed_by_itself(tmp_path, base_folder, supervision):
    argv = ["lora", "--meta", str(base_folder), "--data", str(supervision), "--out", str(tmp_path / "c"),
            "--report_to", "none", "--verify", "false", "--max_steps", "20"]  # fmt: skip
    train(*parse_arguments(argv))
    state = json.loads((last_complete_checkpoint(tmp_path / "c") / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 20
    assert all(entry["tokens_per_second"] > 0 for entry in logged)
    assert (
        len([entry for entry in state["log_history"] if "eval_score" in entry]) == 11
    )  # ten checkpoints and the start


def test_a_checkpoint_asks_no_hub(tmp_path, base_folder, supervision, monkeypatch):
    import peft.utils.save_and_load as saving

    def asked(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(saving, "check_file_exists_on_hf_hub", asked)
    train(options(base_folder, supervision), arguments(tmp_path / "c", max_steps=4))


def test_two_folders_for_one_run_are_refused(tmp_path, base_folder, supervision):
    with pytest.raises(ExpertokenError, match="'a' and the Trainer's output_dir .* differ"):
        train(options(base_folder, supervision, out="a"), arguments(tmp_path / "c"))


def test_lora_learns_from_pictures_what_texts_do_not_tell(tmp_path):
    """Only the decoder is adapted. The loaded checkpoint decides by the picture."""
    base = seeing_folder(tmp_path / "base", "llava")
    table = draw_pictures(tmp_path, count=6)
    pool = ExpertPool([Expert(kind, model=str(base), supports=("images",)) for kind in KINDS])
    results = with_pictures(read_results(table, "table"), tmp_path / "pictures")
    build_supervision(results, pool, test=0.25, validation=0.25).save(tmp_path / "s")
    given = options(base, tmp_path / "s", lora_r=8)
    folder = train(given, arguments(tmp_path / "c", max_steps=6))
    assert all("vision" not in name and "projector" not in name for name in trained(folder) if "lora" in name)
    meta = load_composite(folder, device="cpu").meta
    asked = Supervision.load(tmp_path / "s").queries("test", meta)
    assert all(query.media for query in asked)
    logits = meta.candidate_logits(asked)
    assert (
        len({tuple(row) for row in logits.mul(1e3).round().int().tolist()}) > 1
    )  # one question about different pictures

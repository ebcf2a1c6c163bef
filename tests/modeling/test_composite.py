import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from expertoken.modeling import composite as module
from expertoken.modeling.composite import (
    MANIFEST_FILE,
    ROWS_FILE,
    Composite,
    Manifest,
    describe_base,
    load_composite,
    probe_logits,
    read_manifest,
    write_rows,
)
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.files import atomic_folder, check_product, recover_folder
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.saving import save_composite
from expertoken.modeling.source import Source
from expertoken.tests.tiny import tiny_folder


@pytest.fixture
def composite(meta, pool):
    meta.rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    return Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "gemma2-softcap"])
def test_save_then_load_gives_the_same_logits(tmp_path, pool, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    meta = MetaLLM.from_pretrained(Source(str(base)), 3, device="cpu")
    meta.rows = torch.randn(3, 32)
    saved = Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"]))
    save_composite(saved, tmp_path / "composite", verify=False)
    loaded = load_composite(tmp_path / "composite", device="cpu")
    assert torch.equal(probe_logits(loaded), probe_logits(saved))
    assert loaded.pool.names == pool.names


def test_a_fresh_process_comes_to_the_same_logits(tmp_path, composite):
    save_composite(composite, tmp_path / "composite", verify=True)


def test_a_mismatch_after_saving_fails_loudly_and_replaces_nothing(tmp_path, composite, monkeypatch, checked_at_once):
    save_composite(composite, tmp_path / "composite", verify=False)
    before = contents(tmp_path / "composite")

    def wrong(rows, names, path):
        write_rows(rows + 1, names, path)

    monkeypatch.setattr(module, "write_rows", wrong)
    with pytest.raises(ExpertokenError, match="expected the trained model's logits in a fresh process, got others"):
        save_composite(composite, tmp_path / "composite", verify=True)
    assert contents(tmp_path / "composite") == before


def test_the_same_rows_always_give_the_same_bytes(tmp_path):
    rows = torch.randn(3, 8)
    for index in range(8):
        write_rows(rows, ["a", "b", "c"], tmp_path / str(index))
    assert len({(tmp_path / str(index)).read_bytes() for index in range(8)}) == 1


def test_a_full_disk_while_saving_leaves_the_old_folder(tmp_path, composite, monkeypatch):
    save_composite(composite, tmp_path / "composite", verify=False)
    before = contents(tmp_path / "composite")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(composite.meta.tokenizer, "save_pretrained", full)
    with pytest.raises(ExpertokenError, match="No space left on device.*Nothing was changed"):
        save_composite(composite, tmp_path / "composite")
    assert contents(tmp_path / "composite") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["composite"]


@pytest.mark.parametrize("moment", ["old aside", "new in place"])
def test_a_crash_between_the_two_renames_loses_nothing(tmp_path, moment):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("kept")
    (target / "file").write_text("old")
    target.rename(tmp_path / ".folder.old")
    if moment == "new in place":
        target.mkdir()
        (target / "file").write_text("new")
    recover_folder(target)
    assert (target / "file").read_text() == ("old" if moment == "old aside" else "new")
    assert (target / "runs" / "log").read_text() == "kept"
    assert not (tmp_path / ".folder.old").exists()


def test_who_reads_all_the_time_disturbs_no_save_and_always_finds_a_composite(tmp_path, composite):
    save_composite(composite, tmp_path / "c", verify=False)
    manifest = (tmp_path / "c" / MANIFEST_FILE).read_text()
    over, found = threading.Event(), []

    def read():
        while not over.is_set():
            try:
                found.append(read_manifest(tmp_path / "c").experts)
            except Exception as error:
                found.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(200):
            with atomic_folder(tmp_path / "c") as folder:
                (folder / MANIFEST_FILE).write_text(manifest)
    finally:
        over.set()
        for reader in readers:
            reader.join()
    assert len(found) > 200
    assert all(experts == ["math", "law"] for experts in found), next(e for e in found if e != ["math", "law"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c"]


def test_behind_a_symbolic_link_the_folder_it_leads_to_is_replaced(tmp_path, composite):
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "disk" / "c")
    for _ in range(2):  # first a new folder, then an existing one
        save_composite(composite, tmp_path / "c", verify=False)
        assert (tmp_path / "c").is_symlink()
        assert read_manifest(tmp_path / "c").experts == ["math", "law"]
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["c"]


def test_a_mount_point_is_refused_with_what_to_do(tmp_path, composite, monkeypatch):
    (tmp_path / "c").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == (tmp_path / "c").resolve())
    for write in (lambda: save_composite(composite, tmp_path / "c", verify=False),
                  lambda: check_product(tmp_path / "c", "supervision")):  # fmt: skip
        with pytest.raises(ExpertokenError, match="c: expected a folder .*, got a mount point.* such as .*c/new"):
            write()


def test_saving_again_drops_our_stale_files_and_keeps_subfolders_and_what_others_put_there(tmp_path):
    for name in ("adapter_config.json", "expertoken.json"):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
        (tmp_path / "folder" / "runs").mkdir(exist_ok=True)
        (tmp_path / "folder" / "notes.txt").write_text("mine")
    assert sorted(entry.name for entry in (tmp_path / "folder").iterdir()) == ["expertoken.json", "notes.txt", "runs"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / ROWS_FILE).write_bytes(b"\x10\x00garbage"), "expert_tokens.safetensors: missing or damaged"),
        (lambda f: (f / ROWS_FILE).unlink(), "expert_tokens.safetensors: missing or damaged"),
        (lambda f: (f / MANIFEST_FILE).unlink(), "expected a composite folder"),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), "expertoken.json: can't be read"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"format_version": 99}'), "expected format_version 2, got 99"),
        (lambda f: write_rows(torch.zeros(1, 32), ["math"], f / ROWS_FILE), "expected rows .*, got "),
        (
            lambda f: (f / "experts.yaml").write_text("experts: [{name: math}]"),
            "experts.yaml: experts.0..model: needed",
        ),
    ],
)
def test_a_damaged_folder_is_one_clear_line(tmp_path, composite, damage, message):
    save_composite(composite, tmp_path / "composite", verify=False)
    damage(tmp_path / "composite")
    with pytest.raises(ExpertokenError, match=message) as error:
        load_composite(tmp_path / "composite", device="cpu")
    assert "\n" not in str(error.value)


def test_another_base_model_is_refused(tmp_path, composite):
    save_composite(composite, tmp_path / "composite", verify=False)
    other = tiny_folder(tmp_path / "other", seed=5)
    manifest = json.loads((tmp_path / "composite" / MANIFEST_FILE).read_text())
    manifest["base"]["model"] = str(other)
    (tmp_path / "composite" / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ExpertokenError, match="expected the base model that it was trained on"):
        load_composite(tmp_path / "composite", device="cpu")


def test_a_damaged_base_is_one_clear_line(tmp_path):
    base = tiny_folder(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ExpertokenError, match="base: .*damaged|base: can't be loaded") as error:
        MetaLLM.from_pretrained(str(base), 1, device="cpu")
    assert "\n" not in str(error.value)


def test_a_missing_base_is_one_clear_line(tmp_path):
    with pytest.raises(ExpertokenError, match="got a path that does not exist"):
        MetaLLM.from_pretrained(str(tmp_path / "nowhere"), 1)


def test_a_copy_whose_base_stayed_behind_says_where_it_looked_and_what_to_do(tmp_path, composite):
    save_composite(composite, tmp_path / "composite", verify=False)
    copy = tmp_path / "far" / "away" / "copy"
    shutil.copytree(tmp_path / "composite", copy)
    base = json.loads((copy / MANIFEST_FILE).read_text())["base"]["model"]
    with pytest.raises(ExpertokenError) as error:
        load_composite(copy, device="cpu")
    told = f"{copy}: expected the base model at {(copy / base).resolve()}, which does not exist. Move it there, or"
    assert str(error.value) == f"{told} correct `base.model` in {copy / MANIFEST_FILE}"


def test_a_folder_can_not_switch_on_remote_code_by_itself(tmp_path, composite):
    save_composite(composite, tmp_path / "composite", verify=False)
    manifest = json.loads((tmp_path / "composite" / MANIFEST_FILE).read_text())
    manifest["base"]["trust_remote_code"] = True
    (tmp_path / "composite" / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ExpertokenError, match="Pass trust_remote_code=True"):
        load_composite(tmp_path / "composite", device="cpu")
    load_composite(tmp_path / "composite", device="cpu", trust_remote_code=True)


def test_no_path_of_this_machine_is_in_a_card(tmp_path, composite):
    save_composite(composite, tmp_path / "composite", verify=False)
    for name in ("README.md", "experts.yaml", MANIFEST_FILE):
        assert str(tmp_path.parent) not in (tmp_path / "composite" / name).read_text(), name


def test_a_file_limit_while_writing_rows_is_one_clear_line(tmp_path, composite, checked_at_once):
    """The kernel refuses the write, in a separate process."""
    import subprocess
    import sys

    save_composite(composite, tmp_path / "composite", verify=False)
    before = contents(tmp_path / "composite")
    code = (
        "import resource, signal; from expertoken.modeling.composite import load_composite; "
        "from expertoken.modeling.saving import save_composite\n"
        f"c = load_composite({str(tmp_path / 'composite')!r}, device='cpu')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"save_composite(c, {str(tmp_path / 'composite')!r}, verify=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ExpertokenError" in done.stderr.splitlines()[-1]
    assert "could not be written (File too large). Nothing was changed" in done.stderr
    assert contents(tmp_path / "composite") == before


def test_a_loaded_composite_can_be_saved_into_another_tree(tmp_path, composite, checked_at_once):
    composite.manifest.data = {"path": str(tmp_path / "supervision"), "fingerprint": "x", "sizes": {}}
    (tmp_path / "supervision").mkdir()
    save_composite(composite, tmp_path / "one" / "c", verify=False)
    loaded = load_composite(tmp_path / "one" / "c", device="cpu")
    save_composite(loaded, tmp_path / "elsewhere" / "deep" / "c", verify=True)
    again = load_composite(tmp_path / "elsewhere" / "deep" / "c", device="cpu")
    assert torch.equal(probe_logits(again), probe_logits(composite))
    assert again.manifest.data["path"] == str(tmp_path / "supervision")
    assert not Path(
        json.loads((tmp_path / "elsewhere/deep/c" / MANIFEST_FILE).read_text())["data"]["path"]
    ).is_absolute()


def test_a_composite_keeps_its_chat_template_when_the_bases_changes(tmp_path, pool):
    base = tiny_folder(tmp_path / "base")
    meta = MetaLLM.from_pretrained(Source(str(base)), 3, device="cpu")
    save_composite(Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"])), tmp_path / "c", verify=False)
    before = meta.encode("hello")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    assert MetaLLM.from_pretrained(Source(str(base)), 2, device="cpu").encode("hello") != before
    assert load_composite(tmp_path / "c", device="cpu").meta.encode("hello") == before


def test_a_base_that_does_not_fit_into_memory_says_what_to_change(tmp_path, base_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ExpertokenError, match="does not fit into the memory of cpu. Try --dtype bfloat16"):
        MetaLLM.from_pretrained(Source(str(base_folder)), 1, device="cpu")

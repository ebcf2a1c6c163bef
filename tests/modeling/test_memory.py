import psutil
import pytest

from expertoken.modeling import memory

GIB = 2**30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Write the files of a control group: `group(folder, limit, used, reclaimable)`."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/job/step\n")

    def write(name, limit, used, reclaimable):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")

    return write


def machine():
    return psutil.virtual_memory().available


def test_without_a_limit_it_is_what_the_machine_can_give(group):
    group("job/step", "max", 5 * GIB, 0)
    assert memory.free_memory() == pytest.approx(machine(), rel=0.05)


def test_a_containers_limit_counts_and_its_file_cache_is_no_use(group):
    group("job/step", GIB, GIB // 2, GIB // 4)
    assert memory.free_memory() == GIB * 3 // 4


def test_the_limit_of_a_group_further_up_counts_too(group):
    group("job/step", "max", 0, 0)
    group("job", GIB // 2, GIB // 4, 0)
    assert memory.free_memory() == GIB // 4


def test_the_older_kind_of_control_groups_counts(tmp_path, group):
    (tmp_path / "membership").write_text("5:cpu:/x\n4:memory:/job\n")
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(GIB))
    (folder / "memory.usage_in_bytes").write_text(str(GIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {GIB // 8}\n")
    assert memory.free_memory() == GIB // 8

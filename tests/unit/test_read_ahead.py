"""What is read of a model's folder before anybody needs it."""

from __future__ import annotations

from pathlib import Path

from megatron_srpo.run.read_ahead import read_ahead


def bytes_read(folder: Path) -> int:
    """Bytes that this process read while the folder was read ahead."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = so_far()
    for thread in read_ahead(str(folder)):
        thread.join()
    return so_far() - before


def test_all_weights_are_read_once_and_nothing_else(tmp_path):
    sizes = {f"model-{number}.safetensors": 2_000_000 + number for number in range(6)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "optimizer.bin").write_bytes(b"x" * 50_000_000)
    (tmp_path / "damaged.safetensors").mkdir()
    assert sum(sizes.values()) <= bytes_read(tmp_path) < sum(sizes.values()) + 1_000_000  # and what psutil reads


def test_what_would_not_stay_in_memory_is_not_read(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**42)  # 4 TiB of holes
    assert read_ahead(str(tmp_path)) == []


def test_one_rank_of_a_node_reads(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_ahead(str(tmp_path)) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert len(read_ahead(str(tmp_path))) > 1


def test_a_folder_that_is_not_there_is_left_to_those_who_need_it(tmp_path):
    assert bytes_read(tmp_path / "nothing") < 1_000_000

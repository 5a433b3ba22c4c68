"""A dataset is opened as it was prepared, or refused in one line."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from splits import DOCS, write_split

from robopoet.errors import DataError
from robopoet.text import dataset
from robopoet.text.dataset import bin_sha256, open_split
from robopoet.text.windows import TrainWindows

CPU = torch.device("cpu")
T = 8


def test_a_missing_bin_names_it_and_what_to_run(tmp_path):
    meta = write_split(tmp_path, DOCS)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin: not found.*prepare\.py"):
        open_split(tmp_path, "train", meta, T, CPU)


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_a_bin_of_another_size_than_meta_says_is_refused(tmp_path, change):
    meta, path = write_split(tmp_path, DOCS), tmp_path / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(DataError, match=rf"train\.bin: is {len(content) + change} bytes.*{len(content)}"):
        open_split(tmp_path, "train", meta, T, CPU)


def test_a_split_shorter_than_a_window_and_its_target_is_refused(tmp_path):
    for n in (0, 1, T):
        with pytest.raises(DataError, match=rf"train\.bin: has {n} tokens.* {T + 1}"):
            open_split(tmp_path, "train", write_split(tmp_path, [("alice", n)]), T, CPU)
    split = open_split(tmp_path, "train", write_split(tmp_path, [("alice", T + 1)]), T, CPU)
    assert TrainWindows(split, T, 1, 0.0).rows(0, 5)[0].tolist() == [0] * 5


@pytest.mark.parametrize("hashed_bytes", [2**28, 100])
@pytest.mark.parametrize("place", [0, 1, 201, 405])
def test_an_altered_bin_is_refused(tmp_path, monkeypatch, hashed_bytes, place):
    """Of a large bin only some blocks are hashed, the first and the last among them."""
    monkeypatch.setattr(dataset, "HASHED_BYTES", hashed_bytes)
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 20)
    meta, path = write_split(tmp_path, DOCS), tmp_path / "train.bin"
    content = bytearray(path.read_bytes())
    assert len(content) == 406
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.bin: its SHA-256 does not match meta.*prepare\.py"):
        open_split(tmp_path, "train", meta, T, CPU)


def test_a_bins_hash_covers_all_bytes_or_if_large_blocks_from_end_to_end(tmp_path, monkeypatch):
    path = tmp_path / "some.bin"
    path.write_bytes(content := os.urandom(1001))
    assert bin_sha256(path) == hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(dataset, "HASHED_BYTES", 300)
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 100)
    assert bin_sha256(path) == hashlib.sha256(content[:100] + content[450:550] + content[901:]).hexdigest()


def test_a_bin_that_is_no_regular_file_is_refused(tmp_path):
    meta = write_split(tmp_path, DOCS)
    (tmp_path / "train.bin").unlink()
    os.mkfifo(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: is not a regular file"):
        open_split(tmp_path, "train", meta, T, CPU)


def test_memory_stays_bounded_over_ten_thousand_batches_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ON_DEVICE_BYTES", 0)
    n = 2_000_000
    meta = write_split(tmp_path, [("alice", n)])
    windows = TrainWindows(open_split(tmp_path, "train", meta, 64, CPU), 64, 1, 0.5)

    def own_mb() -> float:  # pages of the file itself belong to the system
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    for step in range(10_000):
        windows.batch(4 * step, 4, CPU)
        if step == 1000:
            before = own_mb()
    assert own_mb() - before < 10

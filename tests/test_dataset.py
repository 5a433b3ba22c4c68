"""A dataset is opened as it was prepared, or refused in one line."""

import contextlib
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import at_step, records
from splits import DOCS, describe, write_split

import train
from robopoet.errors import DataError
from robopoet.text import dataset, windows
from robopoet.text.dataset import Bin, Meta, Span
from robopoet.text.windows import Split, TrainWindows, open_split
from train import TrainConfig

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


@pytest.mark.parametrize("on_device_bytes", [0, 2**30])
def test_an_evaluation_takes_a_split_shorter_than_a_window(tmp_path, monkeypatch, on_device_bytes):
    monkeypatch.setattr(windows, "ON_DEVICE_BYTES", on_device_bytes)
    with pytest.raises(DataError, match=r"val\.bin: has 1 tokens.* 2; add text$"):
        open_split(tmp_path, "val", write_split(tmp_path, [("alice", 1)], name="val"), T, CPU)
    split = open_split(tmp_path, "val", write_split(tmp_path, [("alice", 3)], name="val"), T, CPU)
    (batch,) = windows.eval_batches(split, windows.EvalPlan(T, 2), CPU)
    _, second, third = np.fromfile(split.path, dtype="<u2").tolist()
    assert batch.inputs[0, 1] == second and batch.targets.tolist() == [[second, third] + [-1] * (T - 2)]


@pytest.fixture(params=[2**30, 0], ids=["in memory", "on the disk"])
def on_disk(request, monkeypatch) -> bool:
    """Whether bins stay on the disk, as large ones do."""
    monkeypatch.setattr(windows, "ON_DEVICE_BYTES", request.param)
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 100)
    return not request.param


def gathered(split: Split) -> list[list[int]]:
    return split.gather(np.arange(195), T, CPU).tolist()


@pytest.mark.parametrize("place", [0, 1, 201, 405])
def test_an_altered_bin_is_refused(tmp_path, on_disk, place):
    meta, path = write_split(tmp_path, DOCS), tmp_path / "train.bin"
    content = bytearray(path.read_bytes())
    assert len(content) == 406
    content[place] ^= 1
    path.write_bytes(content)
    message = r"train\.bin: its SHA-256 does not match meta\.json; it was altered.*run prepare\.py --force"
    with pytest.raises(DataError, match=message):
        split = open_split(tmp_path, "train", meta, T, CPU)
        split.verified()
    if on_disk:
        with pytest.raises(DataError, match=message):
            gathered(split)


def many_documents(folder: Path, seed: int) -> Meta:
    """As write_split, of documents that share a span."""
    meta = write_split(folder, DOCS, seed=seed)
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[[39, 40, 140, 149, 152, 202]] = end = 60_000
    meta.splits["train"] = describe(folder / "train.bin", tokens, (Span("all", "alice", 0, 203),), end)
    return meta


def test_a_bin_that_is_replaced_while_it_is_open_is_read_on(tmp_path, on_disk):
    meta, other = many_documents(tmp_path, 1), tmp_path / "other"
    untouched = open_split(tmp_path, "train", meta, T, CPU)
    expected = gathered(untouched), np.stack(untouched.documents).tolist()
    assert expected[1][1] == [40, 41, 141, 150, 153, 203]
    split = open_split(tmp_path, "train", meta, T, CPU)
    other.mkdir()
    write_split(other, [("king", 120)], seed=2)
    os.replace(other / "train.bin", tmp_path / "train.bin")
    assert (gathered(split), np.stack(split.documents).tolist()) == expected
    split.verified()
    os.utime(tmp_path / "train.bin", ns=(1, 1))
    (tmp_path / "train.bin").unlink()
    assert gathered(split) == expected[0]


@pytest.mark.parametrize("change", ["overwritten", "shortened", "emptied", "lengthened", "touched"])
def test_a_bin_on_the_disk_that_is_written_to_while_it_is_open_is_refused_unless_it_is_the_same(
    tmp_path, monkeypatch, change
):
    monkeypatch.setattr(windows, "ON_DEVICE_BYTES", 0)
    meta, path = write_split(tmp_path, DOCS), tmp_path / "train.bin"
    split = open_split(tmp_path, "train", meta, T, CPU)
    split.verified()
    expected, content = gathered(split), path.read_bytes()
    with open(path, "r+b") as f:  # the same inode
        if change == "overwritten":
            f.write(content[::-1])
        f.truncate({"shortened": 300, "emptied": 0, "lengthened": 408}.get(change, 406))
    os.utime(path, ns=(10**18, 10**18))
    if change == "touched":
        assert gathered(split) == expected
        return
    for _ in range(2):
        with pytest.raises(DataError, match=r"train\.bin: its SHA-256 does not match meta\.json; it was altered"):
            gathered(split)
    if change in ("shortened", "emptied"):  # after it was looked at: a read that is too short, not a signal
        with pytest.raises(DataError, match=r"train\.bin: was cut off while it was read"):
            split.tokens.read(195, 203)


@pytest.mark.parametrize("change", ["replaced", "overwritten"])
def test_a_run_goes_on_with_the_bins_that_it_opened_or_ends_in_one_line(small, tmp_path, monkeypatch, change):
    monkeypatch.setattr(windows, "ON_DEVICE_BYTES", 0)
    shutil.copytree(small["dataset"], bins := tmp_path / "bins")
    losses, keys = {}, small | {"dataset": str(bins), "eval_interval": 6}

    def change_bins() -> None:
        for name in ("train", "val"):
            content = (bins / f"{name}.bin").read_bytes()[::-1]
            if change == "replaced":
                (bins / f"{name}.bin").unlink()
            (bins / f"{name}.bin").write_bytes(content)

    for out in ("untouched", "touched"):
        if out == "touched":
            at_step(monkeypatch, 3, change_bins)
        with (
            pytest.raises(DataError, match=r"train\.bin: its SHA")
            if (out, change) == ("touched", "overwritten")
            else contextlib.nullcontext()
        ):
            train.main(TrainConfig(**keys | {"out_dir": str(tmp_path / out)}))
        losses[out] = [record["loss"] for record in records(tmp_path / out)]
    n = 3 if change == "overwritten" else 7
    assert losses["touched"][:n] == losses["untouched"][:n] and len(losses["untouched"]) == 7


@pytest.mark.parametrize("altered", ["train", "val"])
def test_a_short_run_waits_until_its_bins_are_verified(small, tmp_path, monkeypatch, altered):
    monkeypatch.setattr(windows, "ON_DEVICE_BYTES", 0)
    shutil.copytree(small["dataset"], bins := tmp_path / "bins")
    content = (bins / f"{altered}.bin").read_bytes()
    (bins / f"{altered}.bin").write_bytes(content[:-2] + content[:2])
    verify, ended = Bin.verify, threading.Event()

    def slowly(self: Bin) -> None:
        if self.path.name == "train.bin":
            assert ended.wait(60)
        verify(self)

    monkeypatch.setattr(Bin, "verify", slowly)
    save = train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda *args: (save(*args), args[4].iter_num < 6 or ended.set())[0])
    with pytest.raises(DataError, match=rf"{altered}\.bin: its SHA-256 does not match"):
        train.main(TrainConfig(**small | {"dataset": str(bins)}))


def test_bins_are_read_where_a_file_has_one_position(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "ON_DEVICE_BYTES", 0)
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 1)
    meta = write_split(tmp_path, DOCS)
    expected = gathered(open_split(tmp_path, "train", meta, T, CPU))
    monkeypatch.delattr(os, "pread")
    split = open_split(tmp_path, "train", meta, T, CPU)
    assert all(gathered(split) == expected for _ in range(20))  # while it is verified
    split.verified()


def test_a_bin_that_is_no_regular_file_is_refused(tmp_path):
    meta = write_split(tmp_path, DOCS)
    (tmp_path / "train.bin").unlink()
    os.mkfifo(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: is not a regular file"):
        open_split(tmp_path, "train", meta, T, CPU)


def test_memory_stays_bounded_over_ten_thousand_batches_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("robopoet.text.windows.ON_DEVICE_BYTES", 0)
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

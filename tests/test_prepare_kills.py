"""prepare.py, killed or failing at any of its file operations: the folder is the earlier preparation or the new one."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from test_prepare import BPE, CHAR, contents, make_book, run

from robopoet.errors import DataError
from robopoet.text import dataset, windows

watchers: list[tuple[Path, Callable[[], None]]] = []


def watch(event: str, args: tuple) -> None:
    """Call the watchers of a folder before a file in it is made, opened to be written, renamed or removed."""
    changes = event in ("os.rename", "os.remove") or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
    for folder, act in tuple(watchers) if changes else ():
        if str(args[0]).startswith(f"{folder}/"):
            act()


@contextmanager
def watching(folder: Path, act: Callable[[], None]) -> Iterator[None]:
    watchers.append((folder, act))
    try:
        yield
    finally:
        watchers.clear()


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(watch)  # for good: Python removes none


def prepared(tmp_path: Path, out: str, seed: int, *argv: str) -> Path:
    (tmp_path / f"{seed}.txt").write_text(make_book(seed))
    run(f"--input={tmp_path}/{seed}.txt", f"--out={tmp_path / out}", *argv)
    return tmp_path / out


def seen(folder: Path) -> list:
    """What a training run that opens `folder` gets."""
    meta = dataset.read_meta(folder)
    cpu = torch.device("cpu")
    return [meta, [windows.open_split(folder, name, meta, 8, cpu).tokens.tolist() for name in dataset.SPLITS]]


KINDS = pytest.mark.parametrize("before, after", [(CHAR, CHAR), (CHAR, BPE), (BPE, CHAR)], ids=["same", "bpe", "char"])


@KINDS
def test_at_every_instant_a_folder_holds_one_preparation_and_the_next_run_leaves_nothing_behind(
    tmp_path, before, after
):
    earlier, new = prepared(tmp_path, "earlier", 1, *before), prepared(tmp_path, "new", 2, *after)
    out, instants = prepared(tmp_path, "out", 1, *before), tmp_path / "instants"
    with watching(out, lambda: shutil.copytree(out, instants / str(len(os.listdir(instants))))):
        instants.mkdir()
        prepared(tmp_path, "out", 2, *after)
    either, found = [seen(earlier), seen(new)], []
    for i in range(len(os.listdir(instants))):  # each is what a kill at this instant leaves
        found.append(either.index(seen(instants / str(i))))
        prepared(tmp_path, f"instants/{i}", 2, *after)
        assert contents(instants / str(i)) == contents(new)
    assert found == sorted(found) and set(found) == {0, 1} and len(found) > 15


@KINDS
def test_an_operation_that_fails_leaves_one_preparation_and_the_next_run_finishes(tmp_path, before, after):
    either = [seen(prepared(tmp_path, "earlier", 1, *before)), seen(new := prepared(tmp_path, "new", 2, *after))]
    failed = 0

    def fail() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")

    while failed < 100:
        out, left = prepared(tmp_path, f"out{failed}", 1, *before), failed + 1
        with watching(out, fail), suppress(OSError):
            prepared(tmp_path, out.name, 2, *after)
        if left > 0:
            break
        failed += 1
        assert seen(out) in either
        prepared(tmp_path, out.name, 2, *after)
        assert contents(out) == contents(new)
    assert failed > 15


def test_two_at_once_in_one_folder_the_second_is_refused_and_changes_nothing(tmp_path):
    out = prepared(tmp_path, "out", 1, *CHAR)
    with dataset.preparing(out):
        (out / "train.bin.part").write_bytes(b"half")
        before = contents(out)
        for argv in ((), ("--force",)):
            with pytest.raises(DataError, match=r"out: another prepare\.py is writing to it; wait for it"):
                prepared(tmp_path, "out", 1, *CHAR, *argv)
        assert contents(out) == before
    assert "train.bin.part" not in contents(out)

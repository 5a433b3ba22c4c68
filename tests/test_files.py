"""Files that are replaced, and appended to."""

import errno
import os

import pytest

from robopoet.files import append_lines, creating, link, read_bytes, replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with replacing(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as raised, replacing(path) as f:
        f.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert str(raised.value) == f"[Errno {errno.ENOSPC}] No space left on device: '{path}'"


def test_the_old_file_is_kept_on_request(tmp_path):
    path, kept = tmp_path / "a.txt", tmp_path / "b.txt"
    for content in (b"1", b"2", b"3"):
        with replacing(path, keep=kept) as f:
            f.write(content)
    assert (path.read_bytes(), kept.read_bytes()) == (b"3", b"2")


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_new_file_or_folder_is_there_once_it_is_whole(tmp_path, is_folder):
    path = tmp_path / "new"
    with creating(path) as part:
        if is_folder:
            part.mkdir()
        (part / "a.txt" if is_folder else part).write_bytes(b"new")
        assert not path.exists()
    assert os.listdir(tmp_path) == ["new"] and (path / "a.txt" if is_folder else path).read_bytes() == b"new"
    with pytest.raises(FileExistsError, match=f"exists; choose another name, or remove it: '{path}'"), creating(path):
        pass
    with pytest.raises(OSError, match=f"No space left on device: '{path}2'"), creating(tmp_path / "new2") as part:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(part))
    assert os.listdir(tmp_path) == ["new"]


def test_a_link_takes_the_place_of_what_has_its_name(tmp_path, monkeypatch):
    path, name = tmp_path / "a", tmp_path / "b"
    for content, links in ((b"1", True), (b"2", False)):
        path.write_bytes(content)
        if not links:
            monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "none")))
        link(path, name)
        assert name.read_bytes() == content and path.samefile(name) == links


def test_a_file_of_just_the_limit_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_bytes(tmp_path / "a", ValueError, limit=3) == b"abc"
    with pytest.raises(ValueError, match="a: has 3 bytes, must have at most 2"):
        read_bytes(tmp_path / "a", ValueError, limit=2)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, b"c\n"), (b"", b"c\n"), (b"a\n", b"a\nc\n"), (b"a\nb", b"a\nb\nc\n"), (b"\n", b"\nc\n")],
)
def test_a_line_is_never_glued_to_one_that_was_cut(tmp_path, before, after):
    path = tmp_path / "a.jsonl"
    if before is not None:
        path.write_bytes(before)
    append_lines(path, b"c\n")
    assert path.read_bytes() == after


def test_a_full_disk_leaves_the_lines_of_before():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_lines("/dev/full", b"c\n")


def test_a_disk_that_takes_half_a_line_is_left_as_before(tmp_path):
    resource = pytest.importorskip("resource")
    path, (soft, hard) = tmp_path / "a.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    append_lines(path, b"a\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(OSError, match="File too large: "):
            append_lines(path, b"long\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_lines(path, b"c\n")
    assert path.read_bytes() == b"a\nc\n"

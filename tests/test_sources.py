"""Text files: those of a manifest, and a user's own."""

import contextlib
import glob
import gzip
import os
import tracemalloc
from pathlib import Path

import pytest
from conftest import read_all, within
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.errors import DataError
from robopoet.text import corpus, sources


@contextlib.contextmanager
def memory_below(limit: int):
    """Fails if more than `limit` bytes are allocated at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# --- files


@pytest.mark.parametrize("clean", ["text", "none", "drama"])
def test_a_byte_that_is_not_utf8_is_reported_with_its_place(manifest, clean):
    for content, place in [("é".encode() + b"bc\xff", 4), ("né".encode("latin-1"), 1), (b"\xed\xa0\x80", 0)]:
        read = manifest(f"sources: [{{style: s, file: a.txt, clean: {clean}}}]", a=content)
        with pytest.raises(DataError, match=rf"a\.txt: byte {place} "):
            read_all(read)


def test_the_place_counts_the_byte_order_mark(manifest):
    read = manifest("sources: [{style: s, file: a.txt}]", a=b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match="byte 5 "):
        read_all(read)


def test_of_many_files_the_bad_one_is_named(manifest):
    read = manifest('sources: [{style: s, file: "*.txt"}]', good=b"good", bad=b"\xff")
    with pytest.raises(DataError, match=r"bad\.txt"):
        read_all(read)


# --- a user's own files


def test_names_with_brackets_are_names_not_patterns(tmp_path):
    folder = tmp_path / "books [mine]"
    folder.mkdir()
    (folder / "tale[1].txt").write_text("one")
    assert read_all(corpus.manifest_of_files((str(tmp_path / "*/*.txt"),)))[0][2] == "one\n"
    (folder / "corpus.yaml").write_text("sources: [{style: s, file: '*.txt'}]")
    assert read_all(corpus.read_manifest(folder))[0][2] == "one\n"


def test_no_file_an_empty_folder_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "notes.doc.bak").write_text("not read of a folder")
    (tmp_path / "a.txt").write_text("one")
    for patterns in [("none*.txt",), ("a.txt", "none*.txt"), ("none.txt", "a.txt")]:
        with pytest.raises(DataError, match="none"):
            corpus.manifest_of_files(tuple(str(tmp_path / pattern) for pattern in patterns))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path.name}: holds no \.txt"):
        corpus.manifest_of_files((str(tmp_path),))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.txt"):
        read_all(corpus.manifest_of_files((str(tmp_path / "*.txt"),)))


def test_a_folders_texts_are_read_recursively_in_order(tmp_path):
    folder = tmp_path / "my [books]"
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", "d.jsonl.gz", "a/notes.log", "image.png", "e.txt.orig", ".f.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        line = b'{"text": "' + name.encode() + b'"}'
        content = {".gz": gzip.compress(line), ".jsonl": line}.get(Path(name).suffix, name.encode())
        (folder / name).write_bytes(content)
    expected = [
        ("c:1", "c", "a/c.jsonl\n"),
        ("z", "z", "a/z.txt\n"),
        ("b", "b", "b.txt\n"),
        ("d:1", "d", "d.jsonl.gz\n"),
    ]
    assert read_all(corpus.manifest_of_files((str(folder),))) == expected
    twice = (str(tmp_path / "*"), str(folder / "b.txt"), f"{folder}/./a", str(folder))
    assert read_all(corpus.manifest_of_files(twice)) == expected  # and what is named twice is read once


def test_links_lead_to_each_file_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "tale.txt").write_text("one")
    (tmp_path / "a" / "b" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path)  # two loops: 2**40 paths
    (tmp_path / "a" / "copy.txt").symlink_to(tmp_path / "a" / "b" / "tale.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
    for patterns in [(".",), ("**/*.txt",), ("**",), ("a/**/*.txt", "linked/*", "a"), ("a/**/b/**/*.txt",)]:
        with within(5):
            own = corpus.manifest_of_files(tuple(str(tmp_path / pattern) for pattern in patterns))
        [(_, style, text)] = read_all(own)
        assert (style in ("tale", "copy"), text) == (True, "one\n")
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: '**/*.txt'}, {style: t, file: a/copy.txt}]")
    assert [style for _, style, _ in read_all(corpus.read_manifest(tmp_path))] == ["s", "t"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["**", "*", "a", "b", ".h", "[ab]", "*.txt"]), min_size=1, max_size=4))
def test_without_links_a_glob_finds_what_pythons_finds(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "tree"
    for name in ("a/b/c.txt", "a/a/d.txt", "b/e.txt", ".h/f.txt", "a/.g.txt", "h.txt", "a/b/**"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    pattern = os.path.join(folder, *parts)
    expected = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    assert {path for path in sources._glob(pattern) if os.path.isfile(path)} == expected


def test_a_folder_that_can_not_be_read_is_reported(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deep: Permission denied"):
        corpus.manifest_of_files((str(tmp_path),))


def test_a_file_must_be_regular_of_limited_size_and_have_a_name_in_utf8(tmp_path):
    with pytest.raises(DataError, match="/dev/zero: is not a regular file"):
        read_all(corpus.manifest_of_files(("/dev/zero",)))
    for name in (b"caf\xe9.txt", b"a\nb.txt"):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as f:
            f.write(b"text")
        with pytest.raises(DataError, match="the name is not UTF-8 or holds control characters") as caught:
            read_all(corpus.manifest_of_files((str(tmp_path),)))
        assert "\n" not in str(caught.value) and str(caught.value).isascii()
        os.unlink(path)
    with open(tmp_path / "a.txt", "wb") as f:
        f.truncate(2**30 + 1)
    with within(5), pytest.raises(DataError, match=r"a\.txt: has 1,073,741,825 bytes, must have at most 1,073,741,824"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: a.txt, max_bytes: 3}]")
    with pytest.raises(DataError, match=r"a\.txt: has 4 bytes, must have at most 3; "):
        read_all(corpus.read_manifest(tmp_path))
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: a.txt, max_bytes: 4}]")
    assert read_all(corpus.read_manifest(tmp_path))[0][2] == "text\n"
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b\.txt: No such file"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))


def test_a_folders_files_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("a.txt", "b.rst", "c/README", "d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert len(read_all(corpus.manifest_of_files((str(tmp_path),)))) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path}: passed over ") and told.count("\n") == 1
    assert all(name in told for name in ("b.rst", "c/README", "d.csv"))
    for i in range(9):
        (tmp_path / f"{i}.log").write_text("x")
    corpus.manifest_of_files((str(tmp_path),))
    assert "and 7 more; to read" in capsys.readouterr().err
    assert read_all(corpus.manifest_of_files((str(tmp_path / "b.rst"),)))[0][2] == "b.rst\n"

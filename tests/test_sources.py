"""Where texts come from: a user's files and a manifest's, what is pinned, archives, lines of JSON."""

import contextlib
import glob
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import tarfile
import threading
import tracemalloc
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import read_all, sha256, within
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.errors import DataError
from robopoet.text import corpus, sources


@contextlib.contextmanager
def memory_below(limit: int):
    """Refuses what allocates more bytes at once."""
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


# --- what is pinned, and archives


def test_a_pinned_file_must_be_that_file(manifest):
    pinned = f"sources: [{{style: s, file: a.txt, sha256: {sha256(b'abc')}}}]"
    assert read_all(manifest(pinned, a=b"abc"))[0][2] == "abc\n"
    with pytest.raises(DataError, match="SHA-256"):
        read_all(manifest(pinned, a=b"abd"))


@pytest.fixture
def serve():
    """Starts an HTTP server whose reply is what `reply` writes; returns its address."""
    servers = []

    def start(reply) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(OSError):  # the client may have left
                    reply(self)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/tale.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(content: bytes, *headers: tuple[str, str], status: int = 200):
    def reply(handler) -> None:
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def pinned(url: str, content: bytes, **keys: object) -> str:
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"sources: [{{style: s, url: '{url}', sha256: {sha256(content)}{more}}}]"


def test_a_download_is_checked_kept_and_not_repeated(manifest, tmp_path, serve):
    served = {"content": b"once"}
    source = pinned(serve(lambda handler: send(served["content"])(handler)), b"once")
    assert read_all(manifest(source)) == [("tale", "s", "once\n")]
    served["content"] = b"gone"
    assert read_all(manifest(source)) == [("tale", "s", "once\n")]
    (tmp_path / "raw" / "tale.txt").write_bytes(b"damaged")  # what was kept is checked too, and fetched anew
    with pytest.raises(DataError, match=r"tale\.txt"):
        read_all(manifest(source))
    served["content"] = b"once"
    assert read_all(manifest(source)) == [("tale", "s", "once\n")]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["tale.txt"]


@pytest.mark.parametrize(
    "reply, message",
    [
        (send(b"twice"), "SHA-256"),
        (send(b"onc", ("Content-Length", "4")), "SHA-256"),
        (send(b"once" * 1000), r"longer than max_bytes, 1,000"),
        (send(b"", status=404), "could not be downloaded.*404"),
        (send(b"5\r\nonce", ("Transfer-Encoding", "chunked")), "could not be downloaded"),
        (send(b"ffffffffff\r\nonce", ("Transfer-Encoding", "chunked")), "could not be downloaded"),
        (send(b"", ("Location", "http://127.0.0.1:1/b"), status=302), "redirects to 'http.*only https to https"),
        (send(b"", ("Location", "https://127.0.0.1:1/b"), status=301), "redirects to 'https.*only https to https"),
        (send(b"", ("Location", "file:///etc/hostname"), status=302), "file:///etc/hostname"),
        (lambda handler: handler.wfile.write(b"no HTTP\r\n\r\n"), "could not be downloaded"),
    ],
    ids=range(10),
)
def test_a_url_with_another_text_is_refused_and_nothing_is_kept(manifest, tmp_path, serve, reply, message):
    with within(5), pytest.raises(DataError, match=message) as caught:
        read_all(manifest(pinned(serve(reply), b"once", max_bytes=1000)))
    assert "/tale.txt: " in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("length", ["10", "1000000000000", "-5", "many"])
def test_a_wrong_content_length_does_not_matter_if_the_hash_is_right(manifest, serve, length):
    source = pinned(serve(send(b"once", ("Content-Length", length))), b"once")
    assert read_all(manifest(source))[0][2] == "once\n"


def test_redirects_go_from_https_to_https_alone():
    follow = sources._Redirects().redirect_request
    request = urllib.request.Request("https://a/tale.txt")
    assert follow(request, None, 302, "", {}, "https://b:444/tale.txt").full_url == "https://b:444/tale.txt"
    for url in ("http://a/tale.txt", "ftp://a/tale.txt", "file:///tale.txt", "httpsx://a/"):
        with pytest.raises(DataError, match="only https to https"):
            follow(request, None, 302, "", {}, url)


@pytest.mark.parametrize("url", ["example/tale.txt", "http://[bad/tale.txt", "http://a b/tale.txt"])
def test_a_malformed_url_is_refused_by_name(manifest, tmp_path, url):
    with pytest.raises(DataError, match="tale"):
        read_all(manifest(pinned(url, b"once")))
    assert not (tmp_path / "raw").exists()


def test_a_download_that_can_not_be_written_is_reported(manifest, tmp_path, serve):
    (tmp_path / "raw").write_bytes(b"in the way")
    with pytest.raises(DataError, match=r"raw/tale\.txt: could not be written"):
        read_all(manifest(pinned(serve(send(b"once")), b"once")))
    (tmp_path / "raw").unlink()
    with pytest.raises(DataError, match=r"could not be written \(File name too long\)"):
        read_all(manifest(pinned(serve(send(b"once")) + "a" * 300, b"once")))
    assert not (tmp_path / "raw").exists()


def make_zip(members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        folder = tarfile.TarInfo("p/plays/folder.md")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return buffer.getvalue()


@pytest.mark.parametrize("kind, make", [("wheel", make_zip), ("sdist", make_tar)])
def test_members_of_an_archive_are_read_in_order_of_name(manifest, tmp_path, kind, make):
    archive = make({"p/plays/b.md": b"B", "p/other.md": b"no", "p/plays/a.md": b"A", "p/plays/c.txt": b"no"})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"book==1.0.{kind}").write_bytes(archive)
    source = f"style: s, package: book==1.0, archive: {kind}, sha256: {sha256(archive)}"
    assert read_all(manifest(f"sources: [{{{source}, members: p/plays/*.md}}]")) == [
        ("a", "s", "A\n"),
        ("b", "s", "B\n"),
    ]
    with pytest.raises(DataError, match="nothing/"):
        read_all(manifest(f"sources: [{{{source}, members: nothing/*}}]"))


def keep(tmp_path: Path, kind: str, archive: bytes, **keys: object) -> str:
    """A manifest of a package that need not be downloaded."""
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw" / f"book==1.0.{kind}").write_bytes(archive)
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"sources: [{{style: s, package: book==1.0, archive: {kind}, sha256: {sha256(archive)}{more}}}]"


def make_sparse_tar(size: int) -> bytes:
    entry = tarfile.TarInfo("a.md")
    entry.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2  # one piece of no bytes
    header[483:495] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return gzip.compress(bytes(header) + bytes(1024))


def make_long_header_tar(size: int) -> bytes:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, size
    return gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(size + 1024))


@pytest.mark.parametrize("bomb", ["zip", "tar", "other member", "sparse", "long name"])
def test_an_archive_that_unpacks_to_too_much_is_refused(manifest, tmp_path, bomb):
    large = 50 * 2**20
    if bomb == "zip":
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.md", bytes(large))
        kind, content = "wheel", buffer.getvalue()
    elif bomb in ("tar", "other member"):
        kind, content = "sdist", make_tar({"a.md" if bomb == "tar" else "b.txt": bytes(large), "c.md": b"c"})
    else:
        make = make_sparse_tar if bomb == "sparse" else make_long_header_tar
        kind, content = "sdist", make(8**11 - 1 if bomb == "sparse" else large)
    read = manifest(keep(tmp_path, kind, content, members="'*.md'"))
    message = r"^book==1\.0: unpacks to over max_bytes, or over 100 times its size"
    with memory_below(45 * 2**20), within(5), pytest.raises(DataError, match=message):  # a few copies of what is let by
        read_all(read)


@pytest.mark.parametrize("kind, make", [("wheel", make_zip), ("sdist", make_tar)])
def test_the_members_of_an_archive_share_one_limit(manifest, tmp_path, monkeypatch, kind, make):
    archive = make({"a.md": b"a" * 600, "b.md": b"b" * 600})
    assert len(read_all(manifest(keep(tmp_path, kind, archive, members="'*.md'")))) == 2
    if kind == "wheel":
        monkeypatch.setattr(sources, "UNPACKED", 1)
        monkeypatch.setattr(sources, "UNPACKED_FLOOR", 1199 - len(archive))
        with pytest.raises(DataError, match=r"^book==1\.0: unpacks to over max_bytes"):
            read_all(manifest(keep(tmp_path, kind, archive)))


def test_an_archive_larger_than_its_limit_is_not_even_read(manifest, tmp_path):
    with pytest.raises(DataError, match=r"book==1\.0: pip could not download"):
        read_all(manifest(keep(tmp_path, "wheel", make_zip({"a.md": b"a" * 600}), max_bytes=100)))


@pytest.mark.parametrize("kind, make", [("wheel", make_zip), ("sdist", make_tar)])
def test_damaged_archives_are_refused_in_one_line(manifest, tmp_path, kind, make):
    intact, rng, refused = make({"a.md": b"text " * 50, "b.md": b"B"}), random.Random(0), 0
    for i in range(300):
        plain = bytearray(intact if kind == "wheel" or i % 2 else gzip.decompress(intact))
        for _ in range(rng.randint(1, 8)):
            plain[rng.randrange(len(plain))] = rng.randrange(256)
        content = bytes(plain[: rng.randrange(len(plain))] if i % 5 == 0 else plain)
        read = manifest(keep(tmp_path, kind, content if kind == "wheel" or i % 2 else gzip.compress(content)))
        try:
            with within(5):
                read_all(read)
        except DataError as e:
            assert "\n" not in str(e)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("make, kind", [(make_zip, "wheel"), (make_tar, "sdist")])
def test_a_members_name_must_be_text(manifest, tmp_path, make, kind):
    for name in ("a\nb.md", "a\udcff.md") if kind == "sdist" else ("a\nb.md",):
        with pytest.raises(DataError, match=r"^'a\\.*: the name is not UTF-8") as caught:
            read_all(manifest(keep(tmp_path, kind, make({name: b"text"}))))
        str(caught.value).encode()


# --- a user's own files


def test_names_with_brackets_are_names_not_patterns(tmp_path):
    folder = tmp_path / "books [mine]"
    folder.mkdir()
    (folder / "tale[1].txt").write_text("one")
    assert read_all(corpus.manifest_of_files((str(tmp_path / "*/*.txt"),)))[0][2] == "one\n"
    (folder / "corpus.yaml").write_text("sources: [{style: s, file: '*.txt'}]")
    assert read_all(corpus.read_manifest(folder))[0][2] == "one\n"


def test_no_file_an_empty_folder_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("not read of a folder")
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
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", "d.jsonl.gz", "a/notes.md", "image.png", "e.txt.orig", ".f.txt"):
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


# --- JSON lines

LINES = [
    b'{"text": "First tale.  \\r\\n\\n\\n\\nIts end.", "url": "http://example"}\r\n',
    '{"id": 2, "meta": {"text": "no"}, "text": "Deux  \x85 été"}\n'.encode(),
    b'{"text":"\\ud83d\\ude42 \\u6771"}',
]
TALES = [("tales:1", "First tale.\n\nIts end.\n"), ("tales:2", "Deux  \x85 été\n"), ("tales:3", "🙂 東\n")]


def write_lines(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["tales.jsonl", "tales.jsonl.gz"])
def test_a_line_of_json_is_a_document(tmp_path, name):
    path = write_lines(tmp_path / name, b"".join(LINES))
    own = corpus.manifest_of_files((str(path),))
    assert read_all(own) == [(doc, "tales", text) for doc, text in TALES]
    assert not own.tags
    (tmp_path / "corpus.yaml").write_text(f"sources: [{{style: s, file: '*.{name[6:]}', clean: none}}]")
    assert [text for _, _, text in read_all(corpus.read_manifest(tmp_path))][1] == "Deux  \x85 été"


def test_other_keys_of_a_line_are_ignored(tmp_path):
    line = b'{"n": ' + b"9" * 5000 + b', "text": "a", "x": {"text": [null, 1e999]}, "text": "b"}\n'
    path = write_lines(tmp_path / "tales.jsonl", line)
    assert read_all(corpus.manifest_of_files((str(path),))) == [("tales:1", "tales", "b\n")]


def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path):
    path, part = tmp_path / "bomb.jsonl.gz", gzip.compress(bytes(10 * 2**20))
    path.write_bytes(gzip.compress(b'{"text": "') + part * 100)  # 1 MB; 1 GB on one line
    with memory_below(300 * 2**20), within(5), pytest.raises(DataError, match=r"bomb\.jsonl\.gz: line 1: is longer"):
        read_all(corpus.manifest_of_files((str(path),)))
    lines = gzip.compress((json.dumps({"text": "x" * 1000}) + "\n").encode() * 20_000)  # 20 MB in many
    path.write_bytes(lines)
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: line \d+: unpacks to over 100 times"):
        read_all(corpus.manifest_of_files((str(path),)))


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz"])
def test_a_line_has_a_largest_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "JSON_BYTES", 100)
    line = b'{"text": "' + b"x" * 87 + b'"}\n'
    path = write_lines(tmp_path / name, line * 2)
    assert len(line) == 100 and len(read_all(corpus.manifest_of_files((str(path),)))) == 2
    write_lines(path, line + line[:10] + b"x" + line[10:])
    with pytest.raises(DataError, match=rf"{name}: line 2: is longer than 100 bytes"):
        read_all(corpus.manifest_of_files((str(path),)))


def test_a_gzip_file_in_several_parts_is_read_to_its_end(tmp_path):
    (tmp_path / "tales.jsonl.gz").write_bytes(b"".join(map(gzip.compress, LINES)))
    assert [text for _, _, text in read_all(corpus.manifest_of_files((str(tmp_path),)))] == [text for _, text in TALES]


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"plain text",
        b'{"text": "cut',
        b'{"text": "a"} {"text": "b"}',
        b'"text"',
        b'["text"]',
        b"null",
        b'{"txt": "a"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "a", "n": 1',
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_a_bad_line_is_named_in_one_line(tmp_path, name, line):
    write_lines(tmp_path / name, LINES[1] + line + b"\n" + LINES[2])
    with pytest.raises(DataError, match=rf"{name}: line 2: ") as caught:
        read_all(corpus.manifest_of_files((str(tmp_path),)))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_a_damaged_gzip_file_is_named(tmp_path):
    lines = [f'{{"text": "tale {hashlib.sha256(b"%d" % i).hexdigest()}"}}\n'.encode() for i in range(100)]
    intact, path = gzip.compress(b"".join(lines)), tmp_path / "tales.jsonl.gz"
    flipped = intact[:1000] + bytes([intact[1000] ^ 0xFF]) + intact[1001:]
    for content in (intact[:-1], intact[:2000], flipped, intact[:-8] + bytes(8), b"".join(lines), intact + b"more"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tales\.jsonl\.gz: line \d+: ") as caught:
            read_all(corpus.manifest_of_files((str(path),)))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz"])
def test_a_file_of_no_lines_is_refused_by_name(tmp_path, name):
    write_lines(tmp_path / name, b"")
    with pytest.raises(DataError, match=rf"{name}: holds no text"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))

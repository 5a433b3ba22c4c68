"""Downloads and archives: pinned by hash, limited in size, kept only if they are right."""

import contextlib
import gzip
import http.server
import io
import random
import tarfile
import threading
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import read_all, sha256, within
from test_sources import memory_below

from robopoet.errors import DataError
from robopoet.text import sources


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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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
    """A manifest of a package whose archive is there already, so that nothing is downloaded."""
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

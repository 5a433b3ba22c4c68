"""Files that hold many documents: lines of JSON, rows of Parquet, and texts between marks."""

import codecs
import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from robopoet import files
from robopoet.errors import DataError, describe
from robopoet.files import JSON_BYTES
from robopoet.text import books
from robopoet.text.epub import UNPACKED, UNPACKED_FLOOR

JSON_LINES = (".jsonl", ".jsonl.gz")
PARQUET, PARQUET_ROWS = ".parquet", 1000  # rows in memory at a time
MARK = re.compile(r"<\|(?:start|end)oftext\|>")  # between documents, as gpt-2-simple writes and reads them

# how a line of an exported chat begins: date and time, or time <name>, or name, [date time]
STAMP = re.compile(
    r"^[^\w\n]{0,4}(?:\d{1,4}[./-]\w{1,3}[./-]\d{1,4},?[ T]{1,2}\d{1,2}[:.]\d\d(?!\d)"
    r"|\d{1,2}:\d\d(?::\d\d)?[^\w\n]{0,3}<[^\n<>]{1,40}>|\w[^\n\[]{0,40}, \[\d{1,2}[./-]\d{1,2}[./-]\d{2,4},? \d)",
    re.M,
)
STAMPED, FEWEST_STAMPED, HEAD_CHARS = 0.25, 5, 20_000  # such lines from which a text is a chat; where they are sought
MESSAGES_ALONE = (
    r"sed -E 's/^[^[:alnum:]]*[0-9][[:alnum:].:\/-]*(,? [0-9][0-9:.]*)?[^[:alnum:]<]*([AaPp][.]?[Mm][^[:alnum:]]+)?//; "
    r"s/, \[[0-9][^]]*\]$/:/' FILE > new.txt"
)


class RawDocument(NamedTuple):
    """A document before cleaning. place: its file, and its line or row if that holds several."""

    place: str
    name: str
    text: str
    told: str = ""  # what is to be told about its encoding
    losses: Mapping[str, books.Loss] = MappingProxyType({})  # by file: the letters that it has and the text has not
    flaw: str = ""  # what was replaced in it, or why it has no text
    is_line: bool = False  # whether its file holds several, or only page matter, so that it may be skipped
    page_matter: Mapping[str, int] = MappingProxyType({})  # how much of each kind was left out


def has_ending(path: str, suffixes: str | tuple[str, ...]) -> bool:
    """Whether the file at `path` has one of these extensions, in any case."""
    return path.lower().endswith(suffixes)


def stem(path: str) -> str:
    """The name of the file at `path` without its extension, such as .txt or .jsonl.gz."""
    return Path(path.rpartition(".")[0] if has_ending(path, (".jsonl.gz", ".fb2.zip")) else path).stem


JSON_TEXT = re.compile(r"\s*+\[?\s*+\{\s*+\"\w")
SUBTITLE = re.compile(r"^[\d:.,]{5,12} --> [\d:.,]{5,12}", re.M)
COLUMN = re.compile(r"[^\W\d]\w{0,30}")  # its name in a table
COLUMNS, FEWEST_ROWS = 0.95, 6  # the least share of rows that have as many as their names; the least rows of a table


def table_kind(text: str) -> str:
    """The extension of a file that holds what `text` does if that is a table, JSON or subtitles, else ""."""
    head = text[:HEAD_CHARS].replace("\r\n", "\n").replace("\r", "\n")
    if JSON_TEXT.match(head):
        return ".jsonl" if re.match(r"\s*+\{.*\}[ \t]*\n\s*+\{", head) else ".json"
    if len(SUBTITLE.findall(head)) >= FEWEST_STAMPED:
        return ".srt"
    for mark, kind in ((",", ".csv"), (";", ".ssv"), ("\t", ".tsv")):
        if mark in head.lstrip().partition("\n")[0]:
            names, *rows = list(csv.reader(head.lstrip().splitlines(keepends=True), delimiter=mark))[:-1] or [[]]
            fitting = sum(len(row) == len(names) for row in rows)
            if all(map(COLUMN.fullmatch, names)) and fitting >= max(FEWEST_ROWS, COLUMNS * len(rows)):
                return kind
    return ""


def check_no_chat(path: str, text: str) -> None:
    """Raise DataError if `text` is an exported chat, of which nobody wants to learn the dates."""
    head = text[:HEAD_CHARS]
    stamped, lines = len(STAMP.findall(head)), len([line for line in head.split("\n") if line.strip()])
    if stamped >= max(FEWEST_STAMPED, STAMPED * lines):
        first = head.strip().partition("\n")[0][:50]
        raise DataError(
            f"{path}: begins {first!r}, as an exported chat does; write its messages alone: {MESSAGES_ALONE}"
        )


def marked(doc: RawDocument) -> Iterator[RawDocument]:
    """The documents between a text's marks, or itself if it has none; the name is STEM:NUMBER."""
    if not MARK.search(doc.text):
        yield doc
        return
    texts = (text for text in MARK.split(doc.text) if text.strip())
    for number, text in enumerate(texts, 1):
        yield doc._replace(place=f"{doc.place}: text {number}", name=f"{doc.name}:{number}", text=text, is_line=True)
        doc = doc._replace(page_matter={})  # it is counted once


# in JSON, half of a character beyond U+FFFF; or another escape, or both halves, which stay
HALF = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.S)


@dataclass(frozen=True)
class _Line:
    """A line of JSON; other keys are ignored."""

    text: str | None


def _repaired(line: bytes) -> bytes:
    """A line of JSON with U+FFFD for each byte that is not UTF-8 and each half of a character."""
    utf8 = line.decode("utf-8", "replace").encode()
    return HALF.sub(_without_half, utf8)


def _without_half(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if escape["half"] else escape[0]


def json_lines(path: str) -> Iterator[RawDocument]:
    """Each line of a .jsonl or .jsonl.gz file as a document, "" for none; the name is STEM:LINE."""
    name, number = stem(path), 0
    advice = 'a line must be {"text": "..."} in UTF-8'
    left = UNPACKED * os.path.getsize(path) + UNPACKED_FLOOR  # a plain file never gets there
    try:
        with io.BufferedReader(gzip.open(path) if has_ending(path, ".gz") else open(path, "rb", 0), 2**20) as lines:
            while line := lines.readline(min(JSON_BYTES, left) + 1):
                number, left = number + 1, left - len(line)
                where = f"{path}: line {number}"
                if left < 0:
                    raise DataError(f"{where}: unpacks to over {UNPACKED} times the file's size; unpack it yourself")
                if len(line) > JSON_BYTES:
                    raise DataError(f"{where}: is longer than {JSON_BYTES:,} bytes; split the document")
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                flaw = ""
                try:
                    text = files.decode_json(line, _Line, where, DataError, advice).text if line.strip() else ""
                except DataError:
                    flaw = "is not all text: what is damaged is replaced with U+FFFD"
                    try:
                        text = files.decode_json(_repaired(line), _Line, where, DataError, advice).text
                    except DataError as e:
                        text, flaw = "", f"{str(e).removeprefix(f'{where}: ')}; left out"
                yield RawDocument(where, f"{name}:{number}", text or "", flaw=flaw, is_line=True)
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path}: line {number + 1}: is truncated or damaged ({e}); get the file again") from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    if not number:
        raise DataError(f"{path}: holds no text")


def parquet_rows(path: str) -> Iterator[RawDocument]:
    """Each row of a Parquet file's column `text` as a document; the name is STEM:ROW."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: pip install pyarrow reads Parquet files") from None
    name, number = stem(path), 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            if "text" not in columns.names or str(columns.field("text").type) not in ("string", "large_string"):
                raise DataError(f"{path}: must have a column of strings named text, found {', '.join(columns.names)}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                batch.validate(full=True)  # raises ArrowException on what is not UTF-8
                for text in batch["text"].to_pylist():
                    number += 1
                    yield RawDocument(f"{path}: row {number}", f"{name}:{number}", text or "", is_line=True)
    except (ArrowException, OSError) as e:
        raise DataError(f"{path}: after row {number}: damaged, or no Parquet file ({describe(e)})") from None
    if not number:
        raise DataError(f"{path}: holds no text")

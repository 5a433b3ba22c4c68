"""Limits, types and places: input from outside is complete and typed, or one line of one class of error."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from robopoet import files
from robopoet.errors import describe


class OursError(ValueError):
    pass


@dataclass(frozen=True)
class Span:
    start: files.Count


@dataclass(frozen=True)
class Sample:
    documents: tuple[Span, ...]
    name: str = ""


def test_json_becomes_the_dataclass_or_an_error_with_its_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"documents": [{"start": 3}], "name": "x"}')
    assert files.read_json(path, Sample, OursError, "mend it") == Sample((Span(3),), "x")
    path.write_text('{"documents": [{"start": -1}]}')
    with pytest.raises(OursError, match=r"a\.json: .*>= 0.*\$\.documents\[0\]\.start.*; mend it$"):
        files.read_json(path, Sample, OursError, "mend it")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"documents": 1}',
        b'{"documents": [{"start": true}]}',
        b'{"documents": [], "name": "\xff"}',
        b'{"documents": [], "name": "\\ud800"}',
        b'{"documents": [], "other": ' + b"[" * 100_000,
        b'{"documents": [{"start": 1' + b"0" * 5000 + b"}]}",
    ],
    ids=range(9),
)
def test_bad_json_raises_no_other_exception(raw):
    with pytest.raises(OursError, match=r"^here: [^\n]{1,330}; mend it$"):
        files.decode_json(raw, Sample, "here", OursError, "mend it")


def test_a_message_that_quotes_a_long_text_is_cut():
    assert len(describe(ValueError("x" * 10**6))) < 310


def test_yaml_values_are_text_and_are_converted_by_type(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("rate: 6e-4\nnames: [a, off]\ndeep: {er: 1}\n")
    assert files.read_yaml(path, OursError) == {"rate": "6e-4", "names": ["a", "off"], "deep": {"er": "1"}}
    assert files.convert({"start": "7"}, Span, "here", OursError, "", strict=False) == Span(7)
    with pytest.raises(OursError, match=r"here: .*\$\.start"):
        files.convert({"start": "x"}, Span, "here", OursError, "", strict=False)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 2: has an alias"),
        ("[" * 30 + "]" * 30, "nests over 20 deep"),
        ("[" * 100_000 + "]" * 100_000, "nests over 20 deep"),
        ("a:\n" * 200_000, "holds over 100,000 values"),
        ("x" * 2_000_000, "has 2,000,000 bytes, must have at most 1,048,576"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n? [b]\n: c", "is not YAML"),
    ],
    ids=["aliases", "deep", "deeper", "many", "large", "cut", "key"],
)
@pytest.mark.parametrize("loader", [files.BaseLoader, yaml.BaseLoader])
def test_yaml_that_would_blow_up_is_refused(tmp_path, monkeypatch, loader, text, message):
    monkeypatch.setattr(files, "BaseLoader", loader)
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(OursError, match=message):
        files.read_yaml(path, OursError)


def test_yaml_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(OursError, match="is not YAML"):
        files.read_yaml(path, OursError)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path / "pipe",
        Path("/dev/zero"),
        tmp_path,
        tmp_path / "none",
        Path("a\0b"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(OursError, match=str(path).replace("\0", "\\x00")[:20]):
            files.read_bytes(path, OursError)
    path = tmp_path / "big"
    path.write_text(json.dumps("x" * 100))
    with pytest.raises(OursError, match="has 102 bytes, must have at most 50"):
        files.read_bytes(path, OursError, limit=50)

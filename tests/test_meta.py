"""meta.json: what is altered, old, inconsistent or damaged is refused in one line."""

import hashlib
import json

import pytest

from robopoet.errors import DataError
from robopoet.text import dataset
from robopoet.text.dataset import FORMAT, Meta, Span, SplitMeta, encode_meta, read_meta
from robopoet.text.tokenizer import END, CharTokenizer


def sealed(change) -> bytes:
    """The content of meta.json after `change`, with a hash that fits."""
    content = json.loads(encode_meta(make_meta()))
    del content["sha256"]
    change(content)
    body = json.dumps(content).encode()[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def make_meta() -> Meta:
    size = SplitMeta(9, 3, 9, 9, "0" * 64, (Span("d", "a", 0, 4), Span("e", "b", 4, 9)))
    tok = CharTokenizer("abc", [END, "<|a|>", "<|b|>"])
    return Meta(FORMAT, "", "0" * 64, 6, {"a": 4, "b": 5}, (), dict.fromkeys(dataset.SPLITS, size), tok.saved)


def test_meta_is_json_and_is_read_back(tmp_path):
    (tmp_path / "meta.json").write_bytes(encode_meta(make_meta()))
    assert read_meta(tmp_path) == make_meta()
    assert json.loads((tmp_path / "meta.json").read_text())["splits"]["val"]["documents"][1]["start"] == 4
    (tmp_path / "meta.json").write_bytes(sealed(lambda content: content))
    assert read_meta(tmp_path) == make_meta()


def test_missing_meta_names_what_to_run(tmp_path):
    with pytest.raises(DataError, match=r"meta\.json: not found.*prepare\.py"):
        read_meta(tmp_path)


def test_every_altered_byte_of_meta_is_refused(tmp_path):
    content = encode_meta(make_meta())
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1
        (tmp_path / "meta.json").write_bytes(altered)
        with pytest.raises(DataError, match=r"meta\.json: [^\n]+run prepare\.py again$"):
            read_meta(tmp_path)


@pytest.mark.parametrize("content", [{}, {"format": 2}, {"vocab_size": 5, "styles": {}}])
def test_meta_of_an_earlier_format_is_refused_with_prepare_again(tmp_path, content):
    (tmp_path / "meta.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"meta\.json: is of format \d, must be 3; run prepare\.py again$"):
        read_meta(tmp_path)


def put(*keys):
    """A change of meta.json's content: `put("splits", "val", "end", 7)`."""
    *where, last, value = keys

    def change(content):
        for key in where:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("vocab_size", 7), "vocab_size is 7, the tokenizer has 6"),
        (put("vocab_size", 0), r"\$\.vocab_size"),
        (put("styles", {"a": 5, "b": 4}), "styles: the tokenizer's tag of 'a'"),
        (put("styles", "b", -1), r"\$\.styles"),
        (put("styles", {"a": 4}), "documents of a style without a tag"),
        (put("text_sha256", "0"), r"\$\.text_sha256"),
        (put("splits", {}), "splits are"),
        (put("splits", "more", {}), r"\$\.splits"),
        (put("splits", "val", "tokens", 10), r"documents don't cover its tokens.*\$\.splits"),
        (put("splits", "val", "documents", 0, "stop", 5), "documents don't cover"),
        (put("splits", "val", "documents", 1, "start", 3), "documents don't cover"),
        (put("splits", "val", "documents", 1, "start", "4"), r"\$\.splits\[\.\.\.\]\.documents\[1\]\.start"),
        (put("splits", "val", "documents", [{"name": "d", "style": "a", "start": 0, "stop": -1}]), r"\.stop"),
        (put("splits", "val", "largest", 6), r"val\.bin holds token 6, the vocabulary has 6"),
        (put("splits", "val", "end", 4), r"val: its documents end with 4"),
        (put("splits", "val", None), r"\$\.splits"),
        (put("tokenizer", "specials", [END, "<|b|>", "<|a|>"]), "styles: the tokenizer's tag of 'a'"),
        (put("tokenizer", "chars", "aba"), "appears twice"),
        (put("tokenizer", {}), r"\$\.tokenizer"),
    ],
)
def test_inconsistent_meta_is_refused_though_its_hash_is_right(tmp_path, change, message):
    (tmp_path / "meta.json").write_bytes(sealed(change))
    with pytest.raises(DataError, match=rf"^[^\n]*meta\.json: [^\n]*{message}[^\n]*run prepare\.py again$"):
        read_meta(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe{}", b'{"format": ' + b"[" * 10**6])
def test_damaged_meta_is_a_data_error(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"^[^\n]*meta\.json: [^\n]*$"):
        read_meta(tmp_path)

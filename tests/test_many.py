"""Files that hold many documents: lines of JSON, texts between marks; chats and tables, which are refused."""

import codecs
import gzip
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from conftest import read_all, within
from test_sources import memory_below

from robopoet.errors import DataError
from robopoet.text import corpus, many

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
    path.write_bytes(gzip.compress(b'{"text": "') + part * 120)  # 1.2 MB; 1.2 GB on one line
    with memory_below(300 * 2**20), within(5), pytest.raises(DataError, match=r"bomb\.jsonl\.gz: line 1: is longer"):
        read_all(corpus.manifest_of_files((str(path),)))
    lines = gzip.compress((json.dumps({"text": "x" * 1000}) + "\n").encode() * 20_000)  # 20 MB in many
    path.write_bytes(lines)
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: line \d+: unpacks to over 100 times"):
        read_all(corpus.manifest_of_files((str(path),)))


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz"])
def test_a_line_has_a_largest_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr(many, "JSON_BYTES", 100)
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
        b"plain text",
        b'{"text": "cut',
        b'{"text": "a"} {"text": "b"}',
        b'"text"',
        b'["text"]',
        b"null",
        b'{"txt": "a"}',
        b'{"text": 5}',
        b'{"\xfftext": "a"}',
        b"[" * 100_000,
        b'{"text": "a", "n": 1',
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_a_bad_line_is_left_out_and_named_and_more_than_a_hundredth_of_them_stop(tmp_path, name, line):
    manifest = corpus.manifest_of_files((str(write_lines(tmp_path / name, LINES[1] + line + b"\n" + LINES[2])),))
    found = corpus.survey(corpus.documents(manifest))
    [warning] = found.warnings
    assert warning.startswith(f"{tmp_path / name}: line 2: ") and warning.endswith("; left out")
    assert len(warning.removeprefix(str(tmp_path))) < 300 and found.n_documents == 2
    assert {part.name for part, _ in corpus.parts(corpus.documents(manifest), manifest, found)} == {"bad:1", "bad:3"}
    write_lines(tmp_path / name, LINES[1] + 2 * (line + b"\n"))
    with pytest.raises(DataError, match=rf"{name}: line 2: .*; so are 2 of 3 documents") as caught:
        corpus.survey(corpus.documents(manifest))
    assert len(str(caught.value).splitlines()) == 1


FLAWED = {
    b"": "",
    b"  \r": "",
    b'{"text": null}': "",
    b'{"text": ""}': "",
    b'{"text": " \\n"}': "",
    b'{"text": "caf\xe9, \xff"}': "caf\ufffd, \ufffd\n",
    b'{"text": "a \\ud83d, \\uDE00 b \\\\ud83d \\ud83d\\ude42\\ud83d"}': "a \ufffd, \ufffd b \\ud83d 🙂\ufffd\n",
}


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
@pytest.mark.parametrize("line, text", FLAWED.items(), ids=lambda part: str(part)[:30])
def test_a_line_without_text_is_left_out_and_damage_in_one_replaced_and_both_are_told(tmp_path, name, line, text):
    path = write_lines(tmp_path / name, codecs.BOM_UTF8 + LINES[0] + line + b"\n" + LINES[2])
    manifest = corpus.manifest_of_files((str(path),))
    found = corpus.survey(corpus.documents(manifest))
    what = "is not all text: what is damaged is replaced with U+FFFD" if text else "holds no text; left out"
    assert found.warnings[0] == f"{path}: line 2: {what}" and found.n_documents == 2 + bool(text)
    again = dict.fromkeys(("some:1", "some:2", "some:3"), "")
    for part, piece in corpus.parts(corpus.documents(manifest), manifest, found):
        again[part.name] += piece
    assert again == {"some:1": TALES[0][1], "some:2": text, "some:3": TALES[2][1]}


def test_a_file_without_text_or_with_damage_in_more_than_a_hundredth_of_its_lines_is_refused(tmp_path):
    def survey(*lines: bytes) -> corpus.Survey:
        path = write_lines(tmp_path / "many.jsonl", b"".join(line + b"\n" for line in lines))
        return corpus.survey(corpus.documents(corpus.manifest_of_files((str(path),))))

    good, bad = [b'{"text": "%d"}' % i for i in range(198)], [b'{"text": "\xff"}'] * 3
    assert survey(*good, *bad[:2]).n_documents == 200
    with pytest.raises(DataError, match=r"many\.jsonl: line 198: .*; so are 3 of 200 documents"):
        survey(*good[1:], *bad)
    with pytest.raises(DataError, match=r"many\.jsonl: line 1: holds no text"):
        survey(b"", b'{"text": ""}')


def test_marks_of_gpt_2_simple_part_a_text_into_documents(tmp_path):
    marked = "<|startoftext|>One.<|endoftext|>\n<|startoftext|>Two\nlines.<|endoftext|>\n\n<|endoftext|>Three."
    (tmp_path / "jokes.txt").write_text(marked)
    texts = [("jokes:1", "jokes", "One.\n"), ("jokes:2", "jokes", "Two\nlines.\n"), ("jokes:3", "jokes", "Three.\n")]
    assert read_all(corpus.manifest_of_files((str(tmp_path),))) == texts
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: jokes.txt, clean: none}]")
    assert read_all(corpus.read_manifest(tmp_path)) == [("jokes", "s", marked)]


CHATS = {
    "12/31/20, 10:15\u202fPM - Amos: It was late.": "Amos: It was late.",
    "31/12/2020 22:15 - Pam B: It was late.": "Pam B: It was late.",
    "\u200e[31.12.20, 22:15:03] ~ Anna: It was late.": "Anna: It was late.",
    "[2020-12-31, 10:15:03 p.m.] Anna: It was late.": "Anna: It was late.",
    "[31-Dec-20 10:15 PM] Anna\nIt was late.\n": "Anna\nIt was late.\n",
    "2020-12-31T22:15:03 Anna: It was late.": "Anna: It was late.",
    "[22:15] <Anna> It was late.": "<Anna> It was late.",
    "22:15:01 <@Anna> It was late.": "<@Anna> It was late.",
    "Anna, [31.12.20 22:15]\nIt was late.": "Anna:\nIt was late.",
}


@pytest.mark.parametrize("line, message", CHATS.items())
def test_a_chat_is_refused_with_the_command_that_writes_its_messages(tmp_path, line, message):
    (tmp_path / "chat.txt").write_text(f"{line}\n" * 20)
    with pytest.raises(
        DataError, match=r"chat\.txt: begins .*, as an exported chat does; write its messages "
    ) as caught:
        read_all(corpus.manifest_of_files((str(tmp_path),)))
    command = str(caught.value).partition("alone: ")[2].replace("FILE", "chat.txt")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "new.txt").read_text() == f"{message}\n" * 20
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: chat.txt, clean: none}]")
    assert len(read_all(corpus.read_manifest(tmp_path))) == 1


@pytest.mark.parametrize("line", ["1:10 In the beginning", "12.3.1941\nIt was late.", "10:15 He came.", "1.2.3 A part"])
def test_verses_diaries_and_numbered_parts_are_no_chats(tmp_path, line):
    (tmp_path / "a.txt").write_text(f"{line}\n" * 20)
    assert len(read_all(corpus.manifest_of_files((str(tmp_path),)))) == 1


@pytest.mark.parametrize("name, tool", [("a.csv", "pandas"), ("a.TSV", r"sep='\\t'"), ("a.json", "jq")])
def test_a_table_is_refused_with_what_writes_its_texts(tmp_path, name, tool):
    (tmp_path / name).write_text("id,tweet\n1,hello\n")
    with pytest.raises(
        DataError, match=rf"{name}: begins 'id,tweet', so it holds more than its texts; prepare its .*NAME.*{tool}"
    ):
        read_all(corpus.manifest_of_files((str(tmp_path / name),)))


ROWS = {
    "id,author,text\n": '{i},bob,"It was, he said,\nlate {i}."\n',
    "id;text\n": "{i};It was late\n",
    "id\ttext\n": "{i}\tIt was late\n",
    "[": '{{"text": "It was {i}"}},\n',
    "": '{{"text": "It was {i}"}}\n',
    "WEBVTT\n": "\n00:{i}.000 --> 00:{i}.900\nIt was late\n",
}


@pytest.mark.parametrize(
    ("head", "advice"),
    [*zip(ROWS, (r"read_csv\(FILE\)", "sep=';'", r"sep='\\t'", "jq", r"\.jsonl", "sed"), strict=True)],
)
def test_a_table_is_known_whatever_its_files_name(tmp_path, head, advice):
    (tmp_path / "a.txt").write_text(head + "".join(ROWS[head].format(i=i) for i in range(10, 40)))
    with pytest.raises(DataError, match=rf"a.txt: begins '.*', so it holds more than its texts; prepare .*{advice}"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))


@pytest.mark.parametrize(
    "lines", ["Rain, wind, night\n", '"It was," he said, "late."\n', "HAMLET\tTo be, or\n", "{ I }\n"]
)
def test_lines_with_commas_are_no_table(tmp_path, lines):
    (tmp_path / "a.txt").write_text(lines * 30)
    assert [doc[2] for doc in read_all(corpus.manifest_of_files((str(tmp_path),)))] == [lines * 30]


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

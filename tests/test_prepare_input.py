"""prepare.py: which texts it takes, how they may be named, and what it prints about those it can't take."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import run_script
from test_prepare import BOOKS, BPE, CHAR, REPO, WORDS, read, run, run_on, write_books, write_manifest

import train
from robopoet.errors import ConfigError, DataError
from robopoet.text import tokenizer
from train import TrainConfig


@pytest.fixture
def books(tmp_path) -> Path:
    return write_books(tmp_path / "my")


# --- bad input


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", r"empty\.txt"),
        ("blank.txt", b" \r\n\x1a", r"blank\.txt"),
        ("damaged.txt", "café".encode() + b"\xe9", r"damaged\.txt: byte 5 "),
        ("utf16.txt", "Alice".encode("utf-16")[:-1], r"utf16\.txt: byte 10 "),
        ("folder.txt", os.mkdir, r"folder\.txt: holds no \.txt"),
        ("pipe.txt", os.mkfifo, r"pipe\.txt: is not a regular file"),
    ],
)
def test_a_book_that_can_not_be_read_is_named_and_nothing_is_written(books, name, content, message):
    if callable(content):
        content(books / name)
    else:
        (books / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run_on(books, *CHAR)
    assert not (books.parent / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("argv", [BPE, CHAR], ids=["bpe", "char"])
def test_a_hundred_megabytes_on_one_line_take_at_most_ten_times_as_much_memory(tmp_path, argv):
    text = " ".join(random.Random(0).choices(WORDS, k=1_000_000)).encode()
    with open(tmp_path / "line.txt", "wb") as f:
        while f.tell() < 100_000_000:
            f.write(text)
    peak = "portable.peak_resident_mb()"
    command = f"import sys, configurator, prepare; from robopoet import portable; before = {peak}; "
    command += f"prepare.main(configurator.parse(prepare.PrepareConfig, sys.argv[1:])); print({peak} - before)"
    argv = (f"--input={tmp_path}/line.txt", f"--out={tmp_path}/out", *argv)
    done = subprocess.run([sys.executable, "-c", command, *argv], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert float(done.stdout.splitlines()[-1]) < 1000
    meta, bins = read(tmp_path / "out")
    tok = tokenizer.from_json(meta["tokenizer"])
    size = sum(len(tok.decode_bytes(ids.tolist())) for ids in bins.values())
    assert size == (tmp_path / "line.txt").stat().st_size + 1  # the line end that it lacked


def test_too_little_text_for_the_vocabulary_names_the_largest_that_works(books):
    with pytest.raises(DataError, match=r"at most (\d+)") as caught:
        run_on(books, "--vocab_size=6725")
    most = str(caught.value).split("at most ")[1].split(";")[0]
    meta, _ = read(run_on(books, f"--vocab_size={most}"))
    assert meta["vocab_size"] == int(most)


def test_the_vocabulary_grows_with_the_text_unless_its_size_is_given(books, tmp_path):
    meta, _ = read(run_on(books))
    most = "--vocab_size=6725"
    with pytest.raises(DataError, match=f"at most {meta['vocab_size']};"):  # so little text: all that it carries
        run_on(books, most)
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "long.txt").write_text(" ".join(f"w{i * i}" for i in range(20_000)))
    run(f"--input={tmp_path}/long", f"--out={tmp_path}/long/out")
    assert read(tmp_path / "long" / "out")[0]["vocab_size"] == tokenizer.fitting_vocab_size(207_781) == 2000
    sizes = [tokenizer.fitting_vocab_size(n) for n in (0, 10_000, 60_000, 125_000, 427_000, 1_500_000, 10**10)]
    assert sizes == sorted(sizes) and sizes[0] == 500 and sizes[-1] == 32_000 and sizes[3] == 1500


def test_a_text_of_one_character_leaves_nothing_to_train_on(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    run(f"--input={tmp_path}/x.txt", f"--out={tmp_path}/out")
    for minutes in (0, 0.1):
        cfg = TrainConfig(dataset=f"{tmp_path}/out", out_dir=f"{tmp_path}/run", device="cpu", minutes=minutes)
        with pytest.raises(DataError, match=r"(val|train)\.bin: .*must have at least"):
            train.main(cfg)


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"new\nline.txt"])
def test_a_file_name_that_is_not_text_is_reported_in_one_line(books, name):
    with open(os.path.join(os.fsencode(books), name), "wb") as f:
        f.write(b"text")
    with pytest.raises(DataError, match=r"^'.*\.txt': the name is not UTF-8") as caught:
        run_on(books, *CHAR)
    assert str(caught.value).isascii() and "\n" not in str(caught.value)


# --- what is named on the command line


@pytest.mark.parametrize("shape", ["files", "glob", "space", "folder", "both"])
def test_books_may_be_named_in_any_way(books, shape):
    paths = [str(path) for path in sorted(books.iterdir())]
    out = books.parent / "out"
    argv = {
        "files": paths,
        "glob": [f"{books}/*.txt"],
        "space": ["--input", *paths],  # as a shell leaves `--input my/*.txt`
        "folder": [str(books)],
        "both": [f"--input={books}", paths[0]],
    }[shape]
    run(*argv, f"--out={out}", *CHAR)
    assert list(read(out)[0]["styles"]) == ["alice", "king_lear"]


@pytest.mark.parametrize("key", ["", "--input=", "--corpus="])
def test_a_corpus_may_be_named_in_any_way(tmp_path, key):
    folder = write_manifest(tmp_path / "one", "sources: [{style: s, file: input.txt}]\n", BOOKS["alice"])
    (folder / "other.txt").write_text("not of the corpus")
    run(f"{key}{folder}", "--tokenizer=char")
    assert read(folder)[0]["splits"]["train"]["documents"][0]["style"] == "s"


def advice(*argv: str) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        run(*argv, *CHAR)
    return str(caught.value)


def test_the_advice_about_what_to_prepare_works(books, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["my"], ["my/alice.txt", "my/king lear.txt"], ["--input=my/*.txt"]):
        message = advice(*argv)
        assert len(message.splitlines()) == 1
        run(*argv, message.split("e.g. ")[1], *CHAR)  # --out=data/my
        assert read(Path(message.split("--out=")[1]))
    message = advice("--corpus=my")
    assert message.startswith("my/corpus.yaml: not found")
    run(message.split("pass the texts: ")[1], "--out=a", *CHAR)  # --input=my
    assert read(Path("a"))
    corpora = [
        str(write_manifest(tmp_path / name, "sources: [{style: s, file: '*.txt'}]", "text " * 99)) for name in "xy"
    ]
    for argv in (corpora, ["my", corpora[0]]):
        assert f"{corpora[0]}: holds a corpus.yaml; prepare it alone, or name its files" in advice(*argv, "--out=b")
    run(corpora[0], *CHAR)
    run("my", f"{corpora[0]}/*.txt", "--out=b", *CHAR)
    assert list(read(Path("b"))[0]["styles"]) == ["alice", "king_lear", "input"]


def test_a_missing_input_is_reported_with_or_without_out(tmp_path):
    (tmp_path / "empty").mkdir()
    for argv in ([f"{tmp_path}/none"], [f"{tmp_path}/none*.txt"], [f"--input={tmp_path}/none", f"--out={tmp_path}/o"]):
        assert f"--input: no file matches {tmp_path}/none" in advice(*argv)
    assert "empty: holds no .txt, .md, .html" in advice(f"{tmp_path}/empty")
    assert "out:" not in advice(f"{tmp_path}/none")  # a corpus needs none
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "argv, near",
    [
        (["data/robopot"], "data/robopoet"),
        (["data/robopot", "--out=x"], "data/robopoet"),
        (["--corpus=data/robopot"], "data/robopoet/corpus.yaml"),
    ],
)
def test_what_is_misspelled_names_the_nearest(tmp_path, monkeypatch, argv, near):
    monkeypatch.chdir(tmp_path)
    assert f"; did you mean {near}?" in advice(*argv)
    with pytest.raises(ConfigError, match=r"tokenizer: found 'chr', must be auto, .* checkpoint; did you mean char\?"):
        run("data/robopoet", "--out=x", "--tokenizer=chr")


def test_losses_and_copies_are_warned_of_unless_the_text_is_pinned(tmp_path, capsys):
    manifest = "sources: [{style: a, file: input.txt, remove: ['(?s)rabbit.*']}, {style: b, file: input.txt}]\n"
    folder = write_manifest(
        tmp_path / "c", manifest.replace("b, file", "b, remove: ['(?s)rabbit.*'], file"), BOOKS["alice"]
    )
    run(str(folder), *CHAR)
    lost, copy = capsys.readouterr().err.splitlines()[-2:]
    assert lost.startswith(f"warning: {folder}/input.txt: cleaning kept ") and "begin 'rabbit" in lost
    assert copy.startswith(f"warning: {folder}/input.txt: is the same text as {folder}/input.txt")
    pin = f"text_sha256: {read(folder)[0]['text_sha256']}\n"
    (folder / "corpus.yaml").write_text((folder / "corpus.yaml").read_text() + pin)
    run(str(folder), *CHAR)
    assert "warning" not in capsys.readouterr().err


def test_a_mistake_on_the_command_line_prints_one_line_and_exits_2(tmp_path):
    done = run_script("prepare.py", f"--input={tmp_path}/*.txt", f"--out={tmp_path}/out")
    assert done.returncode == 2
    assert done.stderr.startswith("prepare.py: --input: no file matches")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""

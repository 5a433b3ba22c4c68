"""prepare.py: books in, bins and meta.json out; all files or none, and only if something has changed."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import decode

import configurator
import prepare
from robopoet.errors import DataError
from robopoet.text import corpus, dataset, tokenizer, windows
from robopoet.text.tokenizer import END, BPETokenizer, CharTokenizer

REPO = Path(__file__).parent.parent
WORDS = "the rabbit queen of hearts said never more and rose again by night, went home!".split()


def make_book(seed: int, n_paragraphs: int = 60) -> str:
    """Random text that cleaning leaves unchanged."""
    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(n_paragraphs)) + "\n"


BOOKS = {"alice": make_book(1), "king lear": make_book(2, 40) + "\nThé 東京 end.\n"}


def write_books(folder: Path) -> Path:
    """A folder with two books, one of them with DOS line ends."""
    folder.mkdir()
    for name, text in BOOKS.items():
        (folder / f"{name}.txt").write_bytes(text.replace("\n", "\r\n" if name == "alice" else "\n").encode())
    return folder


@pytest.fixture
def books(tmp_path) -> Path:
    return write_books(tmp_path / "my")


def run(*argv: str) -> None:
    prepare.main(configurator.parse(prepare.PrepareConfig, list(argv), "input"))


def run_on(books: Path, *argv: str) -> Path:
    out = books.parent / "out"
    run(f"--input={books}/*.txt", f"--out={out}", *argv)
    return out


def read(out: Path) -> tuple[dict, dict[str, np.ndarray]]:
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return meta, {name: np.fromfile(out / f"{name}.bin", dtype="<u2") for name in ("train", "val", "test")}


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a dataset but its lock."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


BPE, CHAR = ("--tokenizer=bpe", "--vocab_size=300"), ("--tokenizer=char",)


@pytest.mark.parametrize("argv", [BPE, CHAR], ids=["bpe", "char"])
def test_bins_hold_the_books_and_meta_says_where(books, argv):
    out = run_on(books, *argv)
    names = ["meta.json", *(["meta.pkl"] if argv == CHAR else []), "test.bin", "train.bin", "val.bin"]
    assert sorted(contents(out)) == names
    meta, bins = read(out)
    tok = tokenizer.from_json(meta["tokenizer"])
    end = tok.specials[END]
    assert meta["vocab_size"] == tok.vocab_size
    assert meta["styles"] == {"alice": tok.specials["<|alice|>"], "king_lear": tok.specials["<|king_lear|>"]}
    again = dict.fromkeys(BOOKS, "")
    for name, ids in bins.items():
        entry = meta["splits"][name]
        assert (out / f"{name}.bin").stat().st_size == 2 * entry["tokens"] == 2 * len(ids)
        place = 0
        texts = []
        for span in entry["documents"]:
            assert span["start"] == place
            place = span["stop"]
            *text, last = ids[span["start"] : span["stop"]].tolist()
            assert last == end  # which parts the documents
            assert all(id < len(tok.tokens) for id in text)
            assert span["style"] == span["name"].replace(" ", "_")
            texts.append(decode(tok, text))
            again[span["name"]] += texts[-1]
        assert place == len(ids)
        assert [span["name"] for span in entry["documents"]] == ["alice", "king lear"]  # every style in every split
        assert entry["characters"] == len("".join(texts))
        assert entry["bytes"] == len("".join(texts).encode())
    assert again == BOOKS
    for name, share in {"train": 0.9, "val": 0.05, "test": 0.05}.items():
        assert meta["splits"][name]["characters"] / sum(map(len, BOOKS.values())) == pytest.approx(share, abs=0.03)
    joined = "".join(f"{name}\0{name.replace(' ', '_')}\0{text}\0" for name, text in BOOKS.items())
    assert meta["text_sha256"] == hashlib.sha256(joined.encode()).hexdigest()


def test_vocab_size_is_exact_and_all_ids_lie_within(books):
    for size in (259, 281):
        meta, bins = read(run_on(books, f"--vocab_size={size}"))
        assert meta["vocab_size"] == size
        assert max(ids.max() for ids in bins.values()) < size


def test_bpe_learns_from_the_train_split_alone(books):
    text = BOOKS["alice"] + "\n" + "\n\n".join(["zq" * 10] * 14) + "\n"  # a word of the last tenth only
    assert text.index("zq") > 0.9 * len(text)
    (books / "alice.txt").write_text(text)
    meta, _ = read(run_on(books, *BPE))
    assert not any(b"zq" in token for token in tokenizer.from_json(meta["tokenizer"]).tokens)
    specials = meta["tokenizer"]["specials"]
    assert b"zq" in BPETokenizer.train([text, BOOKS["king lear"]], 300, specials).tokens  # as it is common over all


def test_one_book_has_no_specials_and_no_tag(books, monkeypatch):
    (books / "king lear.txt").unlink()
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 50)
    meta, bins = read(run_on(books, *CHAR))
    assert meta["styles"] == {}
    assert meta["vocab_size"] == len(set(BOOKS["alice"]))
    assert [meta["splits"][name]["largest"] for name in bins] == [ids.max() for ids in bins.values()]
    assert decode(tokenizer.from_json(meta["tokenizer"]), np.concatenate(list(bins.values()))) == BOOKS["alice"]


@pytest.mark.parametrize("name", ["endoftext", "unk"])
@pytest.mark.parametrize("argv", [BPE, CHAR], ids=["bpe", "char"])
def test_a_book_named_like_a_special_token_is_refused_or_has_its_own_style(books, name, argv):
    (books / f"{name}.txt").write_text(make_book(3))
    try:
        meta, bins = read(run_on(books, *argv))
    except DataError as e:
        assert name in str(e)
        return
    tok = tokenizer.from_json(meta["tokenizer"])
    assert len(set(meta["styles"].values())) == 3
    assert all(ids[-1] == tok.specials[END] for ids in bins.values())
    assert max(*meta["styles"].values(), tok.specials[END]) < meta["vocab_size"] == tok.vocab_size


def test_a_failed_download_of_gpt2s_table_is_reported(books, monkeypatch):
    def offline(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(DataError, match="GPT-2"):
        run_on(books, "--tokenizer=gpt2")
    assert not (books.parent / "out" / "meta.json").exists()


# --- doing no more than is needed


def age(out: Path) -> None:
    for name in contents(out):
        os.utime(out / name, ns=(10**18, 10**18))


def renewed(out: Path) -> bool:
    times = {(out / name).stat().st_mtime_ns for name in contents(out)}
    assert times == {10**18} or 10**18 not in times  # all or none
    return times != {10**18}


def test_a_prepared_corpus_is_left_alone(books, capsys):
    out = run_on(books, *CHAR)
    before = contents(out)
    age(out)
    run_on(books, *CHAR)
    assert not renewed(out)
    assert "prepared already" in capsys.readouterr().out
    run_on(books, *CHAR, "--force")
    assert renewed(out)
    assert contents(out) == before


def test_a_corpus_that_was_prepared_when_auto_was_written_0_is_left_alone():
    manifest = corpus.Manifest((corpus.Source(style="a", url="http://a/b"),))
    earlier = "0130184f202e70c1de56456d2796eaffc3bafadccc7ceaa9ecc11dc37dfd8516"
    assert prepare._fingerprint(prepare.PrepareConfig(vocab_size=None), manifest, None, "") == earlier


@pytest.mark.parametrize("change", ["text", "one more", "option", "short bin", "no bin", "damaged meta"])
def test_a_change_makes_it_prepare_again(books, change):
    out = run_on(books, *CHAR)
    age(out)
    if change == "text":
        text = (books / "alice.txt").read_text()
        (books / "alice.txt").write_text(text.replace("rabbit", "robbit", 1))
    elif change == "one more":
        (books / "c.txt").write_text(make_book(3))
    elif change == "short bin":
        (out / "val.bin").write_bytes((out / "val.bin").read_bytes()[:-2])
    elif change == "no bin":
        (out / "test.bin").unlink()
    elif change == "damaged meta":
        (out / "meta.json").write_bytes((out / "meta.json").read_bytes()[:-1])
    run_on(books, *(BPE if change == "option" else CHAR))
    assert renewed(out)
    meta, bins = read(out)
    assert all(len(ids) == meta["splits"][name]["tokens"] for name, ids in bins.items())


@pytest.mark.parametrize("argv", [BPE, CHAR], ids=["bpe", "char"])
def test_a_failure_midway_leaves_the_bins_before_and_no_partial_files(books, monkeypatch, argv):
    out = run_on(books, *argv)
    before = contents(out)
    kind = BPETokenizer if argv is BPE else CharTokenizer
    encode, calls = kind.encode_pieces, []

    def fail_in_the_second_book(self, pieces):
        calls.append(pieces)
        if len(calls) > len(dataset.SPLITS):
            raise OSError("disk full")
        return encode(self, pieces)

    monkeypatch.setattr(tokenizer, "BATCH_CHARS", 1)
    monkeypatch.setattr(kind, "encode_pieces", fail_in_the_second_book)
    with pytest.raises(OSError, match="disk full"):
        run_on(books, *argv, "--force")
    assert contents(out) == before
    monkeypatch.undo()
    run_on(books, *argv, "--force")
    assert contents(out) == before


def test_a_failing_write_leaves_no_partial_files(books, monkeypatch):
    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run_on(books, *CHAR)
    assert contents(books.parent / "out") == {}


def test_bins_are_flushed_to_the_disk_before_meta_json_names_them(books, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file)))
    out = run_on(books, *CHAR)
    *bins, meta = (
        flushed.index((out / name).stat().st_ino) for name in ("train.bin", "val.bin", "test.bin", "meta.json")
    )
    assert max(bins) < meta


def test_a_text_that_changes_while_it_is_read_is_refused(books, monkeypatch):
    read_again, passes = corpus.documents, []

    def documents(manifest):
        passes.append(manifest)
        for doc in read_again(manifest):
            yield dataclasses.replace(doc, text=doc.text.upper()) if len(passes) > 1 else doc

    monkeypatch.setattr(corpus, "documents", documents)
    for argv in (BPE, CHAR):
        passes.clear()
        with pytest.raises(DataError, match="changed while"):
            run_on(books, *argv)
        out = books.parent / "out"
        assert not out.exists() or contents(out) == {}


# --- many documents


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


@pytest.mark.parametrize("argv", [BPE, CHAR], ids=["bpe", "char"])
def test_each_of_many_documents_goes_to_one_split_and_a_span_holds_all_of_a_style(tmp_path, argv):
    styles = {"day": [make_book(i, 1 + i % 3) for i in range(150)], "night": [make_book(-i, 1) for i in range(1, 90)]}
    for style, texts in styles.items():
        write_lines(tmp_path / f"{style}.jsonl", texts)
    run(f"--input={tmp_path}", f"--out={tmp_path}/out", *argv)
    meta, bins = read(tmp_path / "out")
    tok = tokenizer.from_json(meta["tokenizer"])
    expected: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in bins}
    for style, texts in styles.items():
        for number, text in enumerate(texts, 1):
            place = int(hashlib.sha256(f"{style}:{number}\0{text}".encode()).hexdigest()[:16], 16) / 16**16
            split = "train" if place < 0.9 else "val" if place < 0.95 else "test"
            expected[split].append((style, [*tok.encode(text), tok.specials[END]]))
    for name, ids in bins.items():
        assert ids.tolist() == [id for _, document in expected[name] for id in document]
        spans = meta["splits"][name]["documents"]
        for style, span in zip(styles, spans, strict=True):
            of_style = [document for its, document in expected[name] if its == style]
            assert (span["style"], span["works"]) == (style, len(of_style))
            assert span["stop"] - span["start"] == sum(map(len, of_style))
        assert (spans[0]["start"], spans[0]["stop"], spans[1]["stop"]) == (0, spans[1]["start"], len(ids))
        split = windows.open_split(tmp_path / "out", name, dataset.read_meta(tmp_path / "out"), 8, torch.device("cpu"))
        starts, stops, span = split.documents
        assert (stops - starts).tolist() == [len(document) for _, document in expected[name]]
        assert [split.styles[i] for i in span] == [style for style, _ in expected[name]]


def test_up_to_two_hundred_documents_each_have_spans_of_their_own(tmp_path):
    for n in (200, 201):
        write_lines(tmp_path / "a.jsonl", [make_book(i, 3) for i in range(n)])
        run(f"--input={tmp_path}/a.jsonl", f"--out={tmp_path}/out", *CHAR)
        entries = read(tmp_path / "out")[0]["splits"].values()
        assert [entry["end"] >= 0 for entry in entries] == [n == 201] * 3
        assert [len(entry["documents"]) for entry in entries] == ([180, 10, 10] if n == 200 else [1] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [("--vocab_size=1000",), CHAR], ids=["bpe", "char"])
def test_three_times_the_documents_take_no_more_memory(tmp_path, argv):
    rng, peaks = random.Random(0), []
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(20_000)]
    texts = [" ".join(rng.choices(words, k=400)) for _ in range(1000)]
    command = "import sys, configurator, prepare; from robopoet import portable; "
    command += "prepare.main(configurator.parse(prepare.PrepareConfig, sys.argv[1:])); "
    command += "print(portable.peak_resident_mb())"
    for times in (1, 3):
        with open(tmp_path / "many.jsonl", "w") as lines:
            for _ in range(times * 25_000):  # 60 MB
                lines.write(json.dumps({"text": rng.choice(texts)}) + "\n")
        keys = (f"--input={tmp_path}/many.jsonl", f"--out={tmp_path}/out", *argv)
        done = subprocess.run([sys.executable, "-c", command, *keys], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1000:]
        peaks.append(float(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.15 * peaks[0] and peaks[1] < 1000  # MB


# --- manifests


def write_manifest(folder: Path, text: str, content: str) -> Path:
    folder.mkdir()
    (folder / "corpus.yaml").write_text(text)
    (folder / "input.txt").write_bytes(content.encode())
    return folder


def test_an_uncleaned_corpus_without_tags_has_nanogpts_ids_and_no_specials(tmp_path):
    text = "\n First Citizen:\r\nBefore we proceed,  any further… \n\n\n" * 37 + "~"
    manifest = "sources: [{style: s, file: input.txt, clean: none}]\nsplits: [0.9, 0.1, 0]\ntags: false\n"
    folder = write_manifest(tmp_path / "chars", manifest, text)
    run(str(folder), "--tokenizer=char")
    meta, bins = read(folder)
    stoi = {char: id for id, char in enumerate(sorted(set(text)))}  # as nanoGPT's data/shakespeare_char/prepare.py
    cut = int(len(text) * 0.9)
    assert bins["train"].tolist() == [stoi[char] for char in text[:cut]]
    assert bins["val"].tolist() == [stoi[char] for char in text[cut:]]
    assert len(bins["test"]) == 0
    assert meta["vocab_size"] == len(stoi)
    assert (meta["tokenizer"]["specials"], meta["styles"]) == ([], {})


def test_nanogpts_manifest_is_uncleaned_and_without_tags():
    manifest = corpus.read_manifest(REPO / "data" / "shakespeare_char")
    assert (tuple(manifest.splits), manifest.tags) == ((0.9, 0.1, 0), False)
    assert [source.clean for source in manifest.sources] == ["none"]


def test_a_text_that_is_not_the_one_pinned_is_refused(tmp_path):
    manifest = f"sources: [{{style: s, file: input.txt}}]\ntext_sha256: {'0' * 64}\n"
    folder = write_manifest(tmp_path / "pinned", manifest, BOOKS["alice"])
    with pytest.raises(DataError, match="text_sha256") as caught:
        run(str(folder))
    found = str(caught.value).split("hash is ")[1].split(",")[0]
    (folder / "corpus.yaml").write_text(manifest.replace("0" * 64, found))
    run(str(folder), "--tokenizer=char")
    assert read(folder)[0]["text_sha256"] == found


def test_a_style_that_looks_like_a_number_keeps_its_tag(tmp_path):
    manifest = "sources: [{style: 1984, file: input.txt}, {style: other, file: input.txt}]\n"
    folder = write_manifest(tmp_path / "numbers", manifest, BOOKS["alice"])
    run(str(folder), "--tokenizer=char")
    meta, _ = read(folder)
    assert {span["style"] for span in meta["splits"]["train"]["documents"]} <= set(meta["styles"])


def test_a_full_disk_names_the_folder_and_leaves_none_of_the_bins(books, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"File too large: '{books.parent}/out'"):
                run_on(books)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(books.parent / "out") == [".lock"]

"""The index finds what a brute-force search finds, and refuses a text that the checkpoint was not trained on."""

import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.writing.originality import Originality

WORDS = "a b to be, née — \u2019tis".split()


def make_folder(folder, seed):
    """Bins of two works over a vocabulary of a few words, so that runs of every length recur."""
    rng = random.Random(seed)
    for name in ("one", "two"):
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    files = (str(folder / "*.txt"),)
    prepare.main(prepare.PrepareConfig(input=files, out=str(folder / "bins"), tokenizer="char"))
    return folder / "bins"


def sha256_of(folder):
    return json.loads((folder / "meta.json").read_text())["text_sha256"]


def works_of(folder):
    """The train split's works, decoded token by token; white space, and either end, becomes one space."""
    meta = json.loads((folder / "meta.json").read_text())
    tok, ids = tokenizer.from_json(meta["tokenizer"]), np.fromfile(folder / "train.bin", "<u2").tolist()
    spans = [(doc["name"], doc["start"], doc["stop"]) for doc in meta["splits"]["train"]["documents"]]
    texts = [
        (name, "".join(tok.chars[id] for id in ids[start:stop] if id < len(tok.chars))) for name, start, stop in spans
    ]
    return {name: f" {' '.join(text.split())} " for name, text in texts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("originality"), 1)


@pytest.fixture(scope="module")
def index(folder):
    return Originality(folder, sha256_of(folder))


@pytest.fixture(scope="module")
def works(folder):
    return works_of(folder)


PIECES = st.one_of(
    st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 900), st.integers(0, 80)),  # a copy, cut anywhere
    st.sampled_from([*WORDS, "new", " ", "\n\n\t", "\u00a0", "é", ""]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_it_finds_what_a_search_for_every_run_of_words_finds(index, works, pieces):
    text = " ".join(piece if isinstance(piece, str) else works[piece[0]][piece[1] :][: piece[2]] for piece in pieces)
    words = text.split()

    def occurs(run):
        return any(f" {run} " in work for work in works.values())

    runs = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    report = index.check(text)
    longest = [run for run in runs if occurs(run)]
    assert len(report.longest) == max(map(len, longest), default=0) and report.longest in ["", *longest]
    assert report.work == next((name for name in works if report.longest and f" {report.longest} " in works[name]), "")
    for n in (4, 8, 12):
        sequences = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        new = [not occurs(sequence) for sequence in sequences]
        assert report.new[n] == (pytest.approx(sum(new) / len(new)) if new else None)


def test_a_planted_copy_is_found_however_its_lines_break(index, works):
    run = " ".join(works["two"].split()[20:40])
    assert run not in works["one"]
    report = index.check(f"quite new\n{run.replace(' ', chr(10), 7)}\tand again")
    assert (report.longest, report.work) == (run, "two")
    assert report.new == {4: 4 / 21, 8: 4 / 17, 12: 4 / 13}
    assert report.describe().startswith(f'longest copy: {len(run)} characters, "{run[:20]}')


def test_new_text_is_reported_as_new(index):
    report = index.check("not one of these words")
    assert (report.longest, report.work, report.new) == ("", "", {4: 1.0, 8: None, 12: None})
    assert report.describe() == "longest copy: none\nnot in the training text: 100% of its 4-word sequences"
    assert index.check(" \n").new == {4: None, 8: None, 12: None} and "too short" in index.check("").describe()


def test_no_match_runs_from_one_work_into_the_next(index, works):
    ends, begins = works["one"].split()[-6:], works["two"].split()[:6]
    report = index.check(" ".join(ends + begins))
    assert len(report.longest.split()) < 12 and report.new[12] == 1.0


def test_a_dataset_with_another_text_than_the_checkpoints_is_refused(folder, tmp_path):
    for sha256 in ("0" * 64, ""):
        with pytest.raises(DataError, match=r"meta\.json: text_sha256 is .*name the dataset"):
            Originality(folder, sha256)
    with pytest.raises(DataError, match=r"meta\.json: not found; run"):
        Originality(tmp_path, sha256_of(folder))
    shutil.copytree(folder, tmp_path / "bins")
    (tmp_path / "bins" / "train.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"train\.bin: is 1 bytes long"):
        Originality(tmp_path / "bins", sha256_of(folder))

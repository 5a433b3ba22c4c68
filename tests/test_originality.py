"""What is copied is found, and nothing else; an index of another text is never believed."""

import io
import json
import random
import shutil

import numpy as np
import pydivsufsort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.writing.originality import Originality

WORDS = "a b to be, née — \u2019tis".split()


def make_folder(folder, seed):
    """Bins of two works of few words in many orders, so that runs of every length come again."""
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
    """The train split's works, decoded token by token, with a space for all white space and around them."""
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
def test_it_finds_what_a_search_of_every_run_finds(index, works, pieces):
    text = " ".join(piece if isinstance(piece, str) else works[piece[0]][piece[1] :][: piece[2]] for piece in pieces)
    words = text.split()

    def stands(run):
        return any(f" {run} " in work for work in works.values())

    runs = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    report = index.check(text)
    longest = [run for run in runs if stands(run)]
    assert len(report.longest) == max(map(len, longest), default=0) and report.longest in ["", *longest]
    assert report.work == next((name for name in works if report.longest and f" {report.longest} " in works[name]), "")
    for n in (4, 8, 12):
        sequences = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        new = [not stands(sequence) for sequence in sequences]
        assert report.new[n] == (pytest.approx(sum(new) / len(new)) if new else None)


def test_a_planted_copy_is_found_however_its_lines_break(index, works):
    run = " ".join(works["two"].split()[20:40])
    assert run not in works["one"]
    report = index.check(f"quite new\n{run.replace(' ', chr(10), 7)}\tand again")
    assert (report.longest, report.work) == (run, "two")
    assert report.new == {4: 4 / 21, 8: 4 / 17, 12: 4 / 13}
    assert report.describe().startswith(f'longest copy: {len(run)} characters, "{run[:20]}')


def test_what_is_new_is_told_as_new(index):
    report = index.check("not one of these words")
    assert (report.longest, report.work, report.new) == ("", "", {4: 1.0, 8: None, 12: None})
    assert report.describe() == "longest copy: none\nnot in the training text: 100% of its 4-word sequences"
    assert index.check(" \n").new == {4: None, 8: None, 12: None} and "too short" in index.check("").describe()


def test_a_run_ends_with_its_work(index, works):
    ends, begins = works["one"].split()[-6:], works["two"].split()[:6]
    report = index.check(" ".join(ends + begins))
    assert len(report.longest.split()) < 12 and report.new[12] == 1.0


def test_the_index_is_kept_and_made_again_for_another_text(folder, tmp_path, monkeypatch):
    mine = tmp_path / "bins"
    shutil.copytree(folder, mine)
    (mine / "originality.npz").unlink(missing_ok=True)
    passage = "to be, a b née " * 9
    expected = Originality(mine, sha256_of(mine)).check(passage)
    assert sorted(path.name for path in mine.glob("originality*")) == ["originality.npz"]
    with monkeypatch.context() as m:
        m.setattr(pydivsufsort, "divsufsort", lambda text: pytest.fail("it was made again"))
        assert Originality(mine, sha256_of(mine)).check(passage) == expected
    other = make_folder(tmp_path, 2)  # prepared into the same folder
    assert other == mine and works_of(mine) != works_of(folder)
    theirs = " ".join(works_of(mine)["two"].split()[:30])
    assert Originality(mine, sha256_of(mine)).check(theirs).longest == theirs


def test_a_damaged_index_is_made_again(folder, tmp_path):
    mine = tmp_path / "bins"
    shutil.copytree(folder, mine)
    passage = " ".join(works_of(mine)["one"].split()[10:30]) + " new " + "b b a b " * 5
    expected = Originality(mine, sha256_of(mine)).check(passage)
    cache = mine / "originality.npz"
    whole = cache.read_bytes()
    rng = random.Random(3)
    places = [*range(30), *(rng.randrange(len(whole)) for _ in range(50)), *range(len(whole) - 30, len(whole))]
    flips = [(place, rng.randrange(8)) for place in places]
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    damaged += [whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for place, bit in flips]
    with np.load(cache) as saved:
        arrays = dict(saved)
    arrays["text"] = arrays["text"][:300]  # as a bit in its header has it, which no CRC tells of an array read in part
    shorter = io.BytesIO()
    np.savez(shorter, **arrays)
    damaged.append(shorter.getvalue())
    for content in damaged:
        cache.write_bytes(content)
        assert Originality(mine, sha256_of(mine)).check(passage) == expected


def test_where_the_index_can_not_be_kept_it_serves_all_the_same(folder, tmp_path):
    mine = tmp_path / "bins"
    shutil.copytree(folder, mine, ignore=shutil.ignore_patterns("*.npz"))
    (mine / "originality.npz.part").mkdir()
    assert Originality(mine, sha256_of(mine)).check("new").longest == ""
    assert not (mine / "originality.npz").exists()


def test_another_text_than_the_checkpoints_is_refused(folder, tmp_path):
    for sha256 in ("0" * 64, ""):
        with pytest.raises(DataError, match=r"meta\.json: text_sha256 is .*name the dataset"):
            Originality(folder, sha256)
    with pytest.raises(DataError, match=r"meta\.json: not found; run"):
        Originality(tmp_path, sha256_of(folder))
    shutil.copytree(folder, tmp_path / "bins")
    (tmp_path / "bins" / "train.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"train\.bin: is 1 bytes long"):
        Originality(tmp_path / "bins", sha256_of(folder))

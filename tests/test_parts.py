"""Which split each document goes to, and where it is cut."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.text import corpus, dataset, sources
from robopoet.text.corpus import Document


def make_documents(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", f"s{i % 3}", text, "") for i, text in enumerate(texts)]


def split_all(docs: list[Document], shares: tuple[float, ...], exact: bool) -> dict[str, list[tuple[Document, str]]]:
    """What each split has of each document."""
    source = sources.Source(style="s", file="s.txt", clean="none" if exact else "text")
    splits: dict[str, list[tuple[Document, str]]] = {name: [] for name in dataset.SPLITS}
    for part, text in corpus.parts(docs, corpus.Manifest((source,), shares), corpus.survey(docs)):
        splits[part.split].append((docs[part.number], text))
    return splits


SHARES = st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)
TEXTS = st.lists(st.text(st.sampled_from("ab\n "), min_size=1, max_size=80), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(TEXTS, SHARES, st.booleans(), st.booleans())
def test_every_character_goes_to_just_one_split(texts, shares, exact, many):
    docs = make_documents(texts * 201 if many else texts)
    splits = split_all(docs, shares, exact)
    again = dict.fromkeys((doc.name for doc in docs), "")
    for parts in splits.values():
        assert all(text for _, text in parts)
        for doc, text in parts:
            again[doc.name] += text
    assert again == {doc.name: doc.text for doc in docs}
    # and within each split the documents keep their order
    for parts in splits.values():
        numbers = [int(doc.name[1:]) for doc, _ in parts]
        assert numbers == sorted(numbers)


def test_documents_are_cut_at_blank_lines_near_the_shares():
    paragraphs = [f"Paragraph {i}\nhas two lines.\n\n" for i in range(200)]
    docs = make_documents(["".join(paragraphs)] * 3)
    splits = split_all(docs, (0.8, 0.1, 0.1), exact=False)
    for name, share in zip(dataset.SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert [doc for doc, _ in splits[name]] == docs
        for doc, text in splits[name]:
            assert text.startswith("Paragraph")
            assert text.endswith("\n\n")
            assert abs(len(text) - share * len(doc.text)) <= 2 * len(paragraphs[-1])
    assert all(text.endswith("\n\n") for _, text in split_all(docs, (0.8, 0.2, 0.0), exact=False)["train"])


def test_each_split_gets_its_share_though_blank_lines_are_far_between():
    text = "".join(f"Of Man's first disobedience, line {i}\n" + "\n" * (i % 400 == 7) for i in range(1200))
    splits = split_all(make_documents([text]), corpus.DEFAULT_SPLITS, exact=False)
    for name, share in zip(dataset.SPLITS, corpus.DEFAULT_SPLITS, strict=True):
        ((_, part),) = splits[name]
        assert abs(len(part) - share * len(text)) <= 0.0375 * len(text) and part.endswith("\n")


def test_without_blank_lines_a_line_is_not_cut_and_without_lines_a_word_is():
    lines = split_all(make_documents(["line of text\n" * 50]), (0.8, 0.1, 0.1), exact=False)
    assert all(text.endswith("text\n") for parts in lines.values() for _, text in parts)
    words = split_all(make_documents(["word " * 20]), (0.8, 0.1, 0.1), exact=False)
    assert [len(words[name][0][1]) for name in dataset.SPLITS] == [80, 10, 10]


def test_an_exact_cut_is_nanogpts():
    for n in [*range(1, 300), 1000, 12_345, 1_115_394]:
        text = ("0123456789\n\n" * (n // 12 + 1))[:n]
        splits = split_all(make_documents([text]), (0.9, 0.1, 0), exact=True)
        joined = {name: "".join(part for _, part in parts) for name, parts in splits.items()}
        assert joined == {"train": text[: int(n * 0.9)], "val": text[int(n * 0.9) :], "test": ""}


def aphorisms(n: int) -> list[Document]:
    return make_documents([f"Grey heron number {i},\n\nabove the mill pond water.\n" for i in range(n)])


@pytest.mark.parametrize("shares", [(0.9, 0.05, 0.05), (0.9, 0.1, 0.0), (0.4, 0.3, 0.3), (0.02, 0.08, 0.9)])
@pytest.mark.parametrize("exact", [False, True])
def test_short_documents_stay_whole_whatever_their_number_and_train_and_val_have_some(shares, exact):
    for n in (2, 3, 4, 5, 9, 10, 11, 19, 40, 150, 199, 200, 201):
        docs = aphorisms(n)
        splits = split_all(docs, shares, exact)
        assert all(text == doc.text for parts in splits.values() for doc, text in parts)
        assert splits["train"] and splits["val"]
        if n <= 200:
            for name, share in zip(dataset.SPLITS, shares, strict=True):
                assert abs(len(splits[name]) - n * share) <= 2
        again = split_all(docs[::-1], shares, exact)  # their order does not matter
        assert all(splits[name] == again[name][::-1] for name in dataset.SPLITS)


def test_a_short_document_stays_whole_among_long_ones_which_are_cut():
    docs = make_documents(["A line of a long tale.\n\n" * 2000] * 30)
    docs[7] = dataclasses.replace(docs[7], text="A short preface.\n\nThat is all.\n")
    splits = split_all(docs, corpus.DEFAULT_SPLITS, exact=False)
    assert (docs[7], docs[7].text) in splits["train"]
    assert all([doc for doc, _ in splits[name]] == docs[:7] + docs[8:] for name in ("val", "test"))


def test_a_few_tales_are_cut_where_whole_ones_would_take_half_of_the_text_from_train():
    tale = "A paragraph of a tale that is not long.\n\n" * 150  # 6 KB
    cut = split_all(make_documents([tale] * 3), corpus.DEFAULT_SPLITS, exact=False)
    assert [len(parts) for parts in cut.values()] == [3, 3, 3]
    assert all(text.endswith("\n\n") for parts in cut.values() for _, text in parts)
    whole = split_all(make_documents([f"{i}{tale}" for i in range(30)]), corpus.DEFAULT_SPLITS, exact=False)
    assert [len(parts) for parts in whole.values()] == [27, 2, 1]


def test_names_of_single_short_works_are_no_styles():
    def tags_of(docs: list[Document], tags: bool = True) -> list[str]:
        source = sources.Source(style="s", file="s.txt")
        return corpus.tags(corpus.Manifest((source,), tags=tags), corpus.survey(docs))

    docs = aphorisms(30)
    assert tags_of(docs) == ["s0", "s1", "s2"]
    assert tags_of(docs, tags=False) == []
    docs = [dataclasses.replace(doc, style=doc.name) for doc in docs]
    assert tags_of(docs) == []
    docs[5] = dataclasses.replace(docs[5], text="A line of a long tale.\n\n" * 2000)
    assert tags_of(docs) == [doc.style for doc in docs]


def test_each_of_many_documents_goes_to_one_split_in_proportion():
    docs = make_documents([f"Tale {i}\n\nwith an end.\n" for i in range(4000)])
    splits = split_all(docs, (0.8, 0.15, 0.05), exact=False)
    assert all(text == doc.text for parts in splits.values() for doc, text in parts)
    for name, share in zip(dataset.SPLITS, (0.8, 0.15, 0.05), strict=True):
        five_sigma = 5 * (4000 * share * (1 - share)) ** 0.5
        assert abs(len(splits[name]) - 4000 * share) < five_sigma
    # a document's split is its own affair: neither order nor company matters
    of_fewer = split_all(docs[:999:-1], (0.8, 0.15, 0.05), exact=False)
    for name, parts in splits.items():
        assert {doc.name for doc, _ in of_fewer[name]} <= {doc.name for doc, _ in parts}
    assert split_all(docs, (1.0, 0.0, 0.0), exact=False)["train"] == [(doc, doc.text) for doc in docs]


def test_many_documents_go_to_the_same_splits_as_ever():
    splits = split_all(
        make_documents([f"Tale {i}\n\nwith an end.\n" for i in range(300)]), (0.9, 0.05, 0.05), exact=False
    )
    val = "16 53 58 104 147 157 180 194 202 203 235 241 264 277 288"
    assert [doc.name for doc, _ in splits["val"]] == [f"d{i}" for i in val.split()]
    test = "25 94 96 107 156 159 222 239 255 269 294"
    assert [doc.name for doc, _ in splits["test"]] == [f"d{i}" for i in test.split()]

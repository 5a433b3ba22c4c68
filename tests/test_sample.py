import collections
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint
import sample
from configurator import ConfigError
from data.tokenizer import END, BPETokenizer, CharTokenizer
from model import GPT, GPTConfig
from sample import Passage, Poet, Settings

ALPHABET = "\n !abcdefghijklmnopqrstuvwxyz"
SPECIALS = [END, "<|alice|>", "<|bard|>"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of random weights that writes in characters."""
    torch.manual_seed(3)
    tokenizer = CharTokenizer(ALPHABET, [*SPECIALS, "<|unk|>"])
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    where = tmp_path_factory.mktemp("model") / "best.pt"
    checkpoint.save(where, {**checkpoint.model_entries(model), "tokenizer": tokenizer.to_json()})
    return where


@pytest.fixture(scope="module")
def poet(path):
    return Poet(str(path), device="cpu", dtype="float64")


# --- choosing a token


def test_repetition_penalty_is_ctrls():
    logits, text = torch.tensor([[2.0, -2.0, 1.0, 0.5]]), torch.tensor([[0, 1, 0]])
    assert sample.penalize_repetition(logits, text, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.5]]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_largest(k):
    logits = torch.randn(4, 20)
    kept = sample.keep_top_k(logits, k)
    for row, row_kept in zip(logits.tolist(), kept.tolist(), strict=True):
        best = sorted(row, reverse=True)[:k]
        assert [x if x in best else -math.inf for x in row] == row_kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_likely_set(p):
    logits = torch.randn(4, 20, dtype=torch.float64)
    kept = sample.keep_top_p(logits, p)
    for row, row_kept in zip(logits.softmax(-1).tolist(), kept.tolist(), strict=True):
        total, expected = 0.0, set()
        for i in sorted(range(20), key=lambda i: -row[i]):
            expected.add(i)
            total += row[i]
            if total >= p:
                break
        assert {i for i in range(20) if row_kept[i] > -math.inf} == expected


def test_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([[1 / 8, 2 / 8, 0.0, 5 / 8]]).expand(800, 4)
    uniforms = (torch.arange(800).double() + 0.5) / 800
    assert collections.Counter(sample.draw(probs, uniforms).tolist()) == {0: 100, 1: 200, 3: 500}
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample.draw(probs[:2], ends).tolist() == [0, 3]
    assert sample.draw(torch.tensor([[0.0, 1.0]] * 2), ends).tolist() == [1, 1]


@pytest.mark.parametrize("k, p", [(3, 1.0), (0, 0.5), (0, 0.9), (4, 0.7), (50, 0.999)])
def test_a_token_is_kept_just_when_the_filters_leave_it(k, p):
    logits = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = sample.keep_top_p(sample.keep_top_k(logits, k or 20), p) > -math.inf
    for id in range(20):
        ids = torch.full((30,), id)
        assert torch.equal(sample.is_kept(logits.softmax(-1), ids, k, p), left[:, id])


@pytest.mark.parametrize("k, p", [(0, 1.0), (0, 0.9), (0, 0.1), (3, 1.0), (1, 1.0), (6, 0.6)])
def test_chosen_tokens_have_the_filtered_distribution(k, p):
    n, logits = 20_000, torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    settings = Settings(temperature=0.7, top_k=k, top_p=p)
    choose = sample.Chooser(settings, torch.tensor([5]), range(n))
    counts = torch.bincount(choose(logits.expand(n, -1), torch.zeros(n, 1, dtype=torch.long)), minlength=12)
    expected = logits[0] / 0.7
    expected[5] = -math.inf
    for i, order in enumerate(expected.argsort(descending=True).tolist()):
        if k and i >= k:
            expected[order] = -math.inf
    probs, total = expected.softmax(-1), 0.0
    for order in probs.argsort(descending=True).tolist():
        total, probs[order] = total + probs[order].item(), probs[order] if total < p else 0.0
    probs /= probs.sum()
    assert (abs(counts / n - probs) <= 4.5 * (probs * (1 - probs) / n).sqrt()).all()


def test_written_tokens_follow_the_models_distribution(poet):
    prompt = "the q"
    idx = torch.tensor([poet.tokenizer.encode(prompt)])
    logits = poet.model(idx)[0][0, -1].detach()
    for special in poet.tokenizer.specials.values():
        logits[special] = -math.inf if special != poet.tokenizer.specials[END] else logits[special]
    expected = (logits / 0.7).softmax(-1)
    n = 4000
    pieces = next(iter(poet.stream(prompt, n, temperature=0.7, top_p=1.0)))
    for id, char in enumerate(ALPHABET):
        share = pieces.count(char) / n
        assert abs(share - expected[id]) < 4.5 * math.sqrt(expected[id] * (1 - expected[id]) / n) + 1e-9


def test_temperature_zero_is_greedy(poet):
    ids = poet.tokenizer.encode("ab")
    for _ in range(12):
        logits = poet.model(torch.tensor([ids]))[0][0, -1]
        ids.append(int(logits[: len(ALPHABET) + 1].argmax()))
    if poet.tokenizer.specials[END] in ids:
        ids = ids[: ids.index(poet.tokenizer.specials[END])]
    expected = poet.tokenizer.decode_bytes(ids).decode()
    assert poet.write("ab", temperature=0, max_new_tokens=12) == [expected]


# --- passages


def test_a_passage_is_the_same_alone_and_beside_others(poet):
    together = poet.write("o romeo", n=4, max_new_tokens=40)
    assert len(set(together)) == 4
    for i, text in enumerate(together):
        alone = "o romeo" + "".join(piece for (piece,) in poet.stream("o romeo", 1, first=i, max_new_tokens=40))
        assert alone == text
    assert poet.write("o romeo", seed=1, max_new_tokens=40) != poet.write("o romeo", seed=2, max_new_tokens=40)
    assert poet.write("o romeo", n=4, max_new_tokens=40) == together


def test_a_passage_that_is_done_is_no_longer_computed(poet, monkeypatch):
    rows, decode = [], poet.model.decode
    monkeypatch.setattr(poet.model, "decode", lambda ids, **keys: rows.append(len(ids)) or decode(ids, **keys))
    alone = poet.write("o romeo", n=6, max_new_tokens=60)
    letter = max(ALPHABET, key=lambda c: len({text.find(c, 7) for text in alone}))  # ends them in different places
    rows.clear()
    ended = poet.write("o romeo", n=6, max_new_tokens=60, stop=(letter,))
    assert ended == [text[:7] + text[7:].split(letter)[0] for text in alone]
    assert rows[0] == 6 and len(set(rows)) > 2 and rows == sorted(rows, reverse=True)


def test_the_style_changes_the_text_and_stands_first(poet):
    windows = []
    handle = poet.model.register_forward_pre_hook(lambda module, args: windows.append(args[0].clone()))
    styled = poet.write("once upon", style="bard", max_new_tokens=40, temperature=0)
    handle.remove()
    assert styled != poet.write("once upon", max_new_tokens=40, temperature=0)
    tag = poet.tokenizer.specials["<|bard|>"]
    assert all(window[0, 0] == tag for window in windows) and len(windows) > 3


def test_only_the_end_token_of_the_specials_is_ever_written(path, poet):
    choose = sample.Chooser(Settings(temperature=0), poet.forbidden, range(1))
    text = torch.zeros(1, 1, dtype=torch.long)
    for name, id in poet.tokenizer.specials.items():
        logits = torch.zeros(1, poet.tokenizer.vocab_size, dtype=torch.float64)
        logits[0, id] = 50.0
        assert (int(choose(logits, text)) == id) == (name == END)


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b!"), ("zzz",), ("\n\n",)])
def test_streaming_ends_before_a_stop_and_never_shows_a_part_of_it(stops):
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)] + [b"aa", b"\n\n", b"xab!"], [END])
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([*b"ab!xz\n", 256, 257, 258], size=12).tolist()
        whole = tokenizer.decode_bytes(ids).decode()
        cuts = [whole.find(stop) for stop in stops if stop in whole]
        expected = whole[: min(cuts)] if cuts else whole
        passage, shown = Passage(tokenizer, stops), ""
        for id in ids:
            shown += passage.push(id)
            assert expected.startswith(shown)
        assert shown + passage.finish() == expected == passage.text


def test_streamed_pieces_are_whole_characters():
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)], [END])
    text = "né 你好 🌹!"
    passage = Passage(tokenizer, ())
    pieces = [passage.push(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert passage.push(tokenizer.specials[END]) == "" and passage.done
    cut = Passage(tokenizer, ())
    assert cut.push("é".encode()[0]) == "" and cut.finish() == "\ufffd"


def test_writing_goes_on_past_the_block_and_stops_at_max_new_tokens(poet):
    pieces = list(poet.stream("a", 1, max_new_tokens=100, seed=5))
    assert len(pieces) <= 101
    (text,) = poet.write("a" * 50, max_new_tokens=30)
    assert len(text) <= 80


# --- what users get wrong


def test_wrong_settings_are_named(poet):
    with pytest.raises(ConfigError, match="temperature: found -1"):
        poet.write(temperature=-1)
    with pytest.raises(ConfigError, match=r"style: found 'bob', must be one of the model's: alice, bard"):
        poet.write(style="bob")
    with pytest.raises(ConfigError, match="top_p"):
        poet.stream(top_p=0)


def test_unknown_characters_are_named(poet):
    assert poet.unknown("hello") == ""
    assert poet.unknown("héllo ☃") == "prompt: the model does not know 'é', '☃': taken as <|unk|>"
    assert poet.write("é", max_new_tokens=3)[0].startswith("é")


def test_prompt_comes_from_text_file_or_stdin(tmp_path, monkeypatch):
    assert sample.read_prompt(r"ROMEO\n\tO") == "ROMEO\n\tO"
    (tmp_path / "x.txt").write_text("from a ☃", encoding="utf-8")
    assert sample.read_prompt(f"FILE:{tmp_path}/x.txt") == "from a ☃"
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert sample.read_prompt("-") == "from a pipe"
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="byte 2 is not UTF-8"):
        sample.read_prompt(f"FILE:{tmp_path}/bad.txt")


# --- the prompt of its own


def interact(poet, monkeypatch, lines, settings=Settings(max_new_tokens=5)):  # noqa: B008
    lines = iter(lines)

    def answer(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", answer)
    sample.interact(poet, settings)


def test_interactive_commands_change_settings_and_survive_mistakes(poet, monkeypatch, capsys):
    script = ["/temp 0", "/topk 5", "/topp 0.5", "/rep 1.2", "/tokens 7", "/seed 9", "/style alice", "/style bob",
              "/temp cold", "/nonsense", "^C", "/settings", "once", "/quit", "never read"]  # fmt: skip
    interact(poet, monkeypatch, script)
    out = capsys.readouterr().out
    for line in (
        "temperature: 0.0",
        "top_k: 5",
        "top_p: 0.5",
        "repetition_penalty: 1.2",
        "max_new_tokens: 7",
        "seed: 9",
        "style: 'alice'",
        "must be one of the model's: alice, bard",
        "found 'cold', must be a number",
    ):
        assert line in out
    assert "once" in out and "never read" not in out


def test_ctrl_c_stops_the_passage_not_the_session(poet, monkeypatch, capsys):
    calls = []

    def stream(*args, **settings):
        calls.append(args)
        yield ["some"]
        raise KeyboardInterrupt

    monkeypatch.setattr(poet, "stream", stream)
    interact(poet, monkeypatch, ["one", "two", "/quit"])
    assert len(calls) == 2


def test_each_interactive_passage_is_new_until_the_seed_is_set(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, ["once", "once", "/seed 1337", "once"], Settings(max_new_tokens=30))
    first, second, third = (text.split("\n>")[0] for text in capsys.readouterr().out.split("once")[1:])
    assert first.strip() == third.strip() != second.strip()


def test_command_line_writes_and_reports(path):
    command = [sys.executable, "sample.py", str(path), "--prompt=romeo ☃", "--num_samples=2", "--max_new_tokens=20"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.count("romeo ☃") == 2 and "does not know '☃'" in done.stderr
    done = subprocess.run([*command, "--temperature=-1", "--topp=2"], capture_output=True, text=True)
    assert done.returncode == 2 and "temperature: found -1.0" in done.stderr and "did you mean top_p" in done.stderr

import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import configurator
import originality
import sample
import train
from configurator import ConfigError
from data import DataError
from data.tokenizer import END, CharTokenizer
from model import GPT, GPTConfig
from passage import Settings
from sample import Poet, SampleConfig

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


def test_written_tokens_follow_the_models_distribution(poet):
    prompt = "the q"
    idx = torch.tensor([poet.tokenizer.encode(prompt)])
    logits = poet.model(idx)[0][0, -1].detach()
    for special in poet.tokenizer.specials.values():
        logits[special] = -math.inf if special != poet.tokenizer.specials[END] else logits[special]
    expected = (logits / 0.7).softmax(-1)
    n = 4000
    pieces = next(iter(poet.stream(poet.begin(prompt, n, temperature=0.7, top_p=1.0))))
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
    assert poet.write("ab", temperature=0, max_new_tokens=12, until="tokens") == [expected]


# --- passages


def test_a_passage_is_the_same_alone_and_beside_others(poet):
    together = poet.write("o romeo", n=4, max_new_tokens=40)
    assert len(set(together)) == 4
    for i, text in enumerate(together):
        alone = poet.begin("o romeo", 1, first=i, max_new_tokens=40)
        assert "o romeo" + "".join(piece for (piece,) in poet.stream(alone)) == text
    assert poet.write("o romeo", seed=1, max_new_tokens=40) != poet.write("o romeo", seed=2, max_new_tokens=40)
    assert poet.write("o romeo", n=4, max_new_tokens=40) == together


def test_a_passage_that_is_done_is_no_longer_computed(poet, monkeypatch):
    rows, decode = [], poet.model.decode
    monkeypatch.setattr(poet.model, "decode", lambda ids, **keys: rows.append(len(ids)) or decode(ids, **keys))
    alone = poet.write("o romeo", n=6, max_new_tokens=60, until="tokens")
    letter = max(ALPHABET, key=lambda c: len({text.find(c, 7) for text in alone}))  # ends them in different places
    rows.clear()
    ended = poet.write("o romeo", n=6, max_new_tokens=60, stop=(letter,), until="tokens")
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


def test_a_blend_is_the_weighted_mean_of_its_styles_log_probabilities(poet):
    shares = {poet.tokenizer.specials["<|bard|>"]: 0.75, poet.tokenizer.specials["<|alice|>"]: 0.25}
    assert poet.blend_of("bard:3, alice") == shares and poet.blend_of("") == {}
    end, prompt = poet.tokenizer.specials[END], poet.tokenizer.encode("once upon")
    ids, texts = list(prompt), {}
    while len(ids) < len(prompt) + 30 and ids[-1] != end:
        mean = 0
        for tag, share in shares.items():
            window = [tag, *ids]
            start = poet.model.window_start(len(window))
            logits = poet.model(torch.tensor([[tag, *window[start + 1 :]]]))[0][0, -1]
            logits[poet.forbidden] = -math.inf
            mean = mean + share * logits.log_softmax(-1)
        ids.append(int(mean.argmax()))
    for n in (1, 3):
        texts = poet.write("once upon", n, style="bard:3,alice", max_new_tokens=30, temperature=0, until="tokens")
        assert texts == [poet.tokenizer.decode_bytes(ids).decode()] * n
    assert texts[0] not in poet.write("once upon", style="bard", max_new_tokens=30, temperature=0, until="tokens")
    several = poet.write("a", 4, style="bard:0.5,alice:0.5", max_new_tokens=60)  # rows end one by one
    for i, text in enumerate(several):
        alone = poet.begin("a", 1, i, style="bard:0.5,alice:0.5", max_new_tokens=60)
        assert "a" + "".join(piece for (piece,) in poet.stream(alone)) == text


@pytest.mark.parametrize("style", ["bard:x", "bard:0", "bard:-1", "bard:inf", "alice,bob", "bard,", ","])
def test_a_wrong_blend_is_named(poet, style):
    with pytest.raises(ConfigError, match="style: found"):
        poet.begin(style=style)


def test_writing_goes_on_past_the_block_and_stops_at_max_new_tokens(poet):
    pieces = list(poet.stream(poet.begin("a", max_new_tokens=100, seed=5)))
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
        poet.begin(top_p=0)


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


# --- saved passages


def saved(path, file, *keys) -> list[dict]:
    sample.main(configurator.load(SampleConfig, [f"--checkpoint={path}", f"--save={file}", "--device=cpu", *keys]))
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_saved_passages_are_written_again_to_the_byte(path, tmp_path, capsys):
    file = tmp_path / "passages.jsonl"
    saved(path, file, "--prompt=o romeo", "--num_samples=3", "--max_new_tokens=40", "--style=bard:0.6,alice:0.4")
    records = saved(
        path, file, "--seed=5", "--stop=!", "--stop=qq", "--top_p=0.8", "--no_repeat_ngram=4", "--dtype=float64"
    )
    assert [r["number"] for r in records] == [0, 1, 2, 0] and len({r["text"] for r in records}) == 4
    assert all(len(r["ids"]) == len(r["logprobs"]) and max(r["logprobs"]) < 0 for r in records)
    model, tok, _ = checkpoint.load_model(path, torch.device("cpu"), torch.float64)
    ids = records[3]["ids"][:10]
    logits = model(torch.tensor([tok.encode("\n") + ids]), torch.tensor([[0] * 11]))[0][0, :-1]
    logits[:, [id for name, id in tok.specials.items() if name != END]] = -math.inf
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert records[3]["logprobs"][:10] == pytest.approx(expected.tolist(), abs=1e-5)
    capsys.readouterr()
    sample.main(configurator.load(SampleConfig, [f"--replay={file}"]))
    out = capsys.readouterr().out
    assert "4 passages, each as it was" in out and all(r["prompt"] + r["text"] in out for r in records)


def test_a_passage_is_checked_against_the_text_the_model_was_trained_on(small, tmp_path, capsys):
    train.main(train.TrainConfig(**small | {"max_iters": 1, "eval_interval": 1, "warmup_iters": 0}))
    best = Path(small["out_dir"]) / "best.pt"
    keys = [f"--checkpoint={best}", "--check", "--device=cpu", "--max_new_tokens=60", "--num_samples=2"]
    capsys.readouterr()
    sample.main(configurator.load(SampleConfig, keys))
    out = capsys.readouterr().out
    assert out.count("longest copy: ") == out.count("not in the training text: ") == 2
    poet = Poet(str(best), "cpu", "float32")
    train_text = originality.read_texts(Path(small["dataset"]), "train")[0]
    report = poet.originality.check(train_text[:200])
    assert len(report.longest) > 150 and report.work == "alpha" and report.new[8] == 0
    checkpoint.save(tmp_path / "other.pt", checkpoint.load(best) | {"text_sha256": "0"})
    keys[0] = f"--checkpoint={tmp_path}/other.pt"
    with pytest.raises(DataError, match="the checkpoint was trained on 0"):
        sample.main(configurator.load(SampleConfig, keys))


def test_a_replay_that_differs_or_can_not_be_is_told(path, tmp_path):
    file = tmp_path / "passages.jsonl"
    (record,) = saved(path, file, "--max_new_tokens=20")
    for changes, said in (
        ({"text": record["text"] + "x"}, "line 1 comes out otherwise"),
        ({"ids": record["ids"][1:]}, "line 1 comes out otherwise"),
        ({"sha256": "0"}, "line 1 was written by another"),
    ):
        file.write_text(json.dumps(record | changes))
        with pytest.raises(ConfigError, match=said):
            sample.replay(file)
    for line in ("{", "[1]", json.dumps({"text": ""})):
        file.write_text(line)
        with pytest.raises(ConfigError, match="line 1 is not a saved passage"):
            sample.replay(file)


# --- the session


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
    sample.Session(poet, settings).run()


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
        yield [""]
        raise KeyboardInterrupt

    monkeypatch.setattr(poet, "stream", stream)
    interact(poet, monkeypatch, ["one", "two", "/quit"])
    assert len(calls) == 2


def test_each_interactive_passage_is_new_until_the_seed_is_set(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, ["once", "once", "/seed 1337", "once"], Settings(max_new_tokens=30))
    first, second, third = (text.split("\n>")[0] for text in capsys.readouterr().out.split("once")[1:])
    assert first.strip() == third.strip() != second.strip()


def test_a_passage_is_taken_up_again(poet, monkeypatch, capsys, tmp_path):
    file = tmp_path / "kept.jsonl"
    script = [
        "/more",
        "/save x",
        "/check",
        "once",
        "/more",
        "/again",
        f"/save {file}",
        "/save",
        "/save /nowhere/x",
        "/check",
        "/until speech",
    ]
    interact(poet, monkeypatch, [*script, "/settings"], Settings(max_new_tokens=20, until="tokens"))
    out = capsys.readouterr().out
    assert "/more: there is no passage yet" in out and "/save: name a file" in out and "until: 'speech'" in out
    assert "/nowhere/x" in out and "/check: there is no passage yet" in out and "which text it was trained on" in out
    first = poet.write("once", max_new_tokens=20, until="tokens")[0]
    more = poet.begin(first, 1, 1, max_new_tokens=20, until="tokens")
    list(poet.stream(more))
    assert first + "\n" + more[0].text in out
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert record["prompt"] == first and record["number"] == 2 and record["text"] != more[0].text
    sample.replay(file)


def test_a_session_over_a_pipe(path):
    command = [sys.executable, "sample.py", str(path), "--interactive", "--max_new_tokens=10"]
    done = subprocess.run(command, input="once\n/more\n/quit\n", capture_output=True, text=True)
    assert done.returncode == 0 and "> once" in done.stdout and done.stdout.count("> ") == 3 and done.stderr == ""


def test_a_session_in_a_terminal(path):
    command = [sys.executable, "sample.py", str(path), "--interactive", "--max_new_tokens=10", "--device=cpu"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 1000)
        shown = shown.split(text, 1)[1]

    until(b"> ")
    os.write(terminal, b"once\r")
    until(b"once\r\n")
    until(b"once")
    until(b"\r\n> ")
    os.write(terminal, b"/settings\r")
    until(b"max_new_tokens: 10")
    until(b"> ")
    os.write(terminal, b"/quit\r")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_command_line_writes_and_reports(path):
    command = [sys.executable, "sample.py", str(path), "--prompt=romeo ☃", "--num_samples=2", "--max_new_tokens=20"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.count("romeo ☃") == 2 and "does not know '☃'" in done.stderr
    done = subprocess.run([*command, "--temperature=-1", "--topp=2"], capture_output=True, text=True)
    assert done.returncode == 2 and "temperature: found -1.0" in done.stderr and "did you mean top_p" in done.stderr

import copy
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import configurator
import sample
import train
from configurator import ConfigError
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, DataError
from robopoet.text.tokenizer import END, CharTokenizer
from robopoet.weights import checkpoint, huggingface
from robopoet.writing import generate as generating
from robopoet.writing import originality
from robopoet.writing.generate import window_start
from robopoet.writing.passage import Settings
from robopoet.writing.sampler import Sampler
from robopoet.writing.session import Session
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
    rows, decode = [], generating.decode
    monkeypatch.setattr(generating, "decode", lambda m, ids, **keys: rows.append(len(ids)) or decode(m, ids, **keys))
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
            start = window_start(len(window), poet.model.config.block_size)
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


@torch.inference_mode()
def naive_ids(poet, prompt, number, settings):
    """One passage's ids, each chosen with the whole text at hand: windows read anew, penalties by their definition."""
    blend = poet.blend_of(settings.style) or {None: 1.0}
    plain = dataclasses.replace(settings, repetition_penalty=1.0, no_repeat_ngram=0)
    sampler = Sampler(plain, poet.forbidden, [number], [1.0], [])
    text = [tag for tag in blend if tag is not None][:1] + poet.tokenizer.encode(prompt)
    ids = []
    while len(ids) < settings.max_new_tokens and poet.tokenizer.specials[END] not in ids:
        rows = []
        for tag in blend:
            window = text[window_start(len(text), poet.model.config.block_size) :]
            rows.append(poet.model(torch.tensor([window if tag is None else [tag, *window[1:]]]))[0][0, 0])
        logits = torch.stack(rows).index_fill(1, poet.forbidden, -math.inf)
        if len(rows) > 1:
            logits = (logits.log_softmax(-1) * torch.tensor(list(blend.values()))[:, None]).sum(0, keepdim=True)
        for id in set(text):
            better = logits[0, id] > 0
            logits[0, id] *= 1 / settings.repetition_penalty if better else settings.repetition_penalty
        n = settings.no_repeat_ngram
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if n else ()
        again = [id for id in range(logits.shape[1]) if (*text[len(text) - n + 1 :], id) in grams]
        if n and logits.index_fill(1, torch.tensor(again, dtype=torch.long), -math.inf).max() > -math.inf:
            logits[0, again] = -math.inf
        ids.append(int(sampler.sample(logits)))
        text.append(ids[-1])
    return ids


@pytest.mark.parametrize("style", ["", "bard", "bard:0.3,alice"])
@pytest.mark.parametrize("given", [{}, {"repetition_penalty": 1.4, "no_repeat_ngram": 2, "top_k": 9}])
@pytest.mark.parametrize("prompt", ["o romeo", "the quick brown fox jumps over the lazy dog"])
def test_texts_are_those_of_a_writer_that_keeps_the_whole_text(poet, style, given, prompt):
    passages = poet.begin(prompt, 3, style=style, max_new_tokens=50, until="tokens", top_p=0.99, stop=("q",), **given)
    for _ in poet.stream(passages):
        pass
    for number, passage in enumerate(passages):  # they end one by one, by END or by a stop
        expected = naive_ids(poet, prompt, number, passage.settings)
        assert passage.ids.tolist() == expected[: len(passage.ids)]
        assert passage.done or len(passage.ids) == 50


def live_tensor_bytes() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_the_text_nor_with_what_is_asked_for(poet, monkeypatch):
    monkeypatch.setattr(poet, "forbidden", torch.tensor(list(poet.tokenizer.specials.values())))  # so that none ends
    settings = {"max_new_tokens": 10**12, "until": "tokens", "repetition_penalty": 1.1, "no_repeat_ngram": 4}
    passages, sizes = poet.begin("o romeo" * 50, 2, **settings), []
    stream = poet.stream(passages)
    for tokens in (50, 250):
        for _ in itertools.islice(stream, tokens):
            pass
        sizes.append(live_tensor_bytes())
    assert len(passages[0].ids) == 300 and sizes[0] == sizes[1]


# --- what users get wrong


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"n": 0}, "n: found 0"),
        ({"n": -1}, "n: found -1"),
        ({"n": 1.5}, "n: found 1.5"),
        ({"n": "2"}, "n: found '2'"),
        ({"n": 10**9}, "n: found 1000000000"),
        ({"prompt": None}, "prompt: found None"),
        ({"prompt": b"x"}, "prompt: found b'x'"),
        ({"prompt": "a\ud800"}, "prompt: character 1 is half a surrogate"),
        ({"prompt": "a" * (10 * 2**20 + 1)}, "prompt: found 10,485,761 characters"),
        ({"temprature": 1}, "temprature: no such setting; did you mean temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e-300}, "temperature: found 1e-300"),
        ({"style": "bard:1e-300,alice"}, "style: found 'bard:1e-300'"),
        ({"style": "bard:1e300,alice"}, "style: found 'bard:1e300'"),
    ],
    ids=str,
)
def test_misuse_from_python_is_told_in_one_line(poet, keys, said):
    with pytest.raises(ConfigError) as e:
        poet.write(**keys)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_other_misuse_from_python(poet, path, monkeypatch):
    with pytest.raises(ConfigError, match="dtype: found 'int8'"):
        Poet(str(path), "cpu", "int8")
    with pytest.raises(ConfigError, match="first: found -1"):
        poet.begin("a", first=-1)
    for passages in ([], poet.begin("a") + poet.begin("b")):
        with pytest.raises(ConfigError, match="must all come from one begin"):
            next(poet.stream(passages))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # a machine with 10 kB
    with pytest.raises(ConfigError, match="write fewer passages at a time"):
        poet.begin("a", 2)


def test_a_model_of_one_work_has_no_styles(poet, monkeypatch):
    monkeypatch.setattr(poet, "styles", {})
    with pytest.raises(ConfigError, match="style: found 'emma', but a model of one work has no tags; leave style out"):
        poet.write(style="emma")


def test_without_a_model_those_that_there_are_are_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="not found; train one first: make poem"):
        Poet(device="cpu")
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "best.pt").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"out/demo/.*not found; there is out/mine/") as e:
        Poet(device="cpu")
    advice = str(e.value).rsplit("sample.py ", 1)[1]
    assert Poet(advice, device="cpu").write("a", max_new_tokens=2)
    makefile = (Path(sample.__file__).parent / "Makefile").read_text()
    assert "\npoem:" in makefile
    with pytest.raises(CheckpointError, match="not found; train first"):
        Poet("x" * 5000, device="cpu")


@pytest.fixture
def writes_nothing(monkeypatch):
    def stream(*args, **keys):
        pytest.fail("something was written before the mistake was told")

    monkeypatch.setattr(Poet, "stream", stream)


@pytest.mark.parametrize(
    "keys, said",
    [
        (["--save={tmp}/none/x"], "save: .*/none/x can't be created: .*/none is not a folder"),
        (["--save={tmp}"], "save: .* can't be written to"),
        (["--save={tmp}/file/x"], "save: .*/file/x can't be created"),
        (["--save=" + "x" * 5000], "save: .*name too long"),
        (["--export={tmp}/none/x"], "export: .*/none/x can't be created"),
        (["--export={tmp}/file"], "export: .*/file exists; choose another"),
        (["--prompt=FILE:{tmp}/none"], "none: No such file"),
        (["--prompt=FILE:{tmp}"], "is a folder"),
        (["--prompt=FILE:/dev/zero"], "/dev/zero: is not a regular file"),
        (["--prompt=FILE:{tmp}/fifo"], "fifo: is not a regular file"),
        (["--prompt=FILE:{tmp}/big"], "big: has 10,485,761 bytes, must have at most 10,485,760"),
        (["--replay={tmp}/none"], "none: No such file"),
        (["--replay=/dev/zero"], "/dev/zero: is not a regular file"),
        (["--replay=x", "--save={tmp}/x", "--check"], "replay: takes no check, save; leave it out"),
        (["--interactive", "--save={tmp}/x"], "interactive: takes no save; leave it out"),
    ],
    ids=str,
)
def test_what_can_not_be_is_told_before_anything_is_written(path, tmp_path, writes_nothing, keys, said):
    (tmp_path / "file").write_text("x")
    (tmp_path / "big").write_bytes(b"x" * (10 * 2**20 + 1))
    os.mkfifo(tmp_path / "fifo")
    argv = [f"--checkpoint={path}", "--device=cpu", *(key.replace("{tmp}", str(tmp_path)) for key in keys)]
    with pytest.raises((ConfigError, CheckpointError), match=said):
        sample.main(configurator.load(SampleConfig, argv))
    assert not (tmp_path / "x").exists()


def test_a_prompt_that_never_ends_is_told(path):
    command = [sys.executable, "sample.py", str(path), "--prompt=-", "--device=cpu"]
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run(command, stdin=endless, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "sample.py: prompt: stdin has more than 10,485,760 bytes\n"


def test_what_is_written_by_a_model_of_the_hub_is_saved_and_written_again(path, tmp_path, monkeypatch, capsys):
    export = tmp_path / "hub"
    sample.main(configurator.load(SampleConfig, [f"--checkpoint={path}", f"--export={export}", "--device=cpu"]))
    monkeypatch.setattr(huggingface, "fetch", lambda name: export)
    monkeypatch.chdir(tmp_path)
    (record,) = saved("gpt-emma", tmp_path / "x.jsonl", "--max_new_tokens=5")
    assert record["checkpoint"] == "gpt-emma" and record["sha256"] == checkpoint.sha256(export)
    capsys.readouterr()
    sample.replay(tmp_path / "x.jsonl")
    assert "1 passages, each as it was" in capsys.readouterr().out


def test_a_hash_that_can_not_be_had_is_told_before_anything_is_written(path, tmp_path, monkeypatch, writes_nothing):
    def fail(file, digest):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        saved(path, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_a_full_disk_leaves_no_part_of_a_line(poet, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("before\n")
    passages = poet.begin("a" * 300, max_new_tokens=3)
    for _ in poet.stream(passages):
        pass
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            sample.save(file, poet, passages)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_text() == "before\n"


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
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a\r\npipe")))
    assert sample.read_prompt("-") == "from a\npipe"
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
        ({"text": record["text"] + "x"}, "line 1 comes out differently"),
        ({"ids": record["ids"][1:]}, "line 1 comes out differently"),
        ({"sha256": "0" * 64}, "line 1: was generated by another"),
    ):
        file.write_text(json.dumps(record | changes))
        with pytest.raises(ConfigError, match=said):
            sample.replay(file)
    for line in ("{", "[1]", json.dumps({"text": ""})):
        file.write_text(line)
        with pytest.raises(ConfigError, match=r"line 1: .*; it is not a saved passage"):
            sample.replay(file)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: r["settings"].pop("top_p"), r"missing required field `top_p` - at `\$.settings`"),
        (lambda r: r["settings"].update(mood="sad"), r"unknown field `mood` - at `\$.settings`"),
        (lambda r: r["settings"].update(temperature="hot"), r"`\$.settings.temperature`"),
        (lambda r: r["settings"].update(temperature=1e-300), "line 2: temperature: found 1e-300"),
        (lambda r: r["settings"].update(style="bob"), "line 2: style: found 'bob'"),
        (lambda r: r.update(ids=[-1]), r"`\$.ids\[0\]`"),
        (lambda r: r.update(prompt=7), r"`\$.prompt`"),
        (lambda r: r.update(together=10**9), "line 2: n: found 1000000000, must be a whole number"),
        (lambda r: r.update(number=5), "number is 5, but its batch has 1 from 0 on"),
        (lambda r: r.update(device="cuda:99"), "line 2: device: found cuda:99"),
        (lambda r: r.update(checkpoint="nope/x.pt"), "line 2: nope/x.pt: not found"),
    ],
    ids=range(11),
)
def test_a_saved_passage_that_can_not_be_is_told_by_line_and_place(path, tmp_path, change, said):
    file = tmp_path / "passages.jsonl"
    (record,) = saved(path, file, "--max_new_tokens=5", "--dtype=float32")
    wrong = copy.deepcopy(record)
    change(wrong)
    file.write_text(json.dumps(record) + "\n" + json.dumps(wrong))
    with pytest.raises((ConfigError, CheckpointError), match=said) as e:
        sample.replay(file)
    assert "line 2" in str(e.value) and "\n" not in str(e.value)


def test_a_replay_ends_with_the_first_token_that_differs(path, tmp_path):
    file = tmp_path / "passages.jsonl"
    (record,) = saved(path, file, "--max_new_tokens=8", "--until=tokens", "--seed=3")
    assert len(record["ids"]) == 8 and record["ids"][-1] < len(ALPHABET)  # no END
    record["settings"]["max_new_tokens"] = 10**12
    for ids in (record["ids"], [*record["ids"][:3], (record["ids"][3] + 1) % 20, *record["ids"][4:]]):
        file.write_text(json.dumps(record | {"ids": ids}))
        with pytest.raises(ConfigError, match="line 1 comes out differently"):
            sample.replay(file)


def test_some_of_the_passages_written_together_are_enough(path, tmp_path, capsys):
    file = tmp_path / "passages.jsonl"
    records = saved(path, file, "--num_samples=4", "--max_new_tokens=20")
    file.write_text("".join(json.dumps(records[i]) + "\n" for i in (3, 1)))
    sample.replay(file)
    assert "2 passages, each as it was" in capsys.readouterr().out


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
    Session(poet, settings).run()


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


@pytest.mark.parametrize("word", ["/quit", "quit", "exit", " exit ", "/exit"])
def test_a_session_ends_with_a_word(poet, monkeypatch, capsys, word):
    interact(poet, monkeypatch, [word, "/settings"])
    assert capsys.readouterr().out == "Type a prompt, or /help.\n"


def test_a_session_whose_input_is_no_text_ends_in_one_line(poet, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/settings\n\xff\n"), "utf-8"))
    with pytest.raises(ConfigError, match=r"stdin: byte .* is not UTF-8"):
        Session(poet, Settings()).run()


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

"""sample.py's command line."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from scripts import run_script

import configurator
import sample
import train
from robopoet.errors import CheckpointError, ConfigError, DataError
from robopoet.weights import checkpoint
from robopoet.writing import originality, terminal
from sample import Poet, SampleConfig


@pytest.fixture
def generates_nothing(monkeypatch):
    def stream(*args, **keys):
        pytest.fail("something was generated before the mistake was raised")

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
        (
            ["--export={tmp}/poet.pdf"],
            r"export: found .*poet.pdf, must be a .html, a .gguf, or a folder",
        ),
        (["--export={tmp}/poet.htm"], r"; did you mean \.html\?$"),
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
def test_mistakes_are_raised_before_anything_is_generated(random_pt, tmp_path, generates_nothing, keys, said):
    (tmp_path / "file").write_text("x")
    (tmp_path / "big").write_bytes(b"x" * (10 * 2**20 + 1))
    os.mkfifo(tmp_path / "fifo")
    argv = [key.replace("{tmp}", str(tmp_path)) for key in keys]
    argv += [] if "--replay" in argv[0] else [f"--checkpoint={random_pt}", "--device=cpu"]
    with pytest.raises((ConfigError, CheckpointError), match=said):
        sample.main(configurator.parse(SampleConfig, argv))
    assert not (tmp_path / "x").exists()


def test_a_prompt_that_never_ends_is_refused(random_pt):
    with open("/dev/zero", "rb") as endless:
        done = run_script("sample.py", random_pt, "--prompt=-", "--device=cpu", stdin=endless.fileno())
    assert done.returncode == 2 and done.stderr == "sample.py: prompt: stdin has more than 10,485,760 bytes\n"


def test_an_unreadable_checkpoint_is_named_before_generating(random_pt, tmp_path, monkeypatch, generates_nothing):
    def fail(file, digest):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        sample.main(SampleConfig(checkpoint=str(random_pt), save=str(tmp_path / "x.jsonl"), device="cpu"))
    assert not (tmp_path / "x.jsonl").exists()


def test_prompt_comes_from_text_file_or_stdin(tmp_path, monkeypatch):
    assert terminal.read_prompt(r"ROMEO\n\tO") == "ROMEO\n\tO"
    (tmp_path / "x.txt").write_text("from a ☃", encoding="utf-8")
    assert terminal.read_prompt(f"FILE:{tmp_path}/x.txt") == "from a ☃"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a\r\npipe")))
    assert terminal.read_prompt("-") == "from a\r\npipe"  # Poet converts the line ends, as it does any prompt's
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="byte 2 is not UTF-8"):
        terminal.read_prompt(f"FILE:{tmp_path}/bad.txt")


def test_a_passage_is_checked_against_the_text_the_model_was_trained_on(small, tmp_path, capsys):
    train.main(train.TrainConfig(**small | {"max_iters": 1, "eval_interval": 1, "warmup_iters": 0}))
    best = Path(small["out_dir"]) / "best.pt"
    keys = [f"--checkpoint={best}", "--check", "--device=cpu", "--max_new_tokens=60", "--num_samples=2"]
    capsys.readouterr()
    sample.main(configurator.parse(SampleConfig, keys))
    out = capsys.readouterr().out
    assert out.count("longest copy: ") == out.count("not in the training text: ") == 2
    poet = Poet(str(best), "cpu", "float32")
    train_text = originality.read_texts(Path(small["dataset"]), "train")[0]
    report = poet.originality.check(train_text[:200])
    assert len(report.longest) > 150 and report.work == "alpha" and report.new[8] == 0
    checkpoint.save(tmp_path / "other.pt", checkpoint.load(best) | {"text_sha256": "0"})
    keys[0] = f"--checkpoint={tmp_path}/other.pt"
    with pytest.raises(DataError, match="the checkpoint was trained on 0"):
        sample.main(configurator.parse(SampleConfig, keys))


def test_a_stop_text_may_be_typed_with_backslash_n(random_pt, tmp_path):
    keys = [f"--checkpoint={random_pt}", "--num_samples=4", "--until=tokens", "--device=cpu"]
    sample.main(configurator.parse(SampleConfig, [*keys, r"--stop=\n", f"--save={tmp_path}/x.jsonl"]))
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [record["settings"]["stop"] for record in records] == [["\n"]] * 4
    assert not any("\n" in record["text"] for record in records)


def test_verbose_tells_how_fast_it_wrote(random_pt, capsys):
    keys = [f"--checkpoint={random_pt}", "--num_samples=3", "--max_new_tokens=20", "--until=tokens", "--device=cpu"]
    sample.main(configurator.parse(SampleConfig, keys))
    assert capsys.readouterr().err == ""
    sample.main(configurator.parse(SampleConfig, [*keys, "--verbose"]))
    found = re.fullmatch(r"(\d+) tokens in ([\d.]+) s, ([\d,]+) tokens/s\n", capsys.readouterr().err)
    n_tokens, seconds, rate = (float(number.replace(",", "")) for number in found.groups())
    assert 3 <= n_tokens <= 60 and n_tokens / (seconds + 0.01) <= rate <= n_tokens / max(seconds - 0.01, 1e-3)


def test_the_command_line_prints_passages_and_names_mistakes(random_pt):
    command = ["sample.py", random_pt, "--prompt=romeo ☃", "--num_samples=2", "--max_new_tokens=20"]
    done = run_script(*command)
    assert done.returncode == 0 and done.stdout.count("romeo ☃") == 2 and "does not know '☃'" in done.stderr
    done = run_script(*command, "--temperature=-1", "--topp=2")
    assert done.returncode == 2 and "temperature: found -1.0" in done.stderr and "did you mean top_p" in done.stderr

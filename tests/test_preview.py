"""The sample that a run shows at each evaluation: what sample.py would write, and how much of it is copied."""

import re

from conftest import records
from test_train import run

import configurator
import train
from model import GPT, GPTConfig
from robopoet.machine import find_machine
from robopoet.text.tokenizer import CharTokenizer
from robopoet.writing import preview
from robopoet.writing.originality import read_texts
from robopoet.writing.poet import Poet
from robopoet.writing.preview import Preview
from train import TrainConfig


def test_the_sample_is_what_sample_py_writes_by_default(small):
    found = run(small, sample_tokens=80, max_iters=60, eval_interval=60)
    (text,) = Poet(f"{small['out_dir']}/ckpt.pt", "cpu", "float32").write(max_new_tokens=80)
    assert found[-1]["text"] == text and len(text) > 10


def test_a_sample_needs_no_line_end_in_the_vocabulary(tmp_path):
    tok = CharTokenizer("abc", [])
    model = GPT(GPTConfig(block_size=16, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=16))
    found = Preview(model, tmp_path, None, tok, find_machine("cpu", "float32"), 30, {})
    found.originality = None
    assert len(found()["text"]) == 30 and model.transformer.wte.weight.requires_grad


def test_a_samples_longest_copy_is_told(small, books, monkeypatch, capsys):
    def evaluations() -> list[dict]:
        train.main(configurator.parse(TrainConfig, [f"--{key}={value}" for key, value in keys.items()]))
        return [record for record in records(small["out_dir"]) if record["kind"] == "eval"][-2:]

    keys = small | {"sample_tokens": 200, "max_iters": 120, "eval_interval": 60, "batch_size": 32, "log_interval": 60}

    def words_of(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    works = [f" {' '.join(words_of(text))} " for text in read_texts(books, "train")]
    found = evaluations()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    longest copy: ")]
    assert told == [f"    longest copy: {record['copied_words']} words" for record in found]
    for record in found:
        words = words_of(record["text"])
        runs = [(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
        copied = [run for i, j in runs if any(f" {(run := ' '.join(words[i:j]))} " in work for work in works)]
        assert record["copied_words"] == len(max(copied, key=len, default="").split())
    assert found[-1]["copied_words"] > 0
    monkeypatch.setattr(preview, "LARGEST", 1000)
    keys |= {"max_iters": 4, "eval_interval": 2}
    assert [record.get("copied_words") for record in evaluations()] == [None, None]

"""The table of exports: what each of its rows promises, and that --export, its help and its checks ask the table."""

from inspect import signature
from pathlib import Path

import pytest
import torch

import configurator
import sample
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, ConfigError
from robopoet.text.tokenizer import END, BPETokenizer
from robopoet.weights import checkpoint
from robopoet.weights.exports import EXPORTS, ending_of, export_problems
from sample import SampleConfig

ENDINGS = pytest.mark.parametrize("ending", EXPORTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint that every export takes."""
    tok = BPETokenizer.train(["the rose and the thorn, " * 50], 265, [END])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=16))
    path = tmp_path_factory.mktemp("exports") / "best.pt"
    checkpoint.save(path, {**checkpoint.model_entries(model), "tokenizer": tok.to_json()})
    return path


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.html", ".html"),
        ("b/a.gguf", ".gguf"),
        ("poet", ""),
        ("a.html/", ""),
        ("b.c/poet", ""),
        ("a.b.html", ".html"),
    ],
)
def test_a_name_asks_for_an_export_by_its_ending(name, ending):
    assert ending_of(name) == ending and export_problems(name) == []


def test_an_unknown_ending_is_told_the_known_ones():
    (problem,) = export_problems("poet.ggf")
    assert problem.startswith("export: found poet.ggf, must be ") and problem.endswith("; did you mean .gguf?")
    assert all(ending in problem for ending in EXPORTS)
    assert SampleConfig(export="poet.ggf").problems() == [problem]


@ENDINGS
def test_all_exports_are_called_alike(ending):
    exporter = EXPORTS[ending]
    assert [*signature(exporter.check).parameters] == ["config", "tok"]
    taken = "model tok content passage path dtype picture"
    assert [*signature(exporter.export).parameters] == taken.split()


@ENDINGS
def test_the_help_of_export_names_every_ending(ending):
    (line,) = [line for line in configurator.usage(SampleConfig).splitlines() if line.startswith("  --export ")]
    assert (ending or "folder") in line


@ENDINGS
def test_sample_prints_what_an_export_says_and_overwrites_nothing(saved, tmp_path, capsys, ending):
    keys = {"checkpoint": str(saved), "device": "cpu", "dtype": "float32", "max_new_tokens": 3}
    path = tmp_path / f"poet{ending}"
    loaded = checkpoint.load_model(saved, torch.device("cpu"), torch.float32)
    said = EXPORTS[ending].export(*loaded, "the rose", path, "float16")
    assert path.exists() and said and "\n\n" not in said
    with pytest.raises(OSError, match="exists; choose another name"):
        EXPORTS[ending].export(*loaded, "the rose", path, "float16")
    with pytest.raises(ConfigError, match=r"export: .*exists; choose another name"):
        sample.main(SampleConfig(**keys, export=str(path)))
    other = tmp_path / f"other{ending}"
    sample.main(SampleConfig(**keys, export=str(other)))
    assert capsys.readouterr().out == f"{other}: {said}\n".replace("poet.Modelfile", "other.Modelfile").replace(
        "ollama create poet", "ollama create other"
    ).replace("ollama run poet", "ollama run other")


@ENDINGS
def test_sample_asks_an_exports_check_before_anything_is_generated(saved, tmp_path, monkeypatch, capsys, ending):
    def refuse(config: GPTConfig, tok: BPETokenizer) -> None:
        raise CheckpointError(f"export: not {config.n_embd}, {tok.vocab_size}")

    monkeypatch.setattr(EXPORTS[ending], "check", refuse)
    keys = {"checkpoint": str(saved), "device": "cpu", "dtype": "float32", "prompt": "the"}
    with pytest.raises(CheckpointError, match="export: not 16, 265"):
        sample.main(SampleConfig(**keys, export=str(tmp_path / f"poet{ending}")))
    assert capsys.readouterr().out == "" and not [*tmp_path.iterdir()]

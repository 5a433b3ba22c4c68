"""The keys of the three scripts: help, types, ranges, and the files in config/."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from test_configurator import error

import prepare
import sample
import train
from configurator import keys_of, parse, written

SCRIPTS = [train.TrainConfig, sample.SampleConfig, prepare.PrepareConfig]
CONFIGS = Path(__file__).parents[1] / "config"
CONFIG_FILES = sorted({*CONFIGS.glob("*.yaml")} - {CONFIGS / "sweep.yaml"})  # that is for wandb's agent: test_search.py


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "a.yaml").write_text(text)
        return str(tmp_path / "a.yaml")

    return write


@pytest.mark.parametrize("cls", SCRIPTS)
def test_help_prints_every_key_with_default_and_meaning(cls, capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse(cls, ["--nonsense", flag])
        assert not caught.value.code
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
        fields = keys_of(cls)
        assert set(lines) == {f"--{field.name}" for field in fields}
        for field in fields:
            default = "" if field.default == () else str(written(field.default))
            _, _, rest = lines[f"--{field.name}"].partition(field.name)
            assert rest.split()[: len(default.split())] == default.split()
            assert len(rest.split()) > len(default.split())  # words of meaning follow


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_config_file_loads(path):
    assert parse(train.TrainConfig, [str(path)]) != train.TrainConfig()


def test_there_is_a_demo_config():
    assert "demo.yaml" in [path.name for path in CONFIG_FILES]


KEYS = [(cls, field.name) for cls in SCRIPTS for field in keys_of(cls)]
TYPED = [(cls, key) for cls, key in KEYS if get_type_hints(cls)[key] not in (str, str | None, tuple[str, ...])]


@pytest.mark.parametrize("cls, key", TYPED, ids=[f"{cls.__name__}.{key}" for cls, key in TYPED])
def test_rubbish_is_refused_by_every_typed_key(write, cls, key):
    assert f"--{key}" in error(cls, f"--{key}=@@rubbish@@")
    assert f"a.yaml: {key}" in error(cls, write(f"{key}: '@@rubbish@@'"))


@pytest.mark.parametrize("cls, key", KEYS, ids=[f"{cls.__name__}.{key}" for cls, key in KEYS])
def test_every_misspelt_key_is_refused_with_its_spelling(write, cls, key):
    assert f"did you mean {key}?" in error(cls, f"--{key}_=1")
    assert f"did you mean {key}?" in error(cls, write(f"{key}_: 1"))


@pytest.mark.parametrize("cls, key", KEYS, ids=[f"{cls.__name__}.{key}" for cls, key in KEYS])
def test_every_key_without_a_value_is_named(write, cls, key):
    kind = get_type_hints(cls)[key]
    if kind is not bool and "true" not in get_args(kind):  # these are true by their name alone
        assert f"--{key}" in error(cls, f"--{key}")


@pytest.mark.parametrize(
    "cls, argv, named",
    [
        (train.TrainConfig, ["--n_embd=100", "--n_head=8"], "n_embd"),
        (train.TrainConfig, ["--n_head=0"], "n_head"),
        (train.TrainConfig, ["--min_lr=0.1", "--learning_rate=0.01"], "min_lr"),
        (train.TrainConfig, ["--dropout=1"], "dropout"),
        (train.TrainConfig, ["--tag_prob=1.1"], "tag_prob"),
        (train.TrainConfig, ["--sample_tokens=10001"], "sample_tokens"),
        (train.TrainConfig, ["--seed=-1"], "seed"),
        (train.TrainConfig, ["--block_size=0"], "block_size"),
        (train.TrainConfig, ["--max_iters=0"], "max_iters"),
        (train.TrainConfig, ["--learning_rate=1e-13"], "learning_rate"),
        (sample.SampleConfig, ["--top_p=0"], "top_p"),
        (sample.SampleConfig, ["--top_p=1.5"], "top_p"),
        (sample.SampleConfig, ["--temperature=-0.1"], "temperature"),
        (sample.SampleConfig, ["--top_k=-1"], "top_k"),
        (sample.SampleConfig, ["--repetition_penalty=0"], "repetition_penalty"),
        (sample.SampleConfig, ["--num_samples=0"], "num_samples"),
        (sample.SampleConfig, ["--stop="], "stop"),
        (prepare.PrepareConfig, ["--corpus=x", "--vocab_size=65537"], "vocab_size"),
        (prepare.PrepareConfig, ["--corpus=x", "--vocab_size=-1"], "vocab_size"),
        (train.TrainConfig, ["--minutes=-1"], "minutes"),
        (prepare.PrepareConfig, [f"--input={__file__}"], "out"),
        (prepare.PrepareConfig, ["--input=x.txt"], "input"),
        (prepare.PrepareConfig, ["--corpus=x", "--input=x.txt", "--out=y"], "input"),
        (prepare.PrepareConfig, [], "corpus"),
    ],
)
def test_values_out_of_range_name_their_key(cls, argv, named):
    assert named in error(cls, *argv)


@pytest.mark.parametrize(
    "cls, key, old",
    [
        (train.TrainConfig, "learning_rate", 0),
        (train.TrainConfig, "muon_weight_decay", -1),
        (train.TrainConfig, "eval_interval", 0),
        (train.TrainConfig, "lr_decay_iters", 0),
        (prepare.PrepareConfig, "vocab_size", 0),
    ],
)
def test_a_number_that_once_stood_for_auto_is_refused_in_one_line_that_says_so(write, cls, key, old):
    corpus = ["--corpus=data/robopoet"] if cls is prepare.PrepareConfig else []
    for argv in ([f"--{key}={old}"], [write(f"{key}: {old}")]):
        found = error(cls, *corpus, *argv)
        assert found.startswith(f"{key}: found {old}") and found.endswith(", or auto")


def test_the_ends_of_ranges_are_allowed():
    parse(sample.SampleConfig, ["--top_p=1", "--temperature=0", "--top_k=0"])
    parse(train.TrainConfig, ["--dropout=0", "--min_lr=3e-3", "--tag_prob=1", "--warmup_iters=0"])

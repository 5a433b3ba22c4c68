"""The bench scripts measure what train.py and sample.py run, judge it rightly, and the README shows what they wrote."""

import json
import sys
from pathlib import Path

import pytest

import configurator
import prepare
import train
from bench import common, demo, sample_speed, table, train_speed
from checkpoint import CheckpointError
from configurator import ConfigError

TINY = ["--block_size=16", "--batch_size=4", "--n_layer=1", "--n_head=2", "--n_embd=16", "--device=cpu"]
TINY += ["--dtype=float32", "--compile=false", "--max_iters=4", "--warmup_iters=0"]
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that holds tiny data and a finished run on it, made as a user makes them."""
    folder = tmp_path_factory.mktemp("bench")
    for style in ("day", "night"):
        (folder / f"{style}.txt").write_text(f"To be or not to be, by {style}.\n\n" * 100, encoding="utf-8")
    data = str(folder / "data")
    prepare.main(prepare.PrepareConfig(input=(f"{folder}/*.txt",), out=data, tokenizer="char"))
    (folder / "tiny.yaml").write_text(f"dataset: {data}\nout_dir: {folder}/out\n", encoding="utf-8")
    train.main(configurator.load(train.TrainConfig, [f"{folder}/tiny.yaml", *TINY]))
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def start(monkeypatch, script, cls, *args, positional=None):
    """Run a script's main on a command line; returns what it wrote."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *args])
    script.main(configurator.load(cls, list(args), positional))
    (path,) = common.RESULTS.glob("*.json")
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    result = json.loads(text)
    assert text == json.dumps(result, indent=2, sort_keys=True) + "\n"
    assert str(Path(args[0]).parent) not in text  # no absolute path
    return result, path.stem


def ordered(figure):
    return 0 < figure["min"] <= figure["median"] <= figure["max"]


def test_train_speed(run, results, monkeypatch, capsys):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=3", "--steps=2", "--vram_limit_gb=8"]
    result, name = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert name.startswith("train_speed_tiny_")
    assert result["command"].startswith("python -m bench.train_speed tiny.yaml --block_size=16")
    assert ordered(result["tok_per_sec"]) and ordered(result["dt_ms"]) and ordered(result["mfu"])
    assert result["tok_per_sec"]["max"] == pytest.approx(1000 * 4 * 16 / result["dt_ms"]["min"])
    assert len(result["repeats_dt_ms"]) == 3 and result["loss"] < 5 and result["peak_mem_mb"] > 1
    out, err = capsys.readouterr()
    assert "not the reference card" in out and "not applicable to cpu" in err


def test_sample_speed(run, results, monkeypatch):
    args = [f"{run}/out/best.pt", "--batch_size=2", "--max_new_tokens=8", "--long_tokens=20", "--check_tokens=40"]
    args += ["--repeats=2", "--device=cpu"]
    result, name = start(monkeypatch, sample_speed, sample_speed.SampleSpeedConfig, *args, positional="checkpoint")
    assert name.startswith("sample_speed_") and result["same_text"] is True
    assert [(case["sequences"], case["tokens"]) for case in result["cases"]] == [(1, 8), (2, 8), (1, 20)]
    for case in result["cases"]:
        assert all(ordered(case[key]) for key in ("tok_per_sec", "naive_tok_per_sec", "speedup", "first_token_ms"))
        ratios = [pair["naive"] / pair["cached"] for pair in case["repeats_s"]]
        assert case["speedup"] == pytest.approx(common.spread(ratios))


def test_demo(run, results, monkeypatch, capsys):
    args = [f"{run}/out", "--device=cpu", "--dtype=float32"]
    result, name = start(monkeypatch, demo, demo.DemoConfig, *args, positional="run")
    assert name.startswith("demo_") and result["steps"] == 4 and result["seconds"] > 0
    assert set(result["val"]["loss_by_style"]) == set(result["test"]["loss_by_style"]) == {"day", "night"}
    assert 0 < result["test"]["loss"] < 5
    assert "6.5" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not found"):
        demo.main(demo.DemoConfig(run=f"{run}/nothing", device="cpu"))


def made_up(tok_per_sec, peak_mem_mb, parameters, device="NVIDIA GeForce RTX 4060", memory_gb=8.0):
    result = {"tok_per_sec": common.spread([tok_per_sec]), "peak_mem_mb": peak_mem_mb, "parameters": parameters}
    result |= {"machine": {"device": device, "memory_gb": memory_gb}}
    return result | {"targets": train_speed.judge(result)}


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ((1001, 6143, 9_999_999), [True, True, True]),
        ((1000, 6144, 10_000_000), [False, False, False]),
        ((50_000, 900, 124_000_000), [True, True, False]),
    ],
)
def test_targets(figures, met):
    result = made_up(*figures)
    assert list(result["targets"].values()) == met
    assert [": met" in line for line in train_speed.verdicts(result)] == met


@pytest.mark.parametrize(
    ("device", "memory_gb", "is_reference"),
    [
        ("NVIDIA GeForce RTX 3070", 7.8, True),
        ("NVIDIA GeForce RTX 4090", 23.5, False),
        ("NVIDIA H100 80GB HBM3", 79.1, False),
        ("AMD EPYC", None, False),
    ],
)
def test_verdicts_name_the_device(device, memory_gb, is_reference):
    for line in train_speed.verdicts(made_up(2000, 900, 6_000_000, device, memory_gb)):
        assert device in line and ("not the reference card" not in line) == is_reference


def test_an_absolute_path_is_cut_from_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/bench/demo.py", "/a/b/out/", "--out=/c/d.x", "data/mine", "--n=1/2"])
    assert common.command_line() == "python -m bench.demo out/ --out=d.x data/mine --n=1/2"


def test_table_checks_the_readme(run, results, tmp_path, monkeypatch, capsys):
    start(monkeypatch, demo, demo.DemoConfig, f"{run}/out", "--device=cpu", "--dtype=float32", positional="run")
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{table.BEGIN}\n{table.END}\nbelow\n", encoding="utf-8")
    check, write = table.TableConfig(check=True, readme=str(readme)), table.TableConfig(write=True, readme=str(readme))
    with pytest.raises(ConfigError, match="--write"):
        table.main(check)
    table.main(write)
    table.main(check)
    text = readme.read_text(encoding="utf-8")
    assert text == f"above\n{table.BEGIN}\n{table.tables()}{table.END}\nbelow\n"
    readme.write_text(text.replace("| 4 ", "| 5 "), encoding="utf-8")  # a figure differs
    with pytest.raises(ConfigError, match="does not show"):
        table.main(check)
    readme.write_text("no block", encoding="utf-8")
    with pytest.raises(ConfigError, match="lacks"):
        table.main(write)
    assert table.TableConfig(write=True, check=True).problems()


def test_the_readme_shows_the_results():
    table.main(table.TableConfig(check=True, readme=str(README)))

"""The bench scripts keep what they measured, judge it rightly, and the README shows it."""

import contextlib
import dataclasses
import json
import math
import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, ordered, start, within
from scripts import run_script
from test_model import ROTARY, ids, make

import configurator
import prepare
import train
from bench import (
    books,
    common,
    copying,
    demo,
    html,
    plot,
    prepare_speed,
    table,
    torture,
    window,
    writing,
)
from bench.learn import curve_of
from robopoet.errors import CheckpointError, ConfigError
from robopoet.machine import find_machine
from robopoet.text.dataset import read_meta
from robopoet.training.history import Record, read_records

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"kind": "train", "iter": -1}', r"line 2: .*\$\.iter"),
        ('{"kind": "train", "seconds": "1"}', r"line 2: .*\$\.seconds"),
        ("[" * 100_000, "line 2: "),
        ('{"kind": "eval", "loss": NaN}', "line 2: "),
    ],
)
def test_a_damaged_line_of_metrics_is_named_and_the_others_are_read(tmp_path, capsys, line, problem):
    first = '{"kind": "train", "iter": 1, "loss": 2.5, "tokens": 64, "seconds": 1.5, "lr": 0.1, "other": [1]}\n'
    (tmp_path / "metrics.jsonl").write_text(first + line, encoding="utf-8")
    (record,) = read_records(tmp_path)  # the last line is still being written
    assert (record.iter, record.loss, record.tokens, record.seconds, record.bpb) == (1, 2.5, 64, 1.5, None)
    (tmp_path / "metrics.jsonl").write_text(f"{first}{line}\n{first}", encoding="utf-8")
    assert [record.iter for record in read_records(tmp_path)] == [1, 1]
    assert re.fullmatch(rf"warning: {tmp_path}/metrics\.jsonl: {problem}.*; left out\n", capsys.readouterr().err)


def test_an_evaluation_whose_steps_record_is_lost_is_not_placed_at_another(tmp_path):
    records = [Record("train", 10, 2.0, tokens=640), Record("eval", 20, 2.5, 1.0)]
    assert curve_of(records) == []
    (found,) = curve_of([*records, Record("train", 30, 1.5, tokens=1920), Record("eval", 30, 2.0, 0.9)])
    assert (found["iter"], found["tokens"], found["loss"]) == (30, 1920, 2.0)


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense", '{"kind": "learn"}'])
def test_a_damaged_result_is_named(results, tmp_path, content):
    results.mkdir()
    (results / "learn_x.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"learn_x\.json: .*run its bench again"):
        table.tables()
    with pytest.raises(ConfigError, match=r"learn_x\.json: .*run its bench again"):
        plot.main(plot.PlotConfig(out=str(tmp_path / "all.svg")))


def test_a_checkpoint_of_another_kind_ends_in_one_line(run, results, tmp_path):
    content = torch.load(run / "out" / "best.pt", weights_only=True)
    kept = {key: content[key] for key in ("model", "model_args")}  # as nanoGPT's may be
    torch.save(kept | {"config": {}}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="does not say"):
        demo.main(demo.DemoConfig(run=str(tmp_path), device="cpu"))
    model = train.make_model(configurator.parse(train.TrainConfig, TINY), read_meta(run / "data").vocab_size)
    machine = find_machine("cpu", "float32")
    with pytest.raises(CheckpointError, match="does not say what it was trained on"):
        common.evaluate_checkpoint(kept, tmp_path / "best.pt", model, "val", machine)


def test_runs_of_train_are_drawn_against_tokens_and_seconds(run, results, tmp_path, monkeypatch):
    for name in ("a", "b"):
        train.main(configurator.parse(train.TrainConfig, [f"{run}/tiny.yaml", *TINY, f"--out_dir={tmp_path / name}"]))
    argv = [str(tmp_path / "a"), str(tmp_path / "b")]
    plot.main(configurator.parse(plot.PlotConfig, [*argv, f"--out={tmp_path}/both"], "runs"))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()
    plot.main(configurator.parse(plot.PlotConfig, argv, "runs"))  # beside the first
    assert (tmp_path / "a" / "loss.svg").read_bytes() == (tmp_path / "both.svg").read_bytes()
    plot.main(configurator.parse(plot.PlotConfig, [*argv, f"--out={tmp_path}/one.svg"], "runs"))
    assert (tmp_path / "one.svg").exists() and not (tmp_path / "one.png").exists() and not results.exists()
    with pytest.raises(ConfigError, match=r"runs: .*none holds no metrics\.jsonl"):
        configurator.parse(plot.PlotConfig, [str(tmp_path / "none")], "runs")


def test_runs_of_different_vocabularies_share_an_axis_in_bits_per_byte(tmp_path):
    """The same model of the same text, told in tokens of one byte and of four."""
    for name, token_bytes in (("bytes", 1), ("words", 4)):
        lines = []
        for step, bpb in ((10, 3.0), (20, 2.0)):
            place = {"iter": step, "tokens": 640 * step // token_bytes, "seconds": step / 10}
            lines.append({"kind": "train", "loss": (bpb - 0.5) * math.log(2) * token_bytes} | place)
            lines.append({"kind": "eval", "iter": step, "loss": bpb * math.log(2) * token_bytes, "bpb": bpb})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figure = plot.draw_runs((str(tmp_path / "bytes"), str(tmp_path / "words")))
    for panel in figure.axes:
        assert "bits per byte" in panel.get_ylabel()
        drawn = [list(line.get_ydata()) for line in panel.lines]
        for line, bpb in zip(drawn, ([2.5, 1.5], [3.0, 2.0]) * 2, strict=True):  # training and val, of each run
            assert line == pytest.approx(bpb)
    assert list(figure.axes[1].lines[1].get_xdata()) == [1.0, 2.0]
    plot.plt.close(figure)
    (tmp_path / "bytes" / "metrics.jsonl").write_text('{"kind": "train", "iter": 10, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match="holds no evaluation yet"):
        plot.draw_runs((str(tmp_path / "bytes"),))


@pytest.mark.slow
def test_books(run, results, monkeypatch, tmp_path):
    scripts = types.SimpleNamespace(run=lambda command, **keys: run_script(*command[1:]))
    monkeypatch.setattr(books, "subprocess", scripts)
    both = ", ".join(f"{{style: {style}, file: {run}/{style}.txt}}" for style in ("day", "night"))
    (tmp_path / "corpus.yaml").write_text(f"sources: [{both}]\n", encoding="utf-8")
    keys = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--max_iters=2", "--device=cpu", "--dtype=float32"]
    args = [str(tmp_path), "--only=night", "--bytes=3000", "--tokenizer=bpe"]
    settings = [f"--settings={' '.join(keys)} {more}" for more in ("", "--n_embd=4 --vocab_size=265")]
    result, name = start(monkeypatch, books, books.BooksConfig, *args, *settings, positional="corpus")
    book, other = result["books"]
    assert name.startswith("settings_") and (book["book"], book["bytes"], book["max_iters"]) == ("night", 3000, 2)
    assert (book["init_from"], book["n_layer"], book["n_embd"]) == ("scratch", 1, 8) and 0 < book["bpb"] < 9
    assert other["n_embd"] == 4 and other["vocab_size"] == 265 != book["vocab_size"]
    shown = re.sub(" +", " ", books.settings_table([result]))
    assert (
        f"**{min(book['bpb'], other['bpb']):.3f}** |" in shown
        and "night: 3,000 bytes" in shown
        and "`--n_layer=1`" in shown
    )
    assert "| night | 3 | 2 " in re.sub(" +", " ", books.table([result]))
    with pytest.raises(ConfigError, match=r"only: found noon; no text of"):
        start(monkeypatch, books, books.BooksConfig, str(tmp_path), "--only=noon", positional="corpus")
    with pytest.raises(ConfigError, match=r"train\.py failed: .*max_itres"):
        start(monkeypatch, books, books.BooksConfig, *args, "--settings=--max_itres=1", positional="corpus")


@pytest.fixture
def prepare_args(run, tmp_path):
    """A command line of bench.prepare_speed for 50 KB of one style."""
    (tmp_path / "corpus.yaml").write_text(f"sources: [{{style: day, file: {run}/day.txt}}]\n", encoding="utf-8")
    args = [f"--corpus={tmp_path}", "--document_chars=100", "--megabytes=0.05", "--lap_megabytes=0.02", "--repeats=2"]
    return [*args, "--vocab_size=265"]


def test_prepare_speed(prepare_args, results, monkeypatch):
    def prepare_in_this_process(path, out, cfg):
        prepare.main(prepare.PrepareConfig(input=(str(path),), out=str(out), vocab_size=cfg.vocab_size))
        return 0.5, 100.0

    monkeypatch.setattr(prepare_speed, "run_prepare", prepare_in_this_process)
    result, name = start(monkeypatch, prepare_speed, prepare_speed.PrepareSpeedConfig, *prepare_args)
    assert name.startswith("prepare_speed_") and 500 <= result["documents"] <= 520
    assert result["mb_per_s"] == pytest.approx(0.05 / 0.5, rel=0.01) and result["peak_mem_mb"] == 100
    assert ordered(result["tok_per_sec"]) and ordered(result["tiktoken_tok_per_sec"]) and ordered(result["ratio"])
    assert "tiktoken" in prepare_speed.table([result]) and "from start to end | 0.1 " in prepare_speed.table([result])


@pytest.mark.slow
def test_prepare_speed_in_a_process_of_its_own(prepare_args, results, monkeypatch):
    result, _ = start(monkeypatch, prepare_speed, prepare_speed.PrepareSpeedConfig, *prepare_args)
    assert result["mb_per_s"] == pytest.approx(0.05 / result["seconds"], rel=0.01)
    assert 50 < result["peak_mem_mb"] < 2000
    cfg = configurator.parse(prepare_speed.PrepareSpeedConfig, [*prepare_args, "--vocab_size=200"])
    with pytest.raises(ConfigError, match=r"prepare\.py failed: .*vocab_size"):
        prepare_speed.main(cfg)


@pytest.mark.slow
def test_torture(run, results, monkeypatch):
    args = [f"--dataset={run / 'data'}", "--minutes=0.4", "--seed=3"]
    result, name = start(monkeypatch, torture, torture.TortureConfig, *args)
    assert name.startswith("torture_") and result["steps"] > 0 and result["losses compared"] >= result["steps"]
    assert result["lost steps"] == result["losses that differ"] == result["codes that are wrong"] == 0
    assert sum(result[fault] for fault in torture.FAULTS) == result["resumes"] > 0
    assert 0 < result["watch_ms"] < result["step_ms"] and "lost steps" in torture.table([result])


def test_demo(run, results, monkeypatch, capsys):
    args = [f"{run}/out", "--device=cpu", "--dtype=float32"]
    result, name = start(monkeypatch, demo, demo.DemoConfig, *args, positional="run")
    assert name.startswith("demo_out_") and result["steps"] == 4 and result["seconds"] > 0
    assert [p["iter"] for p in result["curve"]] == [1, 2, 3, 4]
    assert result["curve"][-1]["loss"] == result["val"]["loss"]
    assert set(result["val"]["loss_by_style"]) == set(result["test"]["loss_by_style"]) == {"day", "night"}
    assert 0 < result["test"]["loss"] < 5
    assert "test bits/byte" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not found"):
        demo.main(demo.DemoConfig(run=f"{run}/nothing", device="cpu"))


def test_writing(run, results, monkeypatch, capsys):
    args = [f"{run}/out/best.pt", "--passages=3", "--max_new_tokens=40", "--device=cpu", "--dtype=float32"]
    args += ["--temperature=0.9", "--repetition_penalty=1.1"]
    result, name = start(monkeypatch, writing, writing.WritingConfig, *args, positional="checkpoint")
    assert name.startswith("writing_out_") and set(result["styles"]) == {"day", "night"}
    assert [entry["coder"].split(",")[0] for entry in result["bpb"]] == [
        "RoboPoet",
        "Kneser-Ney",
        "PPMd",
        "xz -9e",
        "zstd -22",
    ]
    ours, n_gram = (result["bpb"][i] for i in (0, 1))  # sums over styles
    for entry in (ours, n_gram):
        assert min(entry["bpb_by_style"].values()) <= entry["bpb"] <= max(entry["bpb_by_style"].values())
    for entry in result["bpb"]:  # the text is one line again and again; the model is hardly trained
        low, high = (2, 8) if entry["coder"] == "RoboPoet" else (0, 2)
        assert low <= entry["bpb"] < high and all(low <= bpb < high for bpb in entry["bpb_by_style"].values())
        assert set(entry["bpb_by_style"]) == {"day", "night"}
    for figures in result["styles"].values():
        assert figures["passages"]["model"] == 3 and figures["passages"]["people"] > 1
        assert figures["people"]["real_words"]["mean"] > 0.9 and figures["coherent"] == {"model": 0, "people": 1}
        assert figures["people"]["longest_copy_characters"]["p1"] > 25 and "known_speakers" not in figures["people"]
    assert "## Writing" in table.tables()
    rows = [re.split(r" *\| *", line) for line in capsys.readouterr().out.splitlines()]
    heads = [i for i, row in enumerate(rows) if row[1:3] in (["Style: day", "out"], ["Style: night", "out"])]
    settings = [["temperature", "0.9"], ["repetition_penalty", "1.1"]]
    assert len(heads) == 2 and all([row[1:3] for row in rows[i + 2 : i + 4]] == settings for i in heads)
    assert not any("max_copy" in row for row in rows)  # it is off


def test_copying(run, results, monkeypatch, capsys):
    args = [f"{run}/out/best.pt", "--passages=4", "--together=2", "--max_new_tokens=40", "--device=cpu"]
    result, name = start(monkeypatch, copying, copying.CopyingConfig, *args, "--max_copy=3", positional="checkpoint")
    assert name.startswith("copying_") and result["longest"][1] < 3 and ordered(result["ratio"])
    assert "| out | 4, 2 together" in capsys.readouterr().out
    assert copying.longest_copy("x to be or to be", [" to be or not to be "]) == 3
    with pytest.raises(ConfigError, match="max_copy: is missing"):
        start(monkeypatch, copying, copying.CopyingConfig, *args, positional="checkpoint")


def test_html(run, results, monkeypatch, capsys):
    args = [f"{run}/out/best.pt", "--tokens=5", "--repeats=1"]
    result, name = start(monkeypatch, html, html.HTMLConfig, *args, positional="checkpoint")
    assert name.startswith("html_") and ordered(result["tokens_per_s"]["greedy"]) and result["limit_tokens_per_s"] > 1
    assert f"| {result['parameters']:,} " in capsys.readouterr().out


def test_window(run, results, monkeypatch, capsys):
    args = [f"{run}/out/best.pt", "--blocks=3", "--rows=5", "--device=cpu", "--dtype=float32"]
    result, name = start(monkeypatch, window, window.WindowConfig, *args, positional="checkpoint")
    assert name.startswith("window_out_") and result["positions"] == "learned" and 1 < result["rows"] <= 5
    assert result["generated"] == pytest.approx(result["half_blocks"], abs=1e-4)  # learned positions know no other way
    assert len(result["generated"]) == len(result["ms_per_step"]) == 3 and all(
        0 < loss < 6 for loss in result["generated"]
    )
    assert "later blocks, as generated" in capsys.readouterr().out and "## Beyond the first block" in table.tables()
    with pytest.raises(ConfigError, match="blocks: no document of"):
        window.main(window.WindowConfig(f"{run}/out/best.pt", blocks=1000, device="cpu"))


def test_half_blocks_are_read_as_a_loop_over_tokens_reads_them():
    model, text = make(ROTARY, scale=2.0), ids(2, 50)
    losses = window.read_in_half_blocks(model, text, torch.tensor([60, 59]))
    for n in range(1, 50):
        seen = text[:, max(-(-(n - 16) // 8) * 8, 0) : n].clone()
        seen[:, 0] = torch.tensor([60, 59])
        expected = -model(seen)[0][:, -1].log_softmax(-1).gather(1, text[:, n : n + 1])[:, 0]
        torch.testing.assert_close(losses[:, n - 1], expected, atol=1e-9, rtol=0)


def test_an_absolute_path_is_cut_from_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/bench/demo.py", "/a/b/out/", "--out=/c/d.x", "data/mine", "--n=1/2"])
    assert common.command_line() == "python -m bench.demo out/ --out=d.x data/mine --n=1/2"


@pytest.mark.parametrize("plans", [(), ("3:8:2", "6:9:3")])
def test_the_command_that_trains_is_read_as_the_config_it_was_made_from(plans):
    cfg = train.TrainConfig(n_layer=3, bias=False, wandb="offline", plans=plans)
    command = common.train_command(cfg, out_dir="out/here")
    read = configurator.parse(train.TrainConfig, command[3:])
    assert read == dataclasses.replace(cfg, out_dir="out/here", tensorboard=False, wandb="off")


def test_progress_is_printed_though_no_terminal_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "PROGRESS_S", 0.001)
    path, took = tmp_path / "log", []

    def wait_for(line):
        while line not in path.read_text(encoding="utf-8"):
            time.sleep(0.001)

    with open(path, "w", encoding="utf-8") as log, contextlib.redirect_stderr(log), within(60):
        for lap in common.progress(range(3), "laps"):
            took.append(lap)
            wait_for(f"laps: {lap} of 3, ")
        for style in common.progress((style for style in ["verse"]), "styles"):
            took.append(style)
            wait_for("styles: 0, ")
    assert took == [0, 1, 2, "verse"]
    lines = r"(laps: [012] of 3, [\d.]+ min\n)+(styles: 0, [\d.]+ min\n)+"
    assert re.fullmatch(lines, path.read_text(encoding="utf-8"))  # none after the end


def test_every_bench_that_writes_a_result_shows_progress():
    sources = {path.name: path.read_text(encoding="utf-8") for path in (README.parent / "bench").glob("*.py")}
    benches = {name for name, text in sources.items() if "write_result(" in text} - {"common.py"}
    silent = [name for name in benches if not re.search(r"\b(progress|reporting)\(", sources[name])]
    assert len(benches) > 12 and not silent


def test_table_checks_the_readme(run, results, tmp_path, monkeypatch, capsys):
    start(monkeypatch, demo, demo.DemoConfig, f"{run}/out", "--device=cpu", "--dtype=float32", positional="run")
    readme, tables = tmp_path / "README.md", tmp_path / "RESULTS.md"
    marked = "<!-- {0} -->\n<!-- /{0} -->\n"
    readme.write_text(f"above\n{marked.format('results')}{marked.format('files')}below\n", encoding="utf-8")
    tables.write_text(f"above\n{marked.format('results')}below\n", encoding="utf-8")
    keys = {"readme": str(readme), "results": str(tables)}
    check, write = table.TableConfig(check=True, **keys), table.TableConfig(write=True, **keys)
    with pytest.raises(ConfigError, match="--write"):
        table.main(check)
    table.main(write)
    table.main(check)
    text = tables.read_text(encoding="utf-8")
    assert text == f"above\n<!-- results -->\n{table.tables()}<!-- /results -->\nbelow\n"
    for path, old, new in ((tables, "| 4 ", "| 5 "), (readme, "No GPU", "A GPU"), (readme, "model.py", "mode.py")):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{path.name}: its .* are out of date"):
            table.main(check)
        path.write_text(text, encoding="utf-8")
    readme.write_text("no block", encoding="utf-8")
    with pytest.raises(ConfigError, match="lacks"):
        table.main(write)
    assert table.TableConfig(write=True, check=True).problems()


def test_the_readme_shows_the_results():
    table.main(table.TableConfig(check=True, readme=str(README), results=str(README.parent / "bench" / "RESULTS.md")))

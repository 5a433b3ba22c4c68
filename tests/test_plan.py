"""train.py --minutes: what it chooses, that the run then fits the minutes, and when it starts from the base model."""

import contextlib
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_book, records, save_random

import configurator
import prepare
import train
from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.text import dataset, tokenizer
from robopoet.text.dataset import read_meta
from robopoet.training import plan, schedule
from robopoet.training.run import Start
from robopoet.weights import bases, checkpoint

CPU = Machine(torch.device("cpu"), torch.float32)
NEW, THEIRS = Start(None, None, False), Start({"model_extra": {}}, None, False)
FLOPS = 50e9  # a second, of the machine that the tests imagine


def cost(cfg: train.TrainConfig) -> float:
    """Seconds of a step on the imagined machine; a batch of an evaluation takes a third."""
    weights = 12 * cfg.n_layer * cfg.n_embd**2 + 4096 * cfg.n_embd
    return 6 * weights * cfg.rows_per_step * cfg.block_size / FLOPS


@pytest.fixture
def imagine(monkeypatch):
    """Choose for an imagined text on an imagined machine; returns the config, the text, and how long the choice took.

    tokens: of the text. load: a step takes so many times as long, each third one twice that. memory: of the largest
    step, in seconds it would take. tried: gets each config that is timed. context: of the checkpoint.
    """
    wall = SimpleNamespace(now=0.0)
    for module in (plan, schedule):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: wall.now))

    def choose(minutes, tokens, *argv, start=NEW, load=1.0, memory=math.inf, tried=None, vocab_size=4095, context=None):
        def trial(cfg):
            if tried is not None:
                tried.append(cfg)

            def work(number: int, share: float) -> None:
                if cost(cfg) > memory:
                    raise RuntimeError("MPS backend out of memory")  # CUDA's error is a kind of it
                wall.now += cost(cfg) * share * load * (1 if number % 3 else 2)

            return functools.partial(work, share=1), functools.partial(work, share=1 / 3)

        splits = {"train": SimpleNamespace(tokens=tokens), "val": SimpleNamespace(tokens=tokens // 20)}
        imagined = SimpleNamespace(splits=splits, vocab_size=vocab_size)
        cfg = configurator.parse(train.TrainConfig, [f"--minutes={minutes}", *argv])
        cfg = plan._change(cfg, block_size=context or cfg.block_size)  # as a checkpoint's is taken
        begin = wall.now
        return (
            plan.fit_minutes(cfg, start, imagined, schedule.Clock(cfg.minutes, CPU), trial),
            imagined,
            wall.now - begin,
        )

    return choose


@pytest.mark.parametrize("load", [1, 4])
@pytest.mark.parametrize("tokens", [3_000, 30_000, 300_000, 3_000_000])
@pytest.mark.parametrize("minutes", [1, 10, 100])
def test_a_run_fits_its_minutes_or_ends_with_the_text(imagine, minutes, tokens, load):
    cfg, meta, seconds = imagine(minutes, tokens, load=load)
    step = cost(cfg) * load
    fitted = plan.finish(cfg, tokens // cfg.block_size)
    evaluations = -(-fitted.max_iters // fitted.eval_interval)
    n_batches = -(-meta.splits["val"].tokens // (cfg.batch_size * cfg.block_size))
    per_evaluation = min(n_batches, cfg.eval_iters or n_batches) * step / 3 + schedule.SAVE_S
    seconds += fitted.max_iters * step + evaluations * per_evaluation
    passes = fitted.max_iters * cfg.rows_per_step * cfg.block_size / tokens
    assert seconds <= 60 * minutes and evaluations >= 10
    assert seconds >= 0.85 * 60 * minutes or passes == pytest.approx(plan.FROM_NOTHING.epochs, rel=0.05)
    assert cfg.block_size == min(256, tokens // 20 - 1)  # a split shorter than a row is refused
    assert cfg.positions == "rotary" and fitted.warmup_iters < fitted.max_iters


def test_a_shape_that_needs_too_much_memory_leaves_the_one_before_it(imagine):
    def largest(memory: float, *argv: str) -> tuple[int, int, int]:
        cfg = imagine(1e6, 10**9, *argv, memory=memory)[0]
        return cfg.n_layer, cfg.n_embd, cfg.batch_size

    sizes = [(layers, width, 4) for layers, _, width in plan.LADDER]
    costs = [cost(train.TrainConfig(n_layer=n, n_embd=w, batch_size=4, block_size=256)) for n, w, _ in sizes]
    assert costs == sorted(costs) and largest(math.inf) == sizes[-1]
    assert [largest(seconds) for seconds in costs] == sizes
    assert largest(costs[0] / 2) == (1, 128, 4) and largest(costs[0] / 20) == (1, 64, 1)
    assert largest(costs[0] / 2, "--n_layer=2", "--n_embd=192", "--n_head=3") == (2, 192, 2)
    with pytest.raises(ConfigError, match=r"^the GPU has too little memory; take "):
        largest(costs[0] / 1000)


def test_a_busy_machine_trains_a_smaller_model_rather_than_none(imagine):
    given = ["--n_layer=3", "--n_head=3", "--n_embd=192"]
    busy = 4 * 60 / 8 / cost(train.TrainConfig(n_layer=2, n_embd=192, batch_size=4, block_size=256))
    cfg = imagine(4, 1_000_000, load=busy)[0]
    assert (cfg.n_layer, cfg.n_embd) == (1, 64) and cfg.max_iters >= plan.FROM_NOTHING.least
    cfg = imagine(4, 1_000_000, *given, load=busy / 4)[0]
    assert cfg.batch_size < 4 and cfg.max_iters >= plan.FROM_NOTHING.least


@pytest.mark.parametrize(("n_kv_head", "heads"), [(1, {1, 2, 3, 4, 6, 8, 12}), (2, {2, 4, 6, 8, 12}), (8, {8})])
def test_only_shapes_whose_heads_can_share_keys_are_tried(imagine, n_kv_head, heads):
    tried: list[train.TrainConfig] = []
    imagine(1e6, 10**9, f"--n_kv_head={n_kv_head}", tried=tried)
    with contextlib.suppress(ConfigError):  # eight heads alone may be too many
        imagine(100, 10**6, f"--n_kv_head={n_kv_head}", load=1e4, tried=tried)
    assert {each.n_head for each in tried} == heads


def test_what_is_timed_is_compiled_by_the_run_alone_and_programs_beside_it_count_little(imagine):
    tried: list[train.TrainConfig] = []
    cfg = imagine(30, 10_000_000, "--compile=true", tried=tried)[0]
    assert {each.compile for each in tried} == {"false"} and cfg.compile == "true"
    assert len(tried) == len(set(tried)) > 1  # each once


def test_more_minutes_or_more_text_never_choose_a_smaller_model(imagine):

    def weights(minutes, tokens):
        cfg = imagine(minutes, tokens)[0]
        return cfg.n_layer * cfg.n_embd**2

    by_minutes = [weights(minutes, 1_000_000) for minutes in (1, 4, 16, 64, 256)]
    by_tokens = [weights(60, tokens) for tokens in (1_000, 10_000, 100_000, 1_000_000)]
    assert by_minutes == sorted(by_minutes) and by_minutes[0] < by_minutes[-1]
    assert by_tokens == sorted(by_tokens) and by_tokens[0] < by_tokens[-1]


def test_what_is_given_stays(imagine):
    argv = "--n_layer=5 --n_head=1 --n_embd=64 --dropout=0.3 --batch_size=3 --eval_iters=7 --positions=learned"
    cfg = imagine(5, 100_000, *argv.split(), "--max_iters=11", "--block_size=32", "--patience=2")[0]
    found = (cfg.n_layer, cfg.n_embd, cfg.dropout, cfg.batch_size, cfg.eval_iters, cfg.positions, cfg.max_iters)
    assert found == (5, 64, 0.3, 3, 7, "learned", 11) and (cfg.block_size, cfg.patience) == (32, 2)
    cfg = imagine(500, 100_000, "--epochs=2")[0]
    assert cfg.max_iters == pytest.approx(200_000 / (4 * 256), abs=1) and cfg.epochs == 2


def test_weights_to_start_from_take_gentle_rates(imagine):
    ours, theirs = (Start(content, None, False) for content in ({"model_extra": {}, "config": {}}, {"model_extra": {}}))
    cfg = imagine(5, 20_000, start=ours)[0]
    assert (cfg.optimizer, cfg.learning_rate, cfg.muon_learning_rate) == ("muon", 3e-3, 0.01)
    assert cfg.max_iters * 8 * cfg.block_size <= (plan.FROM_OURS.epochs + 1) * 20_000
    cfg = imagine(1000, 20_000, "--epochs=10", start=theirs, vocab_size=49_173)[0]
    assert (cfg.optimizer, cfg.peak_lr, cfg.batch_size) == ("adafactor", 2e-3, 1)
    assert (cfg.sampled_softmax, cfg.dropout) == (0, 0.1)  # as the config has them
    assert cfg.eval_interval == cfg.max_iters // 4
    busy = 5 * 60 / 15 / cost(train.TrainConfig(batch_size=1, block_size=256))
    cfg = imagine(5, 20_000, start=theirs, load=busy, context=256)[0]  # few steps are better than none
    assert plan.FROM_OTHERS.least <= cfg.max_iters < plan.FROM_NOTHING.least


@pytest.mark.parametrize("start", [NEW, THEIRS])
def test_time_that_a_text_leaves_is_spent_on_evaluating_it_in_full(imagine, start):
    assert imagine(500, 100_000, start=start)[0].eval_iters == 0
    assert imagine(5, 3_000_000, start=start)[0].eval_iters > 0


@pytest.mark.parametrize("tokens, context", [(100_000, 1024), (14_000, 14_000 // 20 - 1), (2_000, 99)])
def test_a_pretrained_model_reads_the_longest_rows_that_the_text_has_for_it(imagine, tokens, context):
    cfg = imagine(500, tokens, start=THEIRS, context=2048)[0]
    assert (cfg.batch_size, cfg.block_size) == (1, context) and cfg.max_iters >= 18


def test_a_slow_machine_reads_shorter_rows(imagine):
    shape = ["--n_layer=30", "--n_embd=576"]
    slow = 10 * 60 / 60 / cost(train.TrainConfig(n_layer=30, n_embd=576, batch_size=1, block_size=256))
    cfg = imagine(10, 100_000, *shape, start=THEIRS, context=2048, load=slow)[0]
    assert (cfg.batch_size, cfg.block_size) == (1, 256) and cfg.max_iters >= plan.FROM_OTHERS.least


def test_shorter_rows_are_taken_only_if_they_save_time(imagine, monkeypatch):
    monkeypatch.setitem(globals(), "cost", lambda cfg: 15.0)  # as where two threads wait for a busy core
    assert imagine(5, 20_480, start=THEIRS, context=2048)[0].block_size == 1023


def test_embeddings_forget_within_an_epoch_and_matrices_decay_gently(imagine):
    cfg = imagine(5, 20_480)[0]
    steps = 20_480 / cfg.tokens_per_step
    assert steps == 40
    kept = (1 - cfg.peak_lr * cfg.weight_decay) ** steps
    assert kept == pytest.approx(math.exp(-1 / 0.7), rel=0.1) and cfg.muon_weight_decay == 0.1
    cfg = imagine(5, 100_000_000)[0]
    assert (cfg.weight_decay, cfg.muon_weight_decay) == (0.1, 0.1)
    cfg = imagine(5, 20_480, "--weight_decay=0.7")[0]
    assert cfg.weight_decay == cfg.muon_weight_decay == 0.7
    for argv, start in ((["--optimizer=adamw"], NEW), ([], Start({"model_extra": {}}, None, False))):
        cfg = imagine(5, 20_480, *argv, start=start)[0]
        assert (cfg.weight_decay, cfg.muon_weight_decay) == (0.1, None)


def test_too_few_minutes_and_several_ranks_are_refused(imagine):
    with pytest.raises(ConfigError, match=r"^minutes: 0.0001 are too few, a step takes \d+\.\d s here"):
        imagine(0.0001, 10**6)
    two = dataclasses.replace(CPU, world_size=2)
    with pytest.raises(ConfigError, match=r"^minutes: is for one process"):
        schedule.Clock(1, two)


def test_a_run_of_minutes_writes_what_repeats_it_and_resumes(small, base, tmp_path, capsys):
    keys = ["n_layer", "n_head", "n_embd", "block_size", "batch_size", "device", "dtype", "dataset"]
    argv = [f"--{key}={small[key]}" for key in keys] + ["--log_interval=1"]
    out = tmp_path / "out"
    train.main(configurator.parse(train.TrainConfig, [*argv, f"--out_dir={out}", "--minutes=9", "--epochs=1"]))
    printed = capsys.readouterr().out
    chosen = yaml.safe_load(printed[printed.index("# chosen for 9 minutes") : printed.index("step ")])
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert chosen["learning_rate"] == 1e-2 and chosen["muon_weight_decay"] >= 0
    assert chosen["init_from"] == "scratch" and chosen["positions"] == kept["positions"] == "rotary"
    assert chosen["max_iters"] == kept["max_iters"] == records(out)[-1]["iter"] and "minutes" not in kept
    losses = [r["loss"] for r in records(out)]
    again = [f"{out}/config.yaml", f"--out_dir={tmp_path}/again"]
    train.main(configurator.parse(train.TrainConfig, again))
    assert [r["loss"] for r in records(tmp_path / "again")] == losses
    capsys.readouterr()
    train.main(configurator.parse(train.TrainConfig, [*argv, f"--out_dir={out}", "--minutes=9", "--init_from=auto"]))
    printed = capsys.readouterr().out
    assert "resuming from" in printed and "chosen for" not in printed


def write(folder, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_short_book_starts_from_the_base_model(base, tmp_path, monkeypatch, capsys):
    def prepared(name: str, text: str, *argv: str) -> dataset.Meta:
        argv = [f"--input={write(tmp_path, f'{name}.txt', text)}", f"--out={tmp_path}/{name}", *argv]
        prepare.main(configurator.parse(prepare.PrepareConfig, argv))
        return read_meta(tmp_path / name)

    def start_of(name: str, *argv: str) -> str:
        argv = [f"--dataset={tmp_path}/{name}", f"--out_dir={tmp_path}/run_{name}", "--minutes=0.1", *argv]
        argv += ["--device=cpu", "--dtype=float32", "--batch_size=2", "--max_iters=2"]
        train.main(configurator.parse(train.TrainConfig, argv))
        return yaml.safe_load((tmp_path / f"run_{name}" / "config.yaml").read_text()).get("init_from", "scratch")

    prepared("first", make_book(1, 60))
    assert "from a model that knows English: make base, then prepare it again" in capsys.readouterr().out
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16"]
    assert start_of("first", *shape) == "scratch"
    untrained = checkpoint.load(tmp_path / "run_first" / "best.pt")
    checkpoint.save(base, untrained)

    def kind(meta: dataset.Meta) -> list[str]:
        return meta.tokenizer.to_json()["tokens"]

    theirs = kind(read_meta(tmp_path / "first"))
    assert kind(prepared("second", make_book(2, 50))) != theirs
    assert start_of("second", *shape) == "scratch"
    loss = untrained["best_val_loss"]
    known = f"{base} is left out: a val loss of {loss:.2f} is no better than"
    assert capsys.readouterr().err.count(known) == 2
    checkpoint.save(base, untrained | {"best_val_loss": 3.0})
    assert kind(prepared("second", make_book(2, 50))) == theirs
    assert "so that train.py --minutes=N starts from its weights" in capsys.readouterr().out
    assert start_of("second") == str(base)
    assert start_of("second", "--init_from=scratch", *shape) == "scratch"
    assert start_of("first", *shape) == "scratch"  # the base was trained on this very text
    # a text in another language, one too long, and wishes of the user's own get a tokenizer of their own
    assert kind(prepared("chinese", "紅樓夢是一部小說。黛玉道：「早知他來，我就不來了。」\n" * 99)) != theirs
    assert kind(prepared("wish", make_book(2, 50), "--vocab_size=300")) != theirs
    assert kind(prepared("bpe", make_book(2, 50), "--tokenizer=bpe")) != theirs
    monkeypatch.setattr(prepare, "SHORT", 1000)
    assert kind(prepared("long", make_book(3, 50))) != theirs
    assert start_of("long", *shape) == "scratch"
    assert isinstance(tokenizer.from_json(read_meta(tmp_path / "long").tokenizer), tokenizer.BPETokenizer)


def test_a_base_model_must_beat_the_frequencies_of_its_tokens(base, capsys):
    path = save_random(base)
    content = checkpoint.load(path)
    n = content["model_args"]["vocab_size"]
    harmonic = sum(1 / rank for rank in range(1, n + 1))
    entropy = sum(math.log(rank * harmonic) / (rank * harmonic) for rank in range(1, n + 1))
    for loss, is_taken in ((entropy - 0.01, True), (entropy + 0.01, False), (math.inf, False)):
        checkpoint.save(base, content | {"best_val_loss": loss})
        assert (bases.load_base() is not None) == is_taken
        assert is_taken == ("is left out" not in capsys.readouterr().err)
    base.unlink()
    assert bases.load_base() is None

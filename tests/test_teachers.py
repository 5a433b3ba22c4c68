"""Learning from teachers: the loss against a naive one, resuming, and teachers that don't fit."""

from pathlib import Path

import pytest
import torch
from conftest import LLAMA, make_book
from peak import PeakMemory

import prepare
import train
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, ConfigError
from robopoet.machine import Machine
from robopoet.text.dataset import read_meta
from robopoet.text.windows import TrainWindows, open_split
from robopoet.training.loss import Teachers
from robopoet.weights import checkpoint
from train import TrainConfig

CPU = Machine(torch.device("cpu"), torch.float32)


def run(keys: dict, **changes) -> Path:
    """Train with those keys; returns the run's folder."""
    cfg = TrainConfig(**keys | changes)
    assert cfg.problems() == []
    train.main(cfg)
    return Path(cfg.out_dir)


@pytest.fixture
def teachers(small, tmp_path) -> str:
    """A GPT-2 and a Llama, as the key `teacher` names them."""
    keys = small | {"max_iters": 20}
    outs = [run(keys | kind, out_dir=str(tmp_path / name)) for name, kind in (("gpt2", {}), ("llama", LLAMA))]
    return ",".join(str(out / "best.pt") for out in outs)


@pytest.mark.parametrize("sampled, kind", [(0, {}), (30, {}), (0, LLAMA)], ids=str)
def test_the_loss_is_the_mean_of_the_texts_and_the_teachers_cross_entropies(small, teachers, sampled, kind):
    cfg = TrainConfig(**small | kind | {"teacher": teachers, "teacher_share": 0.3, "sampled_softmax": sampled})
    folder = Path(cfg.dataset)
    meta = read_meta(folder)
    split = open_split(folder, "train", meta, cfg.block_size, CPU.device)
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    model = train.make_model(cfg, meta.vocab_size)
    weights = [checkpoint.build_model(checkpoint.load(Path(path)), Path(path)).double() for path in teachers.split(",")]
    student = train.make_model(cfg, meta.vocab_size).double()
    state = train.build_state(cfg, CPU, model, split, meta)
    drawn = []
    if sampled:
        draw = state.sampled_softmax
        state.sampled_softmax = lambda y: drawn.append(draw(y)) or drawn[-1]
    loss, _ = train.train_step(state, windows, 0)

    x, y = windows.batch(0, cfg.rows_per_step, CPU.device)
    ids, shifts = drawn[0][1] if sampled else (torch.arange(meta.vocab_size), torch.zeros(meta.vocab_size))
    places = {id: place for place, id in enumerate(ids.tolist())}
    every = torch.zeros_like(y)  # targets, so that logits of all positions are returned
    logits, *taught = ((model(x, every)[0][..., ids] + shifts).softmax(-1) for model in (student, *weights))
    total = 0.0
    for row in range(x.shape[0]):
        for place in range(x.shape[1]):
            log_probs = logits[row, place].log()
            soft = sum(probs[row, place] for probs in taught) / 2
            total -= 0.7 * log_probs[places[y[row, place].item()]] + 0.3 * (soft * log_probs).sum()
    assert loss.item() == pytest.approx(total.item() / y.numel(), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_teachers_take_no_more_memory_the_more_there_are(n):
    """At most: the sum of the probabilities so far, and one teacher's logits beside its loss or its probabilities."""
    teachers, shape = Teachers.__new__(Teachers), GPTConfig(block_size=32, vocab_size=3000, n_layer=1, n_embd=16)
    teachers.share, teachers.models = 0.5, [GPT(shape).eval() for _ in range(n)]
    ids = torch.zeros(8, 32, dtype=torch.long)
    with PeakMemory() as memory:
        probs = teachers(ids, ids, None)
    assert probs.sum(-1).allclose(torch.ones(8, 32))
    assert memory.peak < 3.3 * probs.nbytes


def test_a_student_resumes_to_the_same_bits(small, teachers, tmp_path):
    keys = small | {"teacher": teachers, "max_iters": 12, "lr_decay_iters": 12, "dropout": 0.1, "eval_interval": 6}
    whole = run(keys, out_dir=str(tmp_path / "whole"))
    run(keys, out_dir=str(tmp_path / "parts"), max_iters=6)
    parts = run(keys, out_dir=str(tmp_path / "parts"), init_from="resume")
    alone = run(keys, out_dir=str(tmp_path / "alone"), teacher="")
    ends = [checkpoint.load(out / "ckpt.pt")["model"]["lm_head.weight"] for out in (whole, parts, alone)]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_teachers_that_do_not_fit_are_refused(small, teachers, tmp_path):
    with pytest.raises(ConfigError, match=r"^teacher: .*best\.pt has a block_size of 32, the run 64; lower that"):
        run(small, teacher=teachers, block_size=64)
    with pytest.raises(CheckpointError, match=r"none\.pt: not found"):
        run(small, teacher="none.pt")
    (tmp_path / "other.txt").write_text(make_book(9, 900), encoding="utf-8")
    other = tmp_path / "other"
    prepare.main(prepare.PrepareConfig(input=(str(tmp_path / "other.txt"),), out=str(other), vocab_size=300))
    with pytest.raises(ConfigError, match=r"has another tokenizer than .*other"):
        run(small, teacher=teachers, dataset=str(other))


def test_a_teacher_that_the_run_would_replace_is_refused(small, tmp_path, monkeypatch):
    run(small)
    best = Path(small["out_dir"]) / "best.pt"
    before = best.read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(best)
    for teacher in (best, "out/best.pt", "out/../out/ckpt.pt", "link"):
        with pytest.raises(
            ConfigError, match=f"^teacher: {teacher} is what this run replaces; choose another out_dir$"
        ):
            run(small, teacher=str(teacher))
        with pytest.raises(ConfigError, match=f"^init_from: {teacher} is what this run replaces; choose another"):
            run(small, init_from=str(teacher))
    with pytest.raises(ConfigError, match="is what this run replaces"):
        run(small, init_from="resume", teacher=str(best), max_iters=8)
    assert best.read_bytes() == before and not (best.parent / "previous").exists()
    copy = tmp_path / "copy.pt"
    copy.write_bytes(before)
    run(small, init_from=str(copy), teacher=str(copy))


def test_a_teacher_that_is_another_model_after_a_resume_is_refused(small, teachers):
    first, second = (Path(name) for name in teachers.split(","))
    out = run(small, teacher=teachers, max_iters=3)
    found = checkpoint.load(out / "ckpt.pt")
    assert found["teachers"].keys() == set(teachers.split(","))
    whole = first.read_bytes()
    checkpoint.save(first, checkpoint.load(first) | {"iter_num": 0})  # another file, but the same model
    run(small, teacher=teachers, init_from="resume", max_iters=4)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=rf"^teacher: {first} is not the model that has taught .* a new run$"):
        run(small, teacher=teachers, init_from="resume")
    first.write_bytes(whole)
    run(small, teacher=teachers, init_from="resume", max_iters=5)
    run(small, teacher=str(second), init_from="resume")  # asked for by name
    checkpoint.save(out / "ckpt.pt", {key: value for key, value in found.items() if key != "teachers"})  # an older one
    run(small, teacher=teachers, init_from="resume")

"""Run by test_mps.py in a process of its own: train, sample and serve on a pretended MPS device, and as on the CPU."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, LLAMA, records, save_random
from pretended_mps import modes, pretended_mps

import train
from robopoet.serving.engine import Choice, Engine, Gain
from robopoet.writing.passage import make_settings
from robopoet.writing.poet import Poet
from train import TrainConfig

FREE = {"until": "tokens", "max_new_tokens": 8}
SETTINGS = [
    {"temperature": 0},
    {"top_p": 1.0},
    {"top_p": 0.6, "top_k": 5, "min_p": 0.1, "style": "bard:1,alice:2"},
    {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "max_copy": 3},
]


def run(keys: dict, **changes) -> list[tuple[str, float]]:
    """Train with those keys; returns the kind and loss of each record, those of training and those of evaluations."""
    cfg = TrainConfig(**keys | changes)
    assert cfg.problems() == []
    train.main(cfg)
    return [(record["kind"], record["loss"]) for record in records(cfg.out_dir) if "loss" in record]


@pytest.mark.parametrize(
    "keys",
    [
        {"ema": 0.9, "sample_tokens": 6},
        {"positions": "rotary", "sampled_softmax": 30, "gradient_accumulation_steps": 2, "optimizer": "adamw"},
        {"dtype": "float16", "recompute": True, "dropout": 0.1, "optimizer": "adamw"},
        {"dtype": "bfloat16", "positions": "rotary", "sampled_softmax": 30},
        {**LLAMA, "recompute": True},
    ],
    ids=str,
)
def test_a_run_is_resumed_and_evaluated_with_the_losses_of_the_cpu(small, tmp_path, keys):
    small |= {"n_layer": 1, "block_size": 16, "warmup_iters": 1, "eval_iters": 2}
    run(small, out_dir=str(tmp_path / "taught"), max_iters=1)
    best = str(tmp_path / "taught/best.pt")
    keys = small | keys | {"teacher": f"{best},{best}", "max_iters": 3, "lr_decay_iters": 3, "eval_interval": 2}
    on_cpu = run(keys, out_dir=str(tmp_path / "cpu"))
    with pretended_mps():
        run(keys, device="mps", max_iters=2)
        on_mps = run(keys, device="auto", init_from="resume")
        train.main(
            TrainConfig(**keys | {"device": "mps", "eval_only": True, "init_from": f"{keys['out_dir']}/best.pt"})
        )
    assert [kind for kind, _ in on_mps] == [kind for kind, _ in on_cpu]
    near = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-1}[keys["dtype"]]  # dropout draws other bits
    assert [loss for _, loss in on_mps] == pytest.approx([loss for _, loss in on_cpu], rel=near)


@pytest.fixture
def copying(monkeypatch):
    """A training text in which each single letter follows any two words."""
    letters = frozenset(bytes([letter]) for letter in range(ord("a"), ord("z") + 1))
    monkeypatch.setattr(Poet, "originality", SimpleNamespace(followers=lambda words, count: letters))


@pytest.mark.parametrize("kind", KINDS)
def test_passages_and_served_texts_are_those_of_the_cpu(copying, monkeypatch, tmp_path, kind):
    path = save_random(tmp_path / "best.pt", **KINDS[kind], n_layer=1)
    expected = [Poet(str(path), "cpu", "float32").write("to be or ", 2, **FREE | given) for given in SETTINGS]
    threads_run = Engine.run

    def run_with_modes(engine: Engine) -> None:
        with modes():
            threads_run(engine)

    monkeypatch.setattr(Engine, "run", run_with_modes)
    with pretended_mps():
        poet = Poet(str(path), "mps", "float32")
        assert [poet.write("to be or ", 2, **FREE | given) for given in SETTINGS] == expected
        assert asyncio.run(serve(poet)) == expected


async def serve(poet: Poet) -> list[list[str]]:
    """The texts of all SETTINGS, generated together; the log-probabilities of all tokens are asked for."""
    prompt, finished, texts = "to be or ", asyncio.Queue(), {}

    def gain(gained: Gain) -> None:
        assert not gained.error
        texts[gained.choice] = texts.get(gained.choice, prompt) + gained.text
        if gained.finish:
            finished.put_nowait(gained.choice)

    engine = Engine(poet, 16)
    engine.start()
    read, requests = poet.read(prompt), []
    for given in SETTINGS:
        settings = make_settings(FREE | given)
        requests.append([Choice(read, settings, i, FREE["max_new_tokens"], 2, True, gain) for i in range(2)])
        engine.submit(requests[-1])
    for _ in range(2 * len(requests)):
        await finished.get()
    engine.stop()
    return [[texts[choice] for choice in request] for request in requests]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_what_the_device_lacks_is_refused(dtype):
    with pretended_mps():
        x = torch.ones(3, device="mps")
        with pytest.raises(RuntimeError, match=f"MPS has no {dtype}"):
            x.to(dtype)
        with pytest.raises(RuntimeError, match="a tensor on the CPU beside one on MPS"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="MPS has no kernel"):
            torch.geqrf(torch.ones(3, 3, device="mps"))
        assert (x + 1).cpu().tolist() == [2.0, 2.0, 2.0]

"""Run by test_kernels.py in a process of its own: a shape's update, compiled for cards that are not there.

Tells what was compiled, what it launched and what waited, and each kernel's registers and memory.
"""

import dataclasses
import re
import tempfile
from pathlib import Path

import torch
from peak import PeakMemory
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import configurator
import robopoet.machine
import train
from bench import pretended_cuda
from bench.launches import Watch
from bench.pretended_cuda import CARDS, DEVICE, H100
from model import GPT, GPTConfig
from robopoet.machine import Machine
from robopoet.training import plan

VOCAB = {"gpt2": 50_257, "llama": 49_152}
ROOT = Path(train.__file__).parent
LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=false", "--n_head=9", "--n_kv_head=3"]
SHAPES = {  # the keys of each; its layers are fewer, as they are alike
    "reference": ["config/robopoet.yaml"],
    "few_books": ["config/few_books.yaml"],
    "gpt2": ["config/gpt2.yaml", "--gradient_accumulation_steps=2"],
    "llama": [*LLAMA, "--n_embd=576", "--block_size=256", "--batch_size=8", "--dropout=0.1"],
}


def make_state(shape: str, dtype: torch.dtype, *keys: str) -> train.State:
    """What train.py would build for a shape, on the pretended card."""
    args = [str(ROOT / key) if key.startswith("config/") else key for key in SHAPES[shape]]
    cfg = configurator.parse(train.TrainConfig, [*args, "--compile=true", *keys])
    values = {key: getattr(cfg, key) for key in (*plan.SHAPE, "dropout")}
    with DEVICE:  # fake parameters can't be moved
        model = GPT(GPTConfig(vocab_size=VOCAB.get(shape, 6725), **values))
    model.to = lambda device: model
    scaler, made = torch.amp.GradScaler, []
    torch.amp.GradScaler = lambda device, enabled: made.append(scaler("cpu", enabled=enabled)) or made[0]
    state = train.build_state(cfg, Machine(DEVICE, dtype), model)
    torch.amp.GradScaler, made[0]._device = scaler, "cuda"
    return state


def update(state: train.State, n_tokens: int = 0) -> None:
    """An update as train_step makes it."""
    cfg, step = state.cfg, torch.zeros((), dtype=torch.long, device=DEVICE)
    ids = torch.zeros(cfg.rows_per_step, n_tokens or cfg.block_size, dtype=torch.long, device=DEVICE)
    train.update(state, ids, ids, step, 0.5)
    if state.average:
        state.average.update(3)


def trace(shape: str, dtype: str, card_numbers: list[int], *keys: str) -> dict:
    """Three updates of a shape and a batch of its evaluation; each kernel written for them is compiled for each card.

    tried: for each card and kernel, what each block size led to.
    """
    written = pretended_cuda.pretend(H100)
    robopoet.machine.has_triton = lambda: True
    counters.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch._dynamo.config.patch(error_on_recompile=True):
        state = make_state(shape, getattr(torch, dtype), *keys)
        update(state)
        with Watch() as watch:
            update(state)
            update(state)
            ids = torch.zeros(4, state.cfg.block_size, dtype=torch.long, device=DEVICE)
            with torch.no_grad(), state.machine.autocast():
                state.model.eval()(ids, ids, reduction="none")
    found = {"breaks": dict(counters["graph_break"]), "graphs": counters["stats"]["unique_graphs"]}
    found |= {"parts": len(written), "waits": watch.waits, "launches": watch.launches}
    found["written"] = [[kind for kind, _, _ in graph.launches] for graph in written]
    kernels = [kernel for graph in written for kernel in graph.kernels]
    return found | {
        "kernels": len(kernels),
        "tried": [each for number in card_numbers for each in lower(kernels, number)],
    }


def lower(kernels: list[tuple[str, str]], card_number: int) -> list[dict]:
    """Kernels, by name and source, compiled for a card."""
    (card,) = (card for card in CARDS if card.number == card_number)
    with tempfile.TemporaryDirectory() as folder:
        tried = [pretended_cuda.lower(*kernel, card, folder) for kernel in kernels]
    return [[dataclasses.asdict(binary) | {"fits": binary.fits} for binary in each] for each in tried]


def make_mistakes() -> dict:
    """What is seen of three mistakes: an update that waits, one of other rows, a kernel with a huge block."""
    found, clip = {}, train.optimizer.clip

    def waiting_clip(model: GPT, most: float) -> torch.Tensor:
        return clip(model, most).cpu().to(DEVICE, non_blocking=True)

    written = pretended_cuda.pretend(H100)
    robopoet.machine.has_triton = lambda: True
    with FakeTensorMode(allow_non_fake_inputs=True), torch._dynamo.config.patch(error_on_recompile=True):
        state = make_state("reference", torch.bfloat16, "--n_layer=1")
        update(state)
        train.optimizer.clip = waiting_clip
        with Watch() as watch:
            update(state)
        found["waits"] = watch.waits
        try:
            update(state, n_tokens=state.cfg.block_size // 2)
        except torch._dynamo.exc.RecompileError as e:
            found["recompiles"] = str(e)
    name, text = next((name, text) for name, text in written[0].kernels if "R0_BLOCK: tl.constexpr" in text)
    for what, block in (("as written", r"\1"), ("huge", "2048")):
        changed = re.sub(r"(?<=R0_BLOCK: tl\.constexpr = )(\d+)", block, text)
        found[what] = [binary["fits"] for binary in lower([(name, changed)], 86)[0]]
    return found


def peaks_gb(rows: list[int]) -> list[float]:
    """The most that all tensors of a run of config/gpt2.yaml take at a time, for each batch_size; GB of 2**30 bytes."""
    pretended_cuda.pretend(H100)
    robopoet.machine.has_triton, found = (lambda: True), []
    for n_rows in rows:
        torch._dynamo.reset()
        with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
            state = make_state("gpt2", torch.bfloat16, f"--batch_size={n_rows}")
            update(state)
            update(state)
        found.append(memory.peak / 2**30)
    return found

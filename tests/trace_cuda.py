"""Run by test_fake_cuda.py in a process of its own: a step and a token on fake CUDA tensors, which refuse to be read.

A tensor on the wrong device, or a wait for the device, raises.
"""

import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from bench.launches import Watch
from model import GPT, GPTConfig
from robopoet.machine import Machine
from robopoet.training.optimizer import Muon
from robopoet.writing.decode import EvenRows

CUDA = torch.device("cuda", 0)
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 2}
KINDS = {"learned": {}, "rotary": {"positions": "rotary"}}
KINDS["llama"] = KINDS["rotary"] | {"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 1}

torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *args, **keys: True
torch.library.impl("aten::_fused_adamw_.tensor_lr", "Meta")(lambda *args, **keys: None)  # torch has none
fused = torch.nn.functional.scaled_dot_product_attention


def attention(q: torch.Tensor, k: torch.Tensor, *args, **keys) -> torch.Tensor:
    """torch's; shared heads are given to it only where a fused kernel takes them."""
    assert q.shape[1] == k.shape[1] or q.dtype is torch.bfloat16
    return fused(q, k, *args, **keys)


torch.nn.functional.scaled_dot_product_attention = attention


def make_model(kind: str, n_layer: int = 2) -> GPT:
    """A model made on the device: fake parameters can't be moved."""
    with CUDA:
        model = GPT(GPTConfig(16, 61, n_layer, 2, 32, 0.1, **KINDS[kind]))
    model.to = lambda device: model
    return model


def trace_step(optimizer: str, kind: str, dtype: torch.dtype, is_recorded: bool, how: str) -> None:
    """One whole optimizer step: forward, backward, clipping, optimizers, scaler."""
    machine = Machine(CUDA, dtype)
    cfg = train.TrainConfig(**SHAPE, optimizer=optimizer, dropout=0.1, compile="false")
    scaler, made = torch.amp.GradScaler, []
    torch.amp.GradScaler = lambda device, enabled: made.append(scaler("cpu", enabled=enabled)) or made[0]
    try:
        state = train.build_state(cfg, machine, make_model(kind))
    finally:
        torch.amp.GradScaler = scaler
    made[0]._device = "cuda"
    if how == "compiled":  # in one piece, by a compiler that only traces
        torch._dynamo.reset()
        state.forward = torch.compile(state.model, backend="aot_eager", fullgraph=True)
    ids = torch.zeros(8, 16, dtype=torch.long, device=CUDA)
    rate = torch.full((), 0.5, device=CUDA) if is_recorded else 0.5
    number = torch.zeros((), dtype=torch.long, device=CUDA)
    with Watch() as watch:
        loss, norm = train.update(state, ids, ids, number, rate)
    assert not watch.waits, watch.waits
    assert loss.device == norm.device == CUDA and all(p.device == CUDA for p in state.model.parameters())


def trace_token(rows: int, kind: str) -> None:
    """A window, then a token, as generate has it on CUDA, where places are tensors."""
    model = make_model(kind).eval()
    with torch.no_grad():
        even = EvenRows(model, rows)
        even.read(torch.zeros(rows, 5, dtype=torch.long, device=CUDA))
        ids = torch.zeros(rows, dtype=torch.long, device=CUDA)
        with Watch() as watch:
            logits = even.step(ids)
    assert logits.shape == (rows, 61) and logits.device == CUDA and not watch.waits, watch.waits


def count_launches(n_layer: int) -> int:
    """The kernels that a step of Muon launches, in bfloat16, at a rate on the device."""
    params = list(make_model("learned", n_layer).transformer.h.parameters())
    muon = Muon([p for p in params if p.dim() == 2], torch.full((), 0.5, device=CUDA), 0.1, torch.bfloat16)
    for p in params:
        p.grad = torch.empty_like(p)
    muon.found_inf = torch.zeros((), device=CUDA)
    muon.step()  # makes its state
    with Watch() as watch:
        muon.step()
    return watch.launches.total()


with FakeTensorMode(allow_non_fake_inputs=True):
    dtypes = torch.float32, torch.bfloat16, torch.float16
    kinds = ("adamw", "learned"), ("muon", "learned"), ("muon", "rotary"), ("muon", "llama")
    for (optimizer, kind), dtype, is_recorded in itertools.product(kinds, dtypes, (False, True)):
        trace_step(optimizer, kind, dtype, is_recorded, "eager")
        print("step", optimizer, kind, dtype, is_recorded)
    for rows, kind in itertools.product((1, 32), KINDS):
        trace_token(rows, kind)
        print("token", rows, kind)
    print("launches", count_launches(2), count_launches(6))
for kind, dtype in (("learned", torch.float32), ("rotary", torch.bfloat16), ("llama", torch.bfloat16)):
    with FakeTensorMode(allow_non_fake_inputs=True):
        trace_step("adamw", kind, dtype, False, "compiled")
    print("compiled", kind, dtype)

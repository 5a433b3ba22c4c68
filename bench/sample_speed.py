"""Time how fast a model generates, through sample.py's stream, beside nanoGPT and transformers.

python -m bench.sample_speed out/demo/best.pt
python -m bench.sample_speed out/demo/best.pt --peer=PATH_TO_NANOGPT
"""

import collections
import dataclasses
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import configurator
from bench.common import evaluate_checkpoint, last_line, origin, progress, show, side_by_side, spread, write_result
from bench.peer import check_is_gpt2, load_model_module, resident_mb
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, ConfigError, DataError, bounds, warn
from robopoet.machine import Machine, find_machine
from robopoet.weights import architectures, checkpoint, header
from robopoet.writing.decode import generate, prepack_matrices
from sample import Poet

GPT2 = GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
UNLIKE_OURS = (
    "the peers have no such model: they, and the greedy passages, use a new GPT-2 of this shape, with learned positions"
)
SAMPLING = {"temperature": 0.8, "top_k": 200}  # nanoGPT's defaults, used by all
Write = Callable[[int, int], tuple[float, float]]  # (passages, tokens) -> seconds in all, and to the first token


@dataclass(frozen=True)
class SampleSpeedConfig:
    """The keys of bench.sample_speed."""

    # what is generated
    checkpoint: str = "out/demo/best.pt"  # the model
    shape: Literal["checkpoint", "gpt2"] = "checkpoint"  # gpt2: random weights of GPT-2's smallest shape instead
    prompt: str = "To be or not to be"  # text to continue
    batch_size: int = 32  # passages of the batch; a single one is timed too
    max_new_tokens: int = 120  # tokens of each, at most the block less the prompt
    long_tokens: int = 1000  # tokens of a single passage longer than the window
    check_tokens: int = 100  # tokens of the greedy passage, which must be the same for all
    # compared with
    peer: str = ""  # a checkout of nanoGPT; transformers takes part if it is installed
    # timing
    starts: int = 3  # timed launches of sample.py, and of `import torch` alone (0: none)
    repeats: int = 5  # rounds, in each of which all take turns; the median counts
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # our weights' dtype; peers keep float32 on CPU
    record: bool = False  # replay each decode step as a CUDA graph
    out: str = ""  # name of the result (sample_speed_SHAPE_DTYPE_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "batch_size max_new_tokens long_tokens check_tokens repeats", 1) + bounds(self, "starts", 0)


def read_model(cfg: SampleSpeedConfig) -> GPT:
    """The model whose weights all use, on the CPU in float32."""
    if cfg.shape == "gpt2":
        torch.manual_seed(0)
        return GPT(GPT2).eval()
    path = Path(cfg.checkpoint)
    return checkpoint.build_model(checkpoint.load(path), path).eval()


def our_poet(cfg: SampleSpeedConfig, model: GPT, device: str, dtype: str) -> Poet:
    """A poet with these weights that always generates all tokens asked for."""
    poet = Poet(cfg.checkpoint, device, dtype, record=cfg.record)
    poet.excerpts = {}  # the peers read the prompt alone
    if cfg.shape == "gpt2":  # it has more ids than the tokenizer; those come first
        poet.model = GPT(model.config).to(poet.machine.device, poet.machine.dtype).eval()
        poet.model.load_state_dict(model.state_dict())
        prepack_matrices(poet.model)
    specials = list(poet.tokenizer.specials.values())
    specials += range(poet.tokenizer.vocab_size, model.config.vocab_size)
    poet.forbidden = torch.tensor(specials, dtype=torch.long, device=poet.machine.device)
    return poet


def ours(poet: Poet, prompt: str) -> Write:
    """Our way to generate."""

    def write(passages: int, tokens: int) -> tuple[float, float]:
        poet.machine.synchronize()
        start = time.perf_counter()
        settings = {"max_new_tokens": tokens, "until": "tokens", "top_p": 1.0}
        stream = poet.stream(poet.begin(prompt, passages, heals=False, **settings, **SAMPLING))
        next(stream)
        first_s = time.perf_counter() - start  # the ids have reached the host
        collections.deque(stream, maxlen=0)
        return time.perf_counter() - start, first_s

    return write


def architecture_among_peers(config: GPTConfig) -> architectures.Architecture | None:
    """The peers' architecture that a model is: GPT-2 or Llama; None for others."""
    try:
        found = architectures.architecture_of(config)
    except CheckpointError:
        return None
    return found if found in (architectures.GPT2, architectures.LLAMA) else None


def comparable(model: GPT) -> GPT:
    """The model whose weights the peers take: `model`, or a new GPT-2 of its shape if they have no such model."""
    if architecture_among_peers(model.config):
        return model
    torch.manual_seed(0)
    c = model.config
    return GPT(GPTConfig(**{key: getattr(c, key) for key in header.NANOGPT_ARGS}, gelu=c.gelu)).eval()


def nanogpt(folder: Path, model: GPT, machine: Machine) -> torch.nn.Module:
    """nanoGPT's model, with our weights; raises ConfigError if they are a Llama's."""
    check_is_gpt2(model.config)
    module = load_model_module(folder)
    keys = dataclasses.asdict(model.config)
    theirs = module.GPT(module.GPTConfig(**{key: keys[key] for key in header.NANOGPT_ARGS}))
    theirs.load_state_dict(model.state_dict())
    return theirs.to(machine.device, peer_dtype(machine)).eval()


@torch.no_grad()
def transformers_gpt2(model: GPT, machine: Machine) -> torch.nn.Module:
    """transformers' GPT-2, with our weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    c = model.config
    shape = {"vocab_size": c.vocab_size, "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer}
    gelu = {"none": "gelu", "tanh": "gelu_new"}[c.gelu]
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, n_head=c.n_head, activation_function=gelu, bos_token_id=None, eos_token_id=None)
    )
    weights = model.state_dict()
    for name, p in theirs.state_dict().items():
        if name in weights:  # without biases of ours, theirs stay 0
            in_block = ".attn." in name or ".mlp." in name  # Conv1D: transposed
            p.copy_(weights[name].T if in_block and p.ndim == 2 else weights[name])
    return theirs.to(machine.device, peer_dtype(machine)).eval()


@torch.no_grad()
def transformers_llama(model: GPT, machine: Machine) -> torch.nn.Module:
    """transformers' Llama, with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    llama = architectures.LLAMA
    theirs = LlamaForCausalLM(LlamaConfig(**llama.write(model.config, 0.0), bos_token_id=None, eos_token_id=None))
    theirs.load_state_dict(llama.layout.theirs(model), strict=False)  # its output is tied to the embeddings
    return theirs.to(machine.device, peer_dtype(machine)).eval()


def peer_dtype(machine: Machine) -> torch.dtype:
    """A peer's dtype: float32 on CPU, as shipped; on CUDA ours, as their scripts choose there."""
    return machine.dtype if machine.device.type == "cuda" else torch.float32


def theirs(generate: Callable[[torch.Tensor, int], Any], ids: list[int], machine: Machine) -> Write:
    """A peer's way to generate."""

    def write(passages: int, tokens: int) -> tuple[float, float]:
        idx = torch.tensor([ids] * passages, device=machine.device)
        times = []
        for count in (1, tokens):
            machine.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                generate(idx, count)
            machine.synchronize()
            times.append(time.perf_counter() - start)
        return times[1], times[0]

    return write


def likeliest(model: torch.nn.Module, name: str, idx: torch.Tensor, tokens: int) -> list[int]:
    """The greedy continuation of idx, (1, n), by a model in float64, where rounding can't change it."""
    with torch.inference_mode():
        if name == "RoboPoet":
            return [int(ids) for ids in generate(model, idx, tokens, lambda logits: logits.argmax(-1))]
        if name == "nanoGPT":
            return model.generate(idx, tokens, top_k=1)[0, idx.shape[1] :].tolist()
        return model.generate(idx, max_new_tokens=tokens, do_sample=False)[0, idx.shape[1] :].tolist()


def read_gb_per_s(device: torch.device) -> float:
    """How fast the device reads a large tensor, in GB/s (1e9 bytes): the best of ten sums over 256 MiB."""
    big, times = torch.ones(2**26, device=device), []
    for _ in range(10):
        start = time.perf_counter()
        big.sum().item()
        times.append(time.perf_counter() - start)
    return big.nbytes / min(times) / 1e9


def seconds_of(*command: str) -> float:
    """Run a Python command; returns its seconds from start to end."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{command[0]} failed: {last_line(done.stderr)}")
    return time.perf_counter() - start


def main(cfg: SampleSpeedConfig) -> None:
    """Time all in turns, check that they agree, print a table and write the result."""
    machine = find_machine(cfg.device, cfg.dtype, trains=False)
    model = read_model(cfg)
    before_mb = resident_mb("self", "VmRSS")
    poet = our_poet(cfg, model, cfg.device, cfg.dtype)
    ids = poet.tokenizer.encode(cfg.prompt)
    writers = {"RoboPoet": ours(poet, cfg.prompt)}
    writers["RoboPoet"](1, cfg.max_new_tokens)
    on_gpu = machine.device.type == "cuda"
    memory_mb = machine.peak_mem_mb() if on_gpu else resident_mb("self", "VmRSS") - before_mb
    shared = comparable(model)
    models: dict[str, torch.nn.Module] = {"RoboPoet": shared}
    if cfg.peer:
        nano = models["nanoGPT"] = nanogpt(Path(cfg.peer), shared, machine)
        writers["nanoGPT"] = theirs(lambda idx, n: nano.generate(idx, n, **SAMPLING), ids, machine)
    if importlib.util.find_spec("transformers"):
        is_llama = architecture_among_peers(shared.config) is architectures.LLAMA
        hugging = models["transformers"] = (transformers_llama if is_llama else transformers_gpt2)(shared, machine)
        writers["transformers"] = theirs(
            lambda idx, n: hugging.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=True, **SAMPLING),
            ids,
            machine,
        )
    short = min(cfg.max_new_tokens, model.config.block_size - len(ids))
    cases = [Case(1, short), Case(cfg.batch_size, short), Case(1, cfg.long_tokens)]
    result = origin("sample_speed", poet.machine) | {
        "model": cfg.shape if cfg.shape != "checkpoint" else Path(cfg.checkpoint).parent.name,
        "parameters": model.num_params(),
        "block_size": model.config.block_size,
        "read_gb_per_s": read_gb_per_s(machine.device),
        "weights_mb": model.num_params() * poet.machine.dtype.itemsize / 2**20,
        "memory_mb": memory_mb,
        "cases": [compare(case, writers, cfg, machine, model.config) for case in cases],
        "recorded": cfg.record and on_gpu,
    }
    if shared is not model and len(models) > 1:
        result["note"] = UNLIKE_OURS
        print(UNLIKE_OURS)
    if cfg.starts:
        command = "sample.py", cfg.checkpoint, f"--device={cfg.device}", "--max_new_tokens=1"
        result["start_s"] = spread([seconds_of(*command) for _ in range(cfg.starts)])
        result["import_torch_s"] = spread([seconds_of("-c", "import torch") for _ in range(cfg.starts)])
    idx = torch.tensor([ids])
    texts = {name: likeliest(m.double().cpu(), name, idx, min(cfg.check_tokens, short)) for name, m in models.items()}
    result["same_text"] = all(text == texts["RoboPoet"] for text in texts.values())
    for case in result["cases"]:
        bytes_read = result["weights_mb"] * 2**20 + case.pop("cache_bytes")
        case["gb_per_s"] = bytes_read * case["speed"]["RoboPoet"]["median"] / case["passages"] / 1e9
    if cfg.shape == "checkpoint":
        try:
            result["val_loss"] = val_losses(Path(cfg.checkpoint), machine)
        except (CheckpointError, DataError) as e:  # the speeds count without it
            warn(f"val loss is left out: {e}")
    print(table([result]))
    if not result["same_text"]:
        warn("the greedy passages differ")
    write_result(result, cfg.out or f"sample_speed_{result['model']}_{str(poet.machine.dtype)[6:]}_DEVICE")


def val_losses(path: Path, machine: Machine) -> dict[str, float]:
    """The checkpoint's val loss in float32, and in the dtype that it generates with."""
    saved, found = checkpoint.load(path), {}
    for dtype in dict.fromkeys((torch.float32, machine.dtype)):
        model = checkpoint.build_model(saved, path).to(machine.device, dtype)
        plain = dataclasses.replace(machine, dtype=torch.float32)  # no autocast
        found[str(dtype)[6:]] = evaluate_checkpoint(saved, path, model, "val", plain)["loss"]
    return found


class Case(NamedTuple):
    """Passages that are generated together, and the tokens of each."""

    passages: int
    tokens: int


def compare(
    case: Case, writers: dict[str, Write], cfg: SampleSpeedConfig, machine: Machine, config: GPTConfig
) -> dict[str, Any]:
    """Time all in turns: when the machine slows down, all do. Ratios are taken round by round."""
    passages, tokens = case
    beyond = tokens > config.block_size
    names = [name for name in writers if not (beyond and name == "transformers")]
    for name in names:
        writers[name](passages, min(tokens, 10))  # warm-up
    rounds = [
        {name: writers[name](passages, tokens) for name in names}
        for _ in progress(range(cfg.repeats), f"rounds of {passages} x {tokens} tokens")
    ]
    seen = min(tokens / 2, config.block_size * 0.75)
    keys_and_values = 2 * config.n_layer * config.kv_heads * config.head_size * seen
    return {
        "passages": passages,
        "tokens": tokens,
        "speed": {name: spread([passages * tokens / r[name][0] for r in rounds]) for name in names},
        "first_token_ms": {name: spread([1000 * r[name][1] for r in rounds]) for name in names},
        "ratio": {name: spread([r[name][0] / r["RoboPoet"][0] for r in rounds]) for name in names[1:]},
        "cache_bytes": passages * keys_and_values * machine.dtype.itemsize,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results."""
    columns = list(dict.fromkeys(name for r in results for case in r["cases"] for name in case["speed"]))
    blocks = []
    for r in results:
        rows = []
        for case in r["cases"]:
            size = f"{case['passages']} x {case['tokens']:,} tokens"
            speed, first, ratio = (
                [case[key].get(name) for name in columns] for key in ("speed", "first_token_ms", "ratio")
            )
            rows += [
                [f"{size}: tokens/s", *(f"{found['median']:,.0f}" if found else "" for found in speed)],
                ["first token, ms", *(f"{found['median']:,.1f}" if found else "" for found in first)],
                ["ours is faster", *(show(found, ".1f") if found else "" for found in ratio)],
                ["GB/s read, of at most", f"{case['gb_per_s']:.1f} of {r['read_gb_per_s']:.1f}"],
            ]
        name = f"{r['model']}\n{r['machine']['dtype']}" + ("\nrecorded" if r.get("recorded") else "")
        blocks.append((name, rows))
    return side_by_side(columns, blocks)


def remarks(result: dict[str, Any]) -> list[str]:
    """What else a result shows, a line each."""
    start = ""
    if "start_s" in result:
        start = f"sample.py takes {show(result['start_s'], '.1f')} s for one token, from start to end, "
        start += f"`import torch` alone {show(result['import_torch_s'], '.1f')} s; "
    same = "the same for all" if result["same_text"] else "NOT the same for all"
    return [
        f"{result['model']}, {result['machine']['dtype']}: {start}weights of {result['weights_mb']:,.0f} MB take "
        f"{result['memory_mb']:,.0f} MB with cache and everything else; the greedy passage is {same}"
        + (f"; {result['note']}" if "note" in result else "")
        + "".join(f"; val loss {loss:.4f} in {dtype}" for dtype, loss in result.get("val_loss", {}).items())
    ]


if __name__ == "__main__":
    configurator.launch(main, SampleSpeedConfig, positional="checkpoint")

"""What torch.compile writes for a CUDA card, on a machine without one, compiled to the card's machine code.

Fake CUDA tensors go through the project's own functions, and through what Inductor writes for them, whose kernels do
nothing. It needs triton and, loaded before torch in a process of its own, the hooks of tests/fake_cuda.cpp. It changes
private names of torch 2.13 for the rest of the process.
"""

import contextlib
import importlib.util
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from bench.launches import Idle

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Card:
    """A card, by its maker's data. tflops: dense products of bfloat16 summed in float32 (float16 on a T4).

    shared_kb: what a block may have of shared memory.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    memory_gb: int
    gb_per_s: float
    tflops: float
    shared_kb: int

    @property
    def number(self) -> int:
        """The compute capability as Triton has it: 90 for 9.0."""
        return 10 * self.capability[0] + self.capability[1]


T4 = Card("T4", (7, 5), 40, 16, 320, 65, 64)
A100 = Card("A100", (8, 0), 108, 80, 2039, 312, 163)
RTX_3060 = Card("RTX 3060", (8, 6), 28, 8, 240, 25.5, 99)
RTX_2000_ADA = Card("RTX 2000 Ada", (8, 9), 24, 8, 256, 58, 99)
H100 = Card("H100", (9, 0), 132, 80, 3350, 989, 227)
RTX_5060 = Card("RTX 5060", (12, 0), 30, 8, 448, 38, 99)
CARDS = (T4, A100, RTX_3060, RTX_2000_ADA, H100, RTX_5060)


# ---------------------------------------------------------------------------------------------------------------------
# what is written


@dataclass
class Graph:
    """A graph that Inductor compiled: its Python code, and for each kernel that it launches the bytes and the FLOPs."""

    code: str
    launches: list[tuple[str, int, float]] = field(default_factory=list)  # (triton, product, attention), bytes, FLOPs

    @property
    def kernels(self) -> list[tuple[str, str]]:
        """The name and the source of each Triton kernel that it defines."""
        return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", self.code, re.S)


def pretend(card: Card) -> list[Graph]:
    """Make torch believe in `card`; returns the list of graphs, which grows as they are compiled."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch_config
    from torch._inductor import config, graph
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget

    properties = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=card.processors,
        warp_size=32,
        total_memory=card.memory_gb * 2**30,
        max_threads_per_multi_processor=1024 if card.number == 75 else 1536 if card.number in (86, 89, 120) else 2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65_536,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.shared_kb * 1024,
        L2_cache_size=4 * 2**20,
        gcnArchName="",
        is_integrated=False,
    )
    torch.version.cuda = "12.8"
    constants = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": card.capability,
        "get_device_properties": properties,
        "is_bf16_supported": card.capability >= (8, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(["_lazy_init", "synchronize", "set_device", "set_rng_state", "manual_seed"]),
        **dict.fromkeys(["_exchange_device", "_maybe_exchange_device"], 0),
    }
    for name, value in constants.items():
        setattr(torch.cuda, name, _constant(value))
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(_constant(value)))
    for name in ("exchange_device", "maybe_exchange_device"):
        setattr(CudaInterface, name, staticmethod(_constant(0)))
    CudaInterface.Worker.get_device_properties = staticmethod(_constant(properties))
    CudaInterface.Worker.current_device = staticmethod(_constant(0))
    torch._C._cuda_getCurrentRawStream = _constant(0)
    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = _constant(False)
    _triton.has_triton = _constant(True)
    FakeTensorMode.avoid_device_init = True
    torch.nn.utils.clip_grad._has_foreach_support = _constant(True)  # it asks for plain tensors
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_.tensor_lr", "Meta"):
        torch.library.impl("aten::_fused_adamw_.tensor_lr", "Meta")(_constant(None))

    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=_constant(GPUTarget("cuda", card.number, 32)),
            get_current_device=_constant(0),
            get_device_interface=_constant(torch.cuda),
            get_active_torch_device=_constant(DEVICE),
            get_device_capability=_constant(card.capability),
        )
    )
    triton_helpers.set_driver_to_gpu = _constant(None)
    config.force_disable_caches, config.compile_threads, config.use_static_cuda_launcher = True, 1, False
    functorch_config.enable_autograd_cache = False
    joint_graph.lazy_init, config.joint_graph_constant_folding = _constant(None), False  # they would run kernels
    torch.nn.functional.scaled_dot_product_attention = attention
    written: list[Graph] = []

    def compile_to_module(lowered: graph.GraphLowering) -> ModuleType:
        code = lowered.codegen()[0].value
        written.append(Graph(code, launches_of(lowered)))
        names = "async_compile, empty_strided_cuda, reinterpret_tensor, assert_size_stride, assert_alignment"
        code = code.replace("async_compile = AsyncCompile()", f"{names} = pretended")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "written.py"
            path.write_text(code, encoding="utf-8")
            spec = importlib.util.spec_from_file_location("written", path)
            module = importlib.util.module_from_spec(spec)
            module.__path__ = "written.py"
            vars(module).update(
                lowered.constants, pretended=(SimpleNamespace(triton=Idle, wait=_constant(None)), *ON_FAKES)
            )
            spec.loader.exec_module(module)
        return module

    graph.GraphLowering.compile_to_module = compile_to_module
    return written


def _constant(value: Any) -> Callable[..., Any]:
    """A function that returns `value` whatever it is given."""
    return lambda *args, **keys: value


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)


def _reinterpret(x: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    return x.as_strided(size, stride, x.storage_offset() + offset)


# what Inductor's code calls, in place of functions in C++ that take no fake tensors
ON_FAKES = (_empty, _reinterpret, _constant(None), _constant(None))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention by the kernel that a card would choose, which fake tensors can't ask for."""
    aten = torch.ops.aten
    if query.dtype is torch.float32 or attn_mask is not None:
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal
        )[0]
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]


def launches_of(lowered: Any) -> list[tuple[str, int, float]]:
    """What each kernel of a lowered graph reads and writes, and its FLOPs, as Graph.launches has it."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    found = []
    for node in lowered.scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        kind = "triton"
        if isinstance(node, ExternKernelSchedulerNode):
            kind = "attention" if "attention" in str(node.node.op_overload) else "product"
        found.append((kind, node.get_read_write_buffers_sizes(), float(node.estimate_flops() or 0)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# compiled to machine code


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for a card with one of the block sizes that Inductor would try there."""

    name: str
    card: Card
    config: str
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the card has the shared memory and at most 16 registers are spilled, Inductor's own limit."""
        return self.spilled_bytes <= 16 * 4 and self.shared_bytes <= 1024 * self.card.shared_kb


def lower(name: str, source: str, card: Card, folder: str) -> list[Binary]:
    """Compile a Triton kernel that Inductor wrote with each block size that it would try on `card`.

    Raises what Triton or ptxas raises.
    """
    from triton import knobs

    its = f"cc={card.number}, major={card.capability[0]}, regs_per_multiprocessor=65536"
    source, changes = re.subn(r"cc=\d+, major=\d+, regs_per_multiprocessor=\d+", its, source)
    source = re.sub(r"multi_processor_count=\d+", f"multi_processor_count={card.processors}", source)
    assert changes == 1
    path = Path(folder, f"{name}_{card.number}.py")
    path.write_text(source, encoding="utf-8")  # Triton reads a kernel's source from its file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner, found = getattr(module, name), []
    knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True
    for config in tuner.configs:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = tuner._precompile_config(config).kernel
        said = log.getvalue()
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        found.append(Binary(name, card, str(config), registers, spilled, kernel.metadata.shared))
    return found

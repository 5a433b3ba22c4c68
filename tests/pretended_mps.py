"""A pretended MPS device: tensors that say they are on it and compute on the CPU, and refuse what Apple's GPUs lack."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

MPS = torch.device("mps", 0)
FLOATS = {torch.float32, torch.float16, torch.bfloat16}
DTYPES = FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
READS = {torch.ops.aten._local_scalar_dense.default}  # what these return is on the CPU


class Pretended(torch.Tensor):
    """A tensor that says it is on MPS; `inner` is its content, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Pretended":
        keys = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=MPS, **keys)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})  # where autograd has taken the modes away

    def __tensor_flatten__(self):
        return ["inner"], None

    def __reduce_ex__(self, protocol):  # a checkpoint holds what a real one would
        return self.inner.__reduce_ex__(protocol)


@functools.cache
def declared() -> dict[str, dict[str, Any]]:
    """PyTorch's own list of its operations, by name: which of them has a kernel for which device."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return {entry["func"].partition("(")[0]: entry for entry in entries}


@functools.cache
def has_kernel(func: torch._ops.OpOverload) -> bool:
    """Whether an operation has a kernel for MPS, or is made of others."""
    namespace, _, name = func.name().partition("::")
    entry = declared().get(name, {}) if namespace == "aten" else {"dispatch": {}}
    entry = declared()[entry["structured_delegate"]] if "structured_delegate" in entry else entry
    keys = ", ".join(entry.get("dispatch", {"Composite": ""}))
    return "MPS" in keys or "Composite" in keys


@torch.inference_mode(False)
@torch.no_grad()
def compute(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation's results; raises RuntimeError where a Mac lacks the dtype or kernel, or would mix devices."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    here = any(isinstance(t, Pretended) for t in tensors)
    device = kwargs.get("device")
    goes_here = func not in READS and (here if device is None else torch.device(device).type == "mps")
    inner = [t.inner if isinstance(t, Pretended) else t for t in leaves]
    inner_args, inner_kwargs = tree_unflatten(inner, structure)
    result = func(*inner_args, **inner_kwargs | ({} if device is None else {"device": "cpu"}))
    if not (here or goes_here):
        return result
    if not has_kernel(func):
        raise RuntimeError(f"{func}: MPS has no kernel")
    strangers = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if strangers and func not in COPIES:
        raise RuntimeError(f"{func}: a tensor on the CPU beside one on MPS")
    if not goes_here:
        return result
    for t in tree_flatten(result)[0]:
        if isinstance(t, torch.Tensor) and t.dtype not in DTYPES:
            raise RuntimeError(f"{func}: MPS has no {t.dtype}")
    result = tree_map_only(torch.Tensor, Pretended, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


class Dispatch(TorchDispatchMode):
    """Takes what makes a tensor on the pretended device: no tensor that could take it is there yet."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._can_decompose():  # in inference mode what is made of other operations arrives whole
            with self:
                return func.decompose(*args, **kwargs or {})
        return compute(func, args, kwargs or {})


def indexed(value: Any) -> Any:
    """The device with its index, which only the absent backend could tell; any other argument as it is."""
    return MPS if isinstance(value, str | torch.device) and str(value) == "mps" else value


class Calls(TorchFunctionMode):
    """What would ask the absent backend before an operation is dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [indexed(value) for value in args]
        kwargs = {name: indexed(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].inner.tolist()
        if func is torch.Tensor.backward:  # in which blocks may be computed again
            with self:
                return torch.autograd.backward(args[0])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args[1] = torch.tensor(args[1], device="cpu").to(args[0].device)
        if func is torch.Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": args[0].device} | kwargs
        if func is torch.tensor and "device" in kwargs:  # it fills a tensor below the level of dispatch
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator on the CPU, for whichever device it is asked."""

    def __new__(cls, device: torch.device | str = "cpu"):
        return super().__new__(cls, "cpu")


def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """F.scaled_dot_product_attention, whose choice of a kernel knows its backends by name: by single operations."""
    return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]


@contextlib.contextmanager
def modes() -> Iterator[None]:
    """A context in which this thread, too, has the device that pretended_mps() made."""
    with torch.autograd.set_multithreading_enabled(False), Dispatch(), Calls():  # a thread of autograd's has no modes
        yield


@contextlib.contextmanager
def pretended_mps() -> Iterator[None]:
    """A context in which this process has an MPS device."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.backends.mps.is_available", lambda: True))
        stack.enter_context(mock.patch("torch.mps.synchronize", lambda: None))
        stack.enter_context(mock.patch("torch.mps.manual_seed", lambda seed: None))
        stack.enter_context(mock.patch("torch.Generator", Generator))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch("torch.__future__._swap_module_params_on_conversion", True))  # keeps them tied
        stack.enter_context(modes())
        yield

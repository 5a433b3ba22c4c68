"""How many kernels operations on a GPU launch, and where the host waits for it: seen on fake tensors, without a GPU."""

import os
import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAKES_NOTHING = {"prim::device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
MAKES_NOTHING |= {"detach", "alias", "_unsafe_view", "lift_fresh"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "repeat_interleave"}


class Watch(TorchDispatchMode):
    """While entered, counts the kernels that operations on a GPU launch, and notes where the host waits for the GPU.

    launches: by operation; those that Inductor wrote are "triton". waits: "operation at file:line", each time.
    """

    def __enter__(self) -> "Watch":
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self.before = Idle.runs
        super().__enter__()
        return self

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: torch.compile would otherwise step aside."""
        return True

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.launches["triton"] += Idle.runs - self.before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if must_wait(name, args, kwargs or {}):
            self.waits.append(f"{name} at {running_line()}")
        result = func(*args, **kwargs or {})
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves((args, kwargs, result)))
        if on_gpu and not func.is_view and name not in MAKES_NOTHING:
            self.launches[name] += kernels(name, args)
        return result


def must_wait(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes the host wait for the GPU: it reads a value, or copies without leave to go on."""
    given = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    if name in READS:
        return any(x.is_cuda for x in given)
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # by a mask: counts what is true
        return any(x.is_cuda and x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    if name in ("copy_", "_to_copy"):
        target = given[0].device if name == "copy_" else kwargs.get("device") or given[0].device
        goes_on = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        return target.type != given[-1].device.type and not goes_on
    return False


def kernels(name: str, args: tuple) -> int:
    """How many kernels an operation launches: one list of tensors at a time if their strides agree, else each alone."""
    if name.startswith("_foreach"):
        lists = [each for each in args if isinstance(each, list | tuple) and isinstance(each[0], torch.Tensor)]
        agree = all(len({(x.shape, x.stride()) for x in row}) == 1 for row in zip(*lists, strict=True))
        return 1 if agree else len(lists[0])
    return 2 if name == "baddbmm" else 1  # it copies what it adds to


def running_line() -> str:
    """The line of the project's code, not of torch's, that is running."""
    torchs = os.path.dirname(torch.__file__)
    frames = [f for f in traceback.extract_stack()[:-2] if not f.filename.startswith(torchs) and f.name != "<lambda>"]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"


class Idle:
    """A Triton kernel that does nothing when it is run. runs: of all of them."""

    runs = 0

    def __init__(self, name: str, source: str, device_str: str):
        self.name = name

    def run(self, *args: Any, **keys: Any) -> None:
        """Take a kernel's arguments."""
        Idle.runs += 1

"""How much memory tensors take at most, on any device: counted from the operations that make them."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class PeakMemory(TorchDispatchMode):
    """While entered, notes the most bytes that tensors made meanwhile have had at one time, in `peak`."""

    @classmethod
    def is_infra_mode(cls):
        return True  # torch.compile would otherwise step aside

    def __enter__(self):
        self.peak, self.made = 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id_of(t) for t in tensors((args, kwargs))} - self.made.keys()
        result = func(*args, **kwargs or {})
        for t in tensors(result):
            if id_of(t) not in before:
                self.made[id_of(t)] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
        self.made = {key: (storage, size) for key, (storage, size) in self.made.items() if not storage.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

"""A function recorded as a CUDA graph: the host launches a small model's kernels more slowly than the GPU runs them."""

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """The one stream on which CUDA graphs are recorded: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


class Graphed:
    """A function on a CUDA device whose fourth call is recorded as a CUDA graph, and replayed from then on.

    The first three calls create what lasts: optimizer states, compiled kernels. Arguments are copied to the same place
    each time, also before recording: a compiled function recompiles where strides differ, which no recording survives.
    A result is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The function's results for these arguments, whose shapes never change."""
        self.calls += 1
        if self.calls == 1:
            self.arguments = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments]
        for place, argument in zip(self.arguments, arguments, strict=True):
            place.copy_(argument)
        if self.calls <= 3:  # on the stream that recording will use
            capture_stream().wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(capture_stream()):
                results = self.function(*self.arguments)
            torch.cuda.current_stream().wait_stream(capture_stream())
            return results
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=capture_stream()):
                self.results = self.function(*self.arguments)
        self.graph.replay()
        return self.results

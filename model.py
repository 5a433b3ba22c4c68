"""GPT-2's architecture in plain PyTorch: the model, its loss, and how it writes.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameters have nanoGPT's names and shapes.
B: batch, T: tokens, C: n_embd, nh: n_head, hs: head size (C / nh), V: vocab_size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F

Choose = Callable[[torch.Tensor], torch.Tensor]  # picks the next token of each row: logits (B, V) -> ids (B,) int64
BlockWeights = tuple[tuple[torch.Tensor, torch.Tensor | None], ...]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; `gelu` is "none" (exact, as in nanoGPT) or "tanh" (GPT-2's), in F.gelu's words."""

    block_size: int = 128
    vocab_size: int = 6725
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.0
    bias: bool = True
    gelu: str = "none"


class LayerNorm(nn.Module):
    """Layer normalisation whose bias is optional (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        return layer_norm(x, self.weight, self.bias)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The rows of x (..., C) with mean 0 and variance 1, scaled and shifted."""
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


class KVCache:
    """The keys and values of a window for every layer, preallocated by whoever writes.

    keys, values: (n_layer, B, nh, block_size, hs). length: how many places are filled; on CUDA an int64 tensor (1,), so
    that a recorded step can count.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(1, device=device, dtype=torch.long) if device.type == "cuda" else 0

    def fill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep a window's k and v (B, nh, T, hs) from the first place on."""
        self.keys[layer, :, :, : k.shape[2]] = k
        self.values[layer, :, :, : v.shape[2]] = v

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows, (n,) int64, alone."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class OneDNNLinear(torch.autograd.Function):
    """F.linear in float32 through oneDNN, which uses AVX-512 on every CPU; PyTorch's own choice, MKL, does on Intel's.

    x: (..., K). weight: (N, K). bias: (N,) or None. Returns (..., N).
    """

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return OneDNNLinear.product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        x, rows = x.flatten(0, -2), grad.flatten(0, -2)  # (M, K), (M, N)
        if weight.shape[0] < weight.shape[1]:  # the narrow one first is up to twice as fast
            of_weight = OneDNNLinear.product(rows.t(), x.t())
        else:
            of_weight = OneDNNLinear.product(x.t(), rows.t()).t()
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return OneDNNLinear.product(grad, weight.t()), of_weight, of_bias


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, by the fastest products that PyTorch has; compiled, by those that the compiler knows."""
    if weight.is_mkldnn:
        return OneDNNLinear.product(x, weight, bias)
    in_float32 = x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if AVX512 and in_float32 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def add_linear(to: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """to + linear(x), in one call where the weight is packed."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.binary(x, to, weight, bias, "add")
    return to + linear(x, weight, bias)


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """gelu(linear(x)), in one call where the weight is packed."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    return F.gelu(linear(x, weight, bias), approximate=approximate)


class Linear(nn.Linear):
    """nn.Linear, by the functions above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)"""
        return linear(x, self.weight, self.bias)

    def prepack(self) -> None:
        """Lay the weight out as oneDNN's products read it, for good: it no longer trains, nor is in the state dict."""
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 32)  # for 32 rows; good for 1 to 128
        del self.weight
        self.weight = packed


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability p and scale the rest by 1 / (1 - p) (Srivastava et al. 2014, JMLR 15).

    On CPU p is rounded to 1/65,536, so that 64 random bits decide four elements: three times as fast as one by one.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    threshold = round(p * 65_536)
    keep = bits[: x.numel()].view(x.shape).ge_(threshold - 32_768)  # 0 or 1, and no bool: those convert slowly
    return x * keep.to(x.dtype).mul_(65_536 / (65_536 - threshold))


class Dropout(nn.Module):
    """`dropout` in training, nothing in evaluation."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, any shape, to the same shape."""
        return dropout(x, self.p) if self.training else x


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); keys and values are left in the cache, if there is one."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        p = self.dropout if self.training else 0.0
        if cache is not None:
            cache.fill(self.layer, k, v)
        if x.device.type == "cpu" and T <= 256:  # short rows: the flash kernel's backward is slower there
            y = plain_attention(q, k, v, p)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0) -> torch.Tensor:
    """softmax(q k' / sqrt(hs)) v with a causal mask, step by step; q, k, v: (B, nh, T, hs) -> the same; p: dropout."""
    T, hs = q.shape[-2:]
    att = (q * hs**-0.5) @ k.transpose(-2, -1)  # (B, nh, T, T)
    future = att.new_full((T, T), -math.inf).triu(1)
    att = F.softmax(att + future, dim=-1)  # adding costs nothing in backward, as filling would
    return dropout(att, p) @ v


class MLP(nn.Module):
    """Two layers, four times as wide between them, with a GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k' / sqrt(hs) + mask) v for one query a row: q (B, nh, 1, hs), k and v (B, nh, T, hs), mask (1, T)."""
    if len(q) == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # many rows: on CPU twice as fast as fused kernels
    att = (k @ (q * q.shape[-1] ** -0.5).transpose(1, 2)).transpose(1, 2)  # (B x nh, 1, T)
    return (att if mask is None else att + mask).softmax(-1) @ v


class RowwiseCrossEntropy(torch.autograd.Function):
    """F.cross_entropy's mean, for the CPU: loss and gradient of a few rows at a time, while they are in its cache.

    logits: (N, V). targets: (N,) int64, -1 to ignore. Computes in float32 or better, whatever the logits' dtype.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        grad = torch.empty_like(logits)
        weight = (targets >= 0).to(dtype) / (targets >= 0).sum()
        loss = torch.zeros((), dtype=dtype)
        for z, t, w, d in zip(*(tensor.split(64) for tensor in (logits, targets, weight, grad)), strict=True):
            probs = torch.softmax(z, dim=1, dtype=dtype)
            t = t.clamp(min=0)[:, None]
            behind = z.amax(1).to(dtype) - z.gather(1, t)[:, 0].to(dtype)  # the likeliest's probability is never 0
            loss += w @ (behind - probs.amax(1).log())
            probs.scatter_add_(1, t, probs.new_full(t.shape, -1.0))
            torch.mul(probs, w[:, None], out=probs)
            d.copy_(probs)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = ctx.saved_tensors
        return (grad if scale.item() == 1 else grad * scale), None


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Each target's cross-entropy, (N,), 0 where ignored: logits (N, V), targets (N,) int64, -1 to ignore.

    In slices of 64 MB: its float32 copies of all logits would be six times as large as those are in bfloat16.
    """
    dtype, rows = torch.promote_types(logits.dtype, torch.float32), max(2**24 // logits.shape[1], 1)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(z.to(dtype), t, ignore_index=-1, reduction="none") for z, t in parts])


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """The one stream on which CUDA graphs are recorded: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


class Graphed:
    """A function on a CUDA device, its kernels recorded in the fourth call and from there on replayed as a CUDA graph.

    At this model's size the host takes longer to launch a step's kernels than the device to run them. The first three
    calls make what stays: optimizer states, compiled kernels. All read their arguments in the same place, for a
    compiled function compiles anew where strides differ, which no recording survives. A result lasts until the next
    call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The function's results for these arguments, whose shapes never change."""
        self.calls += 1
        if self.calls == 1:
            self.arguments = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments]
        for mine, argument in zip(self.arguments, arguments, strict=True):
            mine.copy_(argument)
        if self.calls <= 3:  # on the stream that recording will be on
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


class GPT(nn.Module):
    """A GPT-2 with tied embeddings (Press and Wolf 2017, arXiv:1608.05859)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                "ln_f": LayerNorm(config),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's: normal with std 0.02, and 0.02 / sqrt(2 n_layer) where a layer adds to the residual stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):  # visited after its children
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits, and the loss where there are targets.

        idx: (B, T) int64 token ids, T <= block_size; they fill a cache anew. targets: (B, T) int64, -1 to ignore.
        Returns (B, T, V) logits and the cross-entropy in nats per token (reduction "mean": scalar; "none": (B, T), 0
        where ignored), or without targets the last token's logits (B, 1, V) and None. Logits beside a loss are
        detached: a compiled backward would be given a gradient of zeros for them, as large as they are.
        """
        T = idx.shape[1]
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[:T])  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length *= 0  # in place where it is a tensor
            cache.length += T
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits, targets = self._all_logits(x), targets.flatten()
        rows = logits.flatten(0, 1)
        if reduction == "none":
            loss = cross_entropies(rows, targets).view(idx.shape)
        elif logits.device.type == "cpu" and not torch.compiler.is_compiling():
            loss = RowwiseCrossEntropy.apply(rows, targets)
        else:
            scores = rows.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(scores, targets, ignore_index=-1)
        return logits.detach(), loss

    def _all_logits(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, V)"""
        V = self.config.vocab_size
        if x.device.type != "cuda" or V % 64 == 0:
            return self.lm_head(x)
        padded = F.pad(self.lm_head.weight, (0, 0, 0, -V % 64))  # other numbers of rows leave the tensor cores
        return F.linear(x, padded)[..., :V]

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size` tokens for good; the positions beyond are gone."""
        self.config = dataclasses.replace(self.config, block_size=block_size)
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].clone(), False)

    # -----------------------------------------------------------------------------------------------------------------
    # size and cost

    def num_params(self) -> int:
        """Parameters in all, position embeddings included, the tied matrix once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of a training step per token (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        c = self.config
        matmul_params = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * matmul_params + 12 * c.n_layer * c.n_embd * c.block_size

    # -----------------------------------------------------------------------------------------------------------------
    # writing

    def window_start(self, n: int) -> int:
        """Where the window of a text of n tokens begins: 0 while it fits, then on in steps of half a block.

        Learned positions tie a cached key to its place, so when this changes the window is read anew.
        """
        T = self.config.block_size
        step = max(T // 2, 1)
        return 0 if n <= T else math.ceil((n - T) / step) * step

    def decode(self, ids: torch.Tensor, cache: KVCache, blocks: list[BlockWeights]) -> torch.Tensor:
        """Logits (B, V) after one more token of each row, (B,) int64; its keys and values join the cache.

        What forward does to a window, done to its last token. No module is called on the way: with one row that would
        be a tenth of the time. A row's query meets the keys that are there; on CUDA, where the step is recorded and no
        shape may grow with the text, it meets all places, the empty ones masked. blocks: of block_weights().
        """
        c, t, B = self.config, self.transformer, len(ids)
        at: slice | torch.Tensor = slice(cache.length, cache.length + 1)
        filled, empty = slice(0, cache.length + 1), None
        if isinstance(cache.length, torch.Tensor):
            at, filled = cache.length.clone(), slice(None)
            empty = torch.full((1, c.block_size), -math.inf, device=ids.device, dtype=cache.keys.dtype)
            empty = empty.masked_fill(torch.arange(c.block_size, device=ids.device) <= at, 0)
        x = t.wte.weight[ids] + t.wpe.weight[at]  # (B, C)
        for weights, keys, values in zip(blocks, cache.keys, cache.values, strict=True):
            ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj = weights
            q, k, v = linear(layer_norm(x, *ln_1), *c_attn).view(B, 3, c.n_head, 1, -1).unbind(1)
            keys[:, :, at], values[:, :, at] = k, v
            y = attend(q, keys[:, :, filled], values[:, :, filled], empty)
            x = add_linear(x, y.reshape(B, -1), *attn_c_proj)
            x = add_linear(x, gelu_linear(layer_norm(x, *ln_2), *c_fc, c.gelu), *mlp_c_proj)
        cache.length += 1
        return self.lm_head(t.ln_f(x))

    def block_weights(self) -> list[BlockWeights]:
        """For each block, weight and bias of ln_1, c_attn, attention's c_proj, ln_2, c_fc and the MLP's c_proj."""
        layers = [(b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in self.transformer.h]
        return [tuple((layer.weight, layer.bias) for layer in block) for block in layers]

    def prepack(self) -> None:
        """Make ready to write on a CPU: lay each matrix out as oneDNN's products read it. Training is over then."""
        dtypes = torch.float32, torch.bfloat16
        if AVX512 and self.lm_head.weight.device.type == "cpu" and self.lm_head.weight.dtype in dtypes:
            for module in self.modules():
                if isinstance(module, Linear):
                    module.prepack()

    @torch.inference_mode()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        choose: Choose,
        tags: torch.Tensor | None = None,
        record: bool = False,
    ) -> Generator[torch.Tensor, torch.Tensor | None, None]:
        """Continue `idx`, yielding the next id of each row (B,) int64 as it is chosen; the first step fills a KV cache.

        idx: (B, n) int64, n >= 1. tags: (B,) int64, ids that stand first in every window, as in training. Whoever is
        done with some rows may send() those to go on with, (n,) int64: the others cost nothing any more. record: replay
        a token's step as a CUDA graph. Only the window is kept, so memory does not grow with the text.
        """
        idx = idx[:, self.window_start(idx.shape[1]) :]
        B, n = idx.shape
        idx = F.pad(idx, (0, self.config.block_size - n))
        cache = KVCache(self.config, B, idx.device, self.transformer.wte.weight.dtype)
        decode = self._decoder(cache, record)
        is_cached = False
        for _ in range(max_new_tokens):
            logits = decode(idx[:, n - 1]) if is_cached else self(self._window(idx[:, :n], tags), cache=cache)[0][:, 0]
            ids = choose(logits)
            start = self.window_start(n + 1)  # counted from the window's own start, it moves as in the whole text
            if start:
                idx = idx.roll(-start, 1)
            is_cached, n = not start, n + 1 - start
            idx[:, n - 1] = ids
            rows = yield ids
            if rows is not None:
                idx, tags = idx[rows], None if tags is None else tags[rows]
                cache.keep(rows)
                decode = self._decoder(cache, record)

    def _decoder(self, cache: KVCache, record: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """`decode` with this cache, recorded on CUDA if asked for: its launches take longer than its work."""
        decode = functools.partial(self.decode, cache=cache, blocks=self.block_weights())
        return Graphed(decode) if record and cache.keys.device.type == "cuda" else decode

    @staticmethod
    def _window(window: torch.Tensor, tags: torch.Tensor | None) -> torch.Tensor:
        return window if tags is None else torch.cat([tags[:, None], window[:, 1:]], dim=1)

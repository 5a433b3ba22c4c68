"""Linear, Dropout, attention and cross-entropy: torch's names, arguments and numbers, faster on this hardware.

Where there is nothing to gain, torch's own functions run. Only Dropout draws other random bits than torch's.
bench/LOG.md has the measurements.
"""

import functools
import math
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """A copy of x in float64, on its device; on the CPU if that is Apple's MPS, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64, copy=True)


# ---------------------------------------------------------------------------------------------------------------------
# linear


class OneDNNLinear(torch.autograd.Function):
    """F.linear in float32 via oneDNN: PyTorch picks MKL, which uses only AVX2 on AMD; oneDNN uses AVX-512 there.

    x: (..., K). weight: (N, K). bias: (N,) or None. Returns (..., N).
    """

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return OneDNNLinear.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        x, rows = x.flatten(0, -2), grad.flatten(0, -2)  # (M, K), (M, N)
        if weight.shape[0] < weight.shape[1]:  # the narrower matrix first: up to twice as fast
            weight_grad = OneDNNLinear.product(rows.t(), x.t())
        else:
            weight_grad = OneDNNLinear.product(x.t(), rows.t()).t()
        bias_grad = rows.sum(0) if ctx.needs_input_grad[2] else None
        return OneDNNLinear.product(grad, weight.t()), weight_grad, bias_grad


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear: x (..., K), weight (N, K) and bias (N,) to (..., N)."""
    if weight.is_mkldnn:  # prepacked
        return OneDNNLinear.product(x, weight, bias)
    if bias is None and x.is_cuda and weight.shape[0] % 64 and x.numel() >= 64 * x.shape[-1]:
        padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % 64))  # tensor cores want a multiple of 64 columns
        return F.linear(x, padded)[..., : weight.shape[0]]
    in_float32 = x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if HAS_AVX512 and in_float32 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, computed by linear()."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)"""
        return linear(input, self.weight, self.bias)


def prepack(layer: nn.Linear) -> None:
    """Store the weight in the layout that generates fastest: it can't be trained or saved any more.

    With AVX-512 that is oneDNN's own; without, contiguous columns: MKL's products of a few rows read them faster.
    """
    weight, n_rows = layer.weight.detach(), 32  # rows that oneDNN's layout suits best; good for 1 to 128
    del layer.weight
    if HAS_AVX512:
        layer.weight = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
    else:
        layer.weight = weight.t().contiguous().t()


def add_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y + linear(x), fused if the weight is prepacked."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, bias, "add")
    return y + linear(x, weight, bias)


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """gelu(linear(x)), fused if the weight is prepacked."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    return F.gelu(linear(x, weight, bias), approximate=approximate)


# ---------------------------------------------------------------------------------------------------------------------
# dropout


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p) (Srivastava et al. 2014, JMLR 15).

    On CPU p is rounded to a multiple of 1/65,536, so that 64 random bits decide four elements: three times as fast.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    threshold = round(p * 65_536)
    keep = bits[: x.numel()].view(x.shape).ge_(threshold - 32_768)  # 0 or 1 in int16: bool converts slowly
    return x * keep.to(x.dtype).mul_(65_536 / (65_536 - threshold))


class Dropout(nn.Dropout):
    """nn.Dropout, computed by dropout()."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape."""
        return dropout(input, self.p) if self.training else input


# ---------------------------------------------------------------------------------------------------------------------
# attention

QUERIES = 256  # queries whose probabilities are computed at a time on a CPU
PROBABILITIES = 2**24  # probabilities of a layer that may be kept for the backward pass; more are computed again


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(query key' / sqrt(hs) + attn_mask) value: query (B, nh, T, hs), key and value (B, nkv, S, hs).

    enable_gqa: each of the nkv heads of keys and values serves nh / nkv heads of queries, one after another.
    """
    B, nh, T, _ = query.shape
    grouped = enable_gqa and nh != key.shape[1]
    # on a CPU flash attention has no dropout, and a slower backward, which only its forward in float32 makes up for
    ours = T <= QUERIES or dropout_p or query.dtype is torch.bfloat16
    if ours and is_causal and attn_mask is None and query.device.type == "cpu":
        return causal_attention(query, key, value, dropout_p)
    if T == 1 and not is_causal and not dropout_p:
        if B > 1:  # generating a batch: twice as fast as fused on a CPU
            return single_query_attention(query, key, value, attn_mask)
        if grouped:  # the queries that share keys, as if they were a text's: fused would copy keys
            query = query.reshape(B, key.shape[1], -1, query.shape[3])
            return F.scaled_dot_product_attention(query, key, value, attn_mask).reshape(B, nh, 1, -1)
    if grouped and query.is_cuda and query.dtype is not torch.bfloat16:
        # only flash attention takes shared heads, and not in float32, nor on the GPUs whose dtype is float16
        key, value = (x.repeat_interleave(nh // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=grouped)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    """Causal attention, QUERIES at a time: q (B, nh, T, hs), k and v (B, nkv, T, hs) -> (B, nh, T, hs)."""
    T, q = q.shape[2], q * q.shape[3] ** -0.5
    if T <= QUERIES:
        return last_queries_attention(q, k, v, dropout_p)
    attend = last_queries_attention
    if q[..., 0].numel() * T > PROBABILITIES:
        attend = functools.partial(checkpoint, last_queries_attention, use_reentrant=False)
    stops = [*range(QUERIES, T, QUERIES), T]
    blocks = zip(q.split(QUERIES, dim=2), stops, strict=True)
    return torch.cat([attend(rows, k[:, :, :stop], v[:, :, :stop], dropout_p) for rows, stop in blocks], dim=2)


def last_queries_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Causal attention of the last n queries, scaled: q (B, nh, n, hs), k and v (B, nkv, T, hs) -> (B, nh, n, hs)."""
    (B, nh, n, hs), nkv, T = q.shape, k.shape[1], k.shape[2]
    q = q.reshape(B, nkv, -1, hs)  # (B, nkv, nh / nkv * n, hs): queries that share keys lie in a row
    att = (q @ k.transpose(-2, -1)).view(B, nh, n, T)
    future = att.new_full((n, T), -math.inf).triu(T - n + 1)
    att = F.softmax(att + future, dim=-1)  # adding a mask costs nothing in backward, filling would
    att = dropout(att, dropout_p).view(B, nkv, -1, T)
    return (att @ v).view(B, nh, n, hs)


def single_query_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of one query: q (B, nh, 1, hs), k and v (B, nkv, T, hs), mask (1, T) -> (B, nh, 1, hs)."""
    (B, nh, _, hs), nkv = q.shape, k.shape[1]
    q = (q * hs**-0.5).reshape(B, nkv, -1, hs)
    att = (k @ q.transpose(2, 3)).transpose(2, 3)  # (B, nkv, nh / nkv, T)
    return ((att if mask is None else att + mask).softmax(-1) @ v).view(B, nh, 1, hs)


# ---------------------------------------------------------------------------------------------------------------------
# cross-entropy


class RowwiseCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy on a CPU: loss and gradient of a few rows at a time, while they are in its cache."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        grad = torch.empty_like(logits)
        counted = targets != ignore_index
        weight = counted.to(dtype) / counted.sum()
        loss = torch.zeros((), dtype=dtype)
        rows = min(64, -(-(2**19) // logits.shape[1]))  # 2 MB of float32
        for z, t, w, d in zip(*(tensor.split(rows) for tensor in (logits, targets, weight, grad)), strict=True):
            probs = torch.softmax(z, dim=1, dtype=dtype)
            t = t.clamp(min=0)[:, None]
            gap = z.amax(1).to(dtype) - z.gather(1, t)[:, 0].to(dtype)  # to the likeliest, whose probability is never 0
            loss += w @ (gap - probs.amax(1).log())
            probs.scatter_add_(1, t, probs.new_full(t.shape, -1.0))
            torch.mul(probs, w[:, None], out=probs)
            d.copy_(probs)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,), (scale,) = ctx.saved_tensors, scales
        return (grad if scale.item() == 1 else grad * scale), None, None


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """F.cross_entropy, computed in float32 or better: input (N, V) logits, target (N,) int64 -> scalar, or (N,).

    For a mean, target may be probabilities, (N, V) float32.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target.is_floating_point():
        return F.cross_entropy(input.to(dtype), target)
    if reduction == "none":  # 64 MB of float32 at a time: copies of all logits would take several times their size
        rows = max(2**24 // input.shape[1], 1)
        parts = zip(input.split(rows), target.split(rows), strict=True)
        losses = [F.cross_entropy(z.to(dtype), t, ignore_index=ignore_index, reduction="none") for z, t in parts]
        return torch.cat(losses)
    if input.device.type == "cpu" and reduction == "mean" and not torch.compiler.is_compiling():
        return RowwiseCrossEntropy.apply(input, target, ignore_index)
    return F.cross_entropy(input.to(dtype), target, ignore_index=ignore_index, reduction=reduction)

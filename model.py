"""GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023, arXiv:2302.13971) in plain PyTorch.

The architecture, its initialisation and its loss; parameters have nanoGPT's names and shapes.
B: batch, T: tokens, C: n_embd, nh: n_head, nkv: kv_heads, hs: head_size (C / nh), V: vocab_size.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn

# torch's functions of the same names give the same numbers, slower on a CPU
from robopoet.ops import Dropout, Linear, cross_entropy, linear, scaled_dot_product_attention

Candidates = tuple[torch.Tensor, torch.Tensor]  # sampled softmax: (n,) int64 ids, (n,) float32 added to their logits


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; raises ValueError with a line for each value that can't be.

    gelu: nn.GELU's `approximate`, "none" (exact, as in nanoGPT) or "tanh" (GPT-2's). A Llama has positions "rotary",
    norm "rmsnorm", mlp "swiglu" and no biases; its queries may share heads of keys and values (n_kv_head; None: n_head;
    Ainslie et al. 2023, arXiv:2305.13245). n_inner: width between the MLP's matrices (None: 4 C, or for swiglu, which
    has a third matrix, about 8/3 C). rope_theta: base of the rotary angles.
    """

    block_size: int = 128
    vocab_size: int = 6725
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.0
    bias: bool = True
    gelu: str = "none"
    positions: str = "learned"
    norm: str = "layernorm"
    mlp: str = "gelu"
    n_kv_head: int | None = None
    n_inner: int | None = None
    rope_theta: float = 10_000.0

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        """Width between the MLP's matrices."""
        return self.n_inner or (4 * self.n_embd if self.mlp == "gelu" else math.ceil(self.n_embd / 24) * 64)

    def __post_init__(self) -> None:
        sizes = {key: value for key, value in vars(self).items() if type(value) is int}
        wanted = f"must be at least 1 and at most {2**20:,}"
        found = [f"{key}: found {size}, {wanted}" for key, size in sizes.items() if not 1 <= size <= 2**20]
        heads, twice = (2 * self.n_head, "twice ") if self.positions == "rotary" else (self.n_head, "")
        if heads and self.n_embd % heads:
            found.append(f"n_embd: found {self.n_embd}, must be divisible by {twice}n_head, {heads}")
        if self.positions == "rotary" and self.block_size == 1:  # one place is kept for the first token
            found.append("block_size: found 1, must be at least 2 with rotary positions")
        if self.n_kv_head and self.n_kv_head > 0 and self.n_head % self.n_kv_head:
            found.append(f"n_head: found {self.n_head}, must be divisible by n_kv_head, {self.n_kv_head}")
        kinds = {"gelu": "none tanh", "positions": "learned rotary", "norm": "layernorm rmsnorm", "mlp": "gelu swiglu"}
        for key, choices in kinds.items():
            if (value := getattr(self, key)) not in choices.split():
                found.append(f"{key}: found {value!r}, must be {choices.replace(' ', ' or ')}")
        if not 1 < self.rope_theta <= 1e12:
            found.append(f"rope_theta: found {self.rope_theta}, must be above 1 and at most 1e12")
        if not 0 <= self.dropout <= 1:
            found.append(f"dropout: found {self.dropout}, must be from 0 to 1")
        if found:
            raise ValueError("\n".join(found))


def rotary_table(positions: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """Cosines and sines by which rotary positions rotate queries and keys: (2, T, hs / 2) float32.

    positions: (T,) int64. The angle of pair i is position * rope_theta^(-2 i / hs) (Su et al. 2021, arXiv:2104.09864).
    """
    pairs = torch.arange(0, config.head_size, 2, device=positions.device)
    angles = positions[:, None] * (1 / config.rope_theta ** (pairs / config.head_size))  # rounded as in transformers
    return torch.stack([angles.cos(), angles.sin()])


def rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + hs / 2]) of queries or keys x, (..., T, hs), by the angles of a rotary_table()."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class KVCache(NamedTuple):
    """The keys and values of a window of tokens in every layer; `first`, the first token's keys, are kept apart."""

    keys: torch.Tensor  # (n_layer, B, nkv, block_size, hs)
    values: torch.Tensor  # (n_layer, B, nkv, block_size, hs)
    first: torch.Tensor  # (n_layer, B, nkv, 1, hs)

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        """Room for a window of block_size tokens in each row."""
        shape = (config.n_layer, batch_size, config.kv_heads, config.block_size, config.head_size)
        keys, values = torch.zeros(2, *shape, device=device, dtype=dtype)
        return cls(keys, values, keys[:, :, :, :1].clone())

    def fill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store a window's k and v, (B, nkv, T, hs), from the first position on."""
        self.keys[layer, :, :, : k.shape[2]] = k
        self.values[layer, :, :, : v.shape[2]] = v
        self.first[layer] = k[:, :, :1]

    def rows(self, rows: slice | torch.Tensor) -> "KVCache":
        """The cache of some rows: of a slice in the same memory, else a copy."""
        return KVCache(*(part[:, rows] for part in self))


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm, or RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.sizes = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
        self.c_attn = Linear(config.n_embd, sum(self.sizes), bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.head_size, self.dropout, self.layer = config.head_size, config.dropout, layer

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None, cache: KVCache | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); fills its layer of the cache, if there is one. rotation: from rotary_table()."""
        B, T, C = x.shape
        qkv = self.c_attn(x).split(self.sizes, dim=2)  # (B, T, nh * hs), then (B, T, nkv * hs) twice
        q, k, v = (part.view(B, T, -1, self.head_size).transpose(1, 2) for part in qkv)  # (B, nh or nkv, T, hs)
        if rotation is not None:
            q, k = rotary(q, rotation), rotary(k, rotation)
        if cache is not None:
            cache.fill(self.layer, k, v)
        p = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where x (..., 2 n) holds both side by side: (..., n) (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class MLP(nn.Module):
    """C -> n_inner -> C with a GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) or a SwiGLU in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.act = swiglu if config.mlp == "swiglu" else nn.GELU(approximate=config.gelu)
        self.c_fc = Linear(config.n_embd, config.inner * (2 if self.act is swiglu else 1), bias=config.bias)
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None, cache: KVCache | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 or Llama with tied embeddings (Press and Wolf 2017, arXiv:1608.05859)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        wte, learned = nn.Embedding(config.vocab_size, config.n_embd), config.positions == "learned"
        self.transformer: Any = nn.ModuleDict(  # torch knows no types of its parts
            {
                "wte": wte,
                **({"wpe": nn.Embedding(config.block_size, config.n_embd)} if learned else {}),
                "drop": Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                "ln_f": make_norm(config),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's: normal with std 0.02, and 0.02 / sqrt(2 n_layer) where a layer adds to the residual stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):  # visited after its children
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden_states(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """What the last block makes of each token, normalised: idx (B, T) int64 token ids -> (B, T, C).

        T <= block_size. The tokens fill the cache, if there is one, from its first position on.
        """
        c, T, rotation = self.config, idx.shape[1], None
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.positions == "rotary":
            rotation = rotary_table(torch.arange(T, device=idx.device), c)
        else:
            x = x + self.transformer.wpe.weight[:T]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        return self.transformer.ln_f(x)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = "mean",
        candidates: Candidates | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits, and the loss if there are targets.

        idx: (B, T) int64 token ids, T <= block_size. targets: (B, T) int64, -1 to ignore. Returns logits (B, T, V) and
        the cross-entropy in nats per token (reduction "mean": scalar; "none": (B, T), 0 where ignored); without
        targets, the last token's logits (B, 1, V) and None. Logits beside a loss are detached: a compiled backward
        would otherwise allocate zeros of their size as their gradient. candidates: ids that are compared instead of the
        whole vocabulary; targets are then places among them. For a mean, targets may be probabilities, (B, T, V)
        float32.
        """
        x = self.hidden_states(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if candidates is None:
            logits = self.lm_head(x)
        else:
            ids, shifts = candidates
            logits = linear(x, self.lm_head.weight.index_select(0, ids), bias=shifts.to(x.dtype))
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), ignore_index=-1, reduction=reduction)
        return logits.detach(), loss.view_as(targets) if reduction == "none" else loss

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size` tokens for good; the later position embeddings are dropped."""
        assert block_size <= self.config.block_size
        self.config = dataclasses.replace(self.config, block_size=block_size)
        if self.config.positions == "learned":
            kept = self.transformer.wpe.weight[:block_size].clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    def num_params(self) -> int:
        """All parameters, position embeddings included, the tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, n_logits: int = 0) -> float:
        """FLOPs of a training step per token, with at most `n_logits` logits (0: all).

        PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        c = self.config
        matmul_params = self.num_params() - (c.block_size * c.n_embd if c.positions == "learned" else 0)
        if n_logits:
            matmul_params -= max(c.vocab_size - n_logits, 0) * c.n_embd
        return 6 * matmul_params + 12 * c.n_layer * c.n_embd * c.block_size

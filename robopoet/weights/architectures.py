"""The two architectures of transformers that our model is: GPT-2 with learned positions, Starcoder2 with rotary ones.

Starcoder2, and not GPT-NeoX, which has the same arithmetic: llama.cpp ties its output to the embeddings and takes its
base from config.json, while its GPT-NeoX wants a matrix of its own for the output and a key that transformers 5 no
longer writes. In llama.cpp both compute the tanh GELU; transformers and vLLM compute the GELU that is asked for.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
import torch

import configurator
from model import GPTConfig
from robopoet.weights.header import Share, Size

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # its name -> torch's `approximate`
ROPE = {"rope_type": "default", "type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}

Name = Annotated[str, msgspec.Meta(max_length=100)]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture(ABC):
    """The keys of a config.json that matter to our model; a missing one has transformers' default.

    TITLE, CLASS: its name, and that of transformers' class. POSITIONS: GPTConfig's `positions` for it. KEYS: our names
    -> its names of what gives the shape. GELU, GELU_NAMES: its key, and GPTConfig's `gelu` -> its value. DROPOUTS: its
    keys for `dropout`.
    """

    TITLE: ClassVar[str]
    CLASS: ClassVar[str]
    POSITIONS: ClassVar[str]
    KEYS: ClassVar[dict[str, str]]
    GELU: ClassVar[str]
    GELU_NAMES: ClassVar[dict[str, str]]
    DROPOUTS: ClassVar[tuple[str, ...]]

    @classmethod
    def config_of(cls, config: GPTConfig, dropout: float) -> dict[str, Any]:
        """A model's config.json, up to the special tokens."""
        shape = {theirs: getattr(config, ours) for ours, theirs in cls.KEYS.items()}
        shape[cls.GELU] = cls.GELU_NAMES[config.gelu]
        fixed = {key: values[0] for key, values in cls(**shape).supported().items() if values[0] is not None}
        kind = {"model_type": cls.model_type, **fixed, "architectures": [cls.CLASS]}
        return kind | shape | dict.fromkeys(cls.DROPOUTS, dropout)

    def entries(self) -> dict[str, Any]:
        """`model_args` and `model_extra`, as our checkpoints have them."""
        args = {ours: getattr(self, theirs) for ours, theirs in self.KEYS.items()}
        args |= {"bias": True, "dropout": getattr(self, self.DROPOUTS[0])}
        extra = {"gelu": GELUS[getattr(self, self.GELU)], "positions": self.POSITIONS}
        return {"model_args": args, "model_extra": extra}

    @abstractmethod
    def supported(self) -> dict[str, tuple[Any, ...]]:
        """The values that our model supports, by key; the first is written on export, unless it is None."""

    def problems(self) -> list[str]:
        """Each key whose value our model does not support, with what was found and what must be there."""
        return [
            f"{key}: found {configurator.shorten(repr(value))}, must be {' or '.join(map(repr, values))}"
            for key, values in {**self.supported(), self.GELU: tuple(GELUS)}.items()
            if (value := getattr(self, key)) not in values
        ]

    @classmethod
    @abstractmethod
    def theirs(cls, weights: Weights) -> Weights:
        """The weights of our model with biases, without lm_head.weight, under its names and in its shapes."""

    @classmethod
    @abstractmethod
    def ours(cls, weights: Weights) -> Weights:
        """The reverse of `theirs`; raises ValueError or RuntimeError if weights that become one don't fit."""


@dataclass(frozen=True)
class GPT2(Architecture):
    """The config.json of a GPT-2; its layers are Conv1D, whose weights are transposed."""

    TITLE = "GPT-2"
    CLASS = "GPT2LMHeadModel"
    POSITIONS = "learned"
    KEYS: ClassVar = {"block_size": "n_positions"} | {key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    GELU = "activation_function"
    GELU_NAMES: ClassVar = {"tanh": "gelu_new", "none": "gelu"}
    DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    n_layer: Size
    n_head: Size
    n_embd: Size
    n_positions: Size
    vocab_size: Size
    model_type: Name = "gpt2"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    n_inner: int | None = None
    activation_function: Name = "gelu_new"
    resid_pdrop: Share = 0.1

    def supported(self) -> dict[str, tuple[Any, ...]]:
        return {
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "n_inner": (None, 4 * self.n_embd),
        }

    @classmethod
    def theirs(cls, weights: Weights) -> Weights:
        return {name: w.t() if name.endswith(cls.TRANSPOSED) else w for name, w in weights.items()}

    @classmethod
    def ours(cls, weights: Weights) -> Weights:
        found = {}
        for name, w in weights.items():
            name = "transformer." + name.removeprefix("transformer.")
            if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # causal masks; the embedding
                found[name] = w.t() if name.endswith(cls.TRANSPOSED) and w.dim() == 2 else w
        return found


@dataclass(frozen=True)
class Starcoder2(Architecture):
    """The config.json of a Starcoder2; queries, keys and values have a matrix each."""

    TITLE = "Starcoder2"
    CLASS = "Starcoder2ForCausalLM"
    POSITIONS = "rotary"
    KEYS: ClassVar = {
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
    }
    GELU = "hidden_act"
    GELU_NAMES: ClassVar = {"tanh": "gelu_pytorch_tanh", "none": "gelu"}
    DROPOUTS = ("residual_dropout", "embedding_dropout", "attention_dropout")
    NAMES: ClassVar = {  # ours, after transformer -> its, after model
        ".wte.": ".embed_tokens.",
        ".ln_f.": ".norm.",
        ".h.": ".layers.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        ".attn.c_proj.": ".self_attn.o_proj.",
    }
    C_ATTN, QKV = ".attn.c_attn.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")

    num_hidden_layers: Size
    num_attention_heads: Size
    hidden_size: Size
    max_position_embeddings: Size
    vocab_size: Size
    model_type: Name = "starcoder2"
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    tie_word_embeddings: bool = True
    num_key_value_heads: int = 2
    intermediate_size: int = 12_288
    head_dim: int | None = None
    sliding_window: int | None = None
    rope_theta: float = 10_000.0  # transformers 4's place for the base; 5 reads it too
    rope_scaling: dict[str, Any] | None = None  # transformers 4's
    rope_parameters: dict[str, Any] | None = None  # transformers 5's
    partial_rotary_factor: float | None = None
    hidden_act: Name = "gelu_pytorch_tanh"
    residual_dropout: Share = 0.0

    def supported(self) -> dict[str, tuple[Any, ...]]:
        return {
            "norm_epsilon": (1e-5,),
            "use_bias": (True,),
            "tie_word_embeddings": (True,),
            "rope_theta": (10_000.0,),
            "num_key_value_heads": (self.num_attention_heads,),
            "intermediate_size": (4 * self.hidden_size,),
            "head_dim": (None, self.hidden_size // self.num_attention_heads),
            "sliding_window": (None,),
            "partial_rotary_factor": (None, 1.0),
        }

    def problems(self) -> list[str]:
        found = super().problems()
        for key in ("rope_scaling", "rope_parameters"):
            value = getattr(self, key) or {}
            if not value.items() <= ROPE.items():
                found.append(f"{key}: found {configurator.shorten(repr(value))}, must be within {ROPE}")
        if self.hidden_size % (twice := 2 * self.num_attention_heads):  # pairs are rotated
            found.append(
                f"hidden_size: found {self.hidden_size}, must be divisible by twice num_attention_heads, {twice}"
            )
        if self.max_position_embeddings < 2:
            found.append("max_position_embeddings: found 1, must be at least 2")
        return found

    @classmethod
    def theirs(cls, weights: Weights) -> Weights:
        made = {}
        for name, w in weights.items():
            name = "model" + name.removeprefix("transformer")
            for ours, theirs in cls.NAMES.items():
                name = name.replace(ours, theirs)
            if cls.C_ATTN in name:
                for part, rows in zip(cls.QKV, w.chunk(3), strict=True):
                    made[name.replace(cls.C_ATTN, part)] = rows.clone()
            else:
                made[name] = w
        return made

    @classmethod
    def ours(cls, weights: Weights) -> Weights:
        found, parts = {}, {}
        for name, w in weights.items():
            name = "transformer." + name.removeprefix("model.")
            for ours, theirs in cls.NAMES.items():
                name = name.replace(theirs, ours)
            if part := next((part for part in cls.QKV if part in name), None):
                parts.setdefault(name.replace(part, cls.C_ATTN), {})[part] = w
            elif not name.endswith(("lm_head.weight", ".rotary_emb.inv_freq")):  # the embedding; a constant
                found[name] = w
        for name, three in parts.items():
            if len(three) < 3 or len({(w.shape, w.dtype) for w in three.values()}) > 1:
                kinds = ", ".join(f"{part.split('.')[2]} {tuple(w.shape)} {w.dtype}" for part, w in three.items())
                raise ValueError(f"{name} needs q_proj, k_proj and v_proj of one shape and dtype, found {kinds}")
            found[name] = torch.cat([three[part] for part in cls.QKV])
        return found

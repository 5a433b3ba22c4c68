"""The architectures of transformers that our model is, a table each: GPT-2, with rotary positions Starcoder2, Llama.

Starcoder2, and not GPT-NeoX, which has the same arithmetic: llama.cpp ties its output to the embeddings and takes its
base from config.json, while its GPT-NeoX wants a matrix of its own for the output and a key that transformers 5 no
longer writes. In llama.cpp both compute the tanh GELU; transformers and vLLM compute the GELU that is asked for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from model import GPTConfig
from robopoet.errors import CheckpointError, shorten
from robopoet.weights.layout import C_ATTN, C_FC, Layout

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # its name -> torch's `approximate`
SIZE_KEYS = {
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
WIDTH_KEYS = {"n_kv_head": "num_key_value_heads", "n_inner": "intermediate_size"}
LAYER_NAMES = {
    ".wte.": ".embed_tokens.",
    ".ln_f.": ".norm.",
    ".h.": ".layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
}
PROJECTIONS = ".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."

Name = Annotated[str, msgspec.Meta(max_length=100)]


@dataclass(frozen=True)
class Architecture:
    """A model of transformers: its config.json, and the layout of its weights.

    model_type, class_name: what config.json calls it and its class. kind: what all its models have of ours. sizes: our
    names -> config.json's; widths: likewise, of what may be None. activation: the key of the activation; activations:
    its values -> our `gelu`; of those that mean the same, the first is written. dropouts: keys for our `dropout`, the
    first of which is read; dropout: what that is if missing. supported: a model's shape -> the values that our model
    can have of each other key that matters; the first is written, unless it is None. Where only some keys of a mapping
    matter, it holds them all. missing: the values that transformers takes for a key that is not there, if not the
    first.
    """

    title: str
    model_type: str
    class_name: str
    kind: dict[str, Any]
    sizes: dict[str, str]
    activation: str
    activations: dict[str, str]
    dropouts: tuple[str, ...]
    dropout: float
    supported: Callable[[GPTConfig], dict[str, tuple[Any, ...]]]
    layout: Layout
    widths: dict[str, str] = field(default_factory=dict)
    missing: dict[str, Any] = field(default_factory=dict)

    def write(self, config: GPTConfig, dropout: float) -> dict[str, Any]:
        """A model's config.json, up to the special tokens."""
        fixed = {key: values[0] for key, values in self.supported(config).items() if values[0] is not None}
        sizes = {theirs: getattr(config, ours) for ours, theirs in self.sizes.items()}
        activation = next(name for name, gelu in self.activations.items() if gelu == config.gelu)
        kind = {"model_type": self.model_type, **fixed, "architectures": [self.class_name]}
        return kind | sizes | {self.activation: activation} | dict.fromkeys(self.dropouts, dropout)

    def keys(self) -> type[msgspec.Struct]:
        """The keys of a config.json that matter, with their types."""
        typed: list[tuple[Any, ...]] = [(key, int) for key in self.sizes.values()]
        typed += [(self.activation, Name, next(iter(self.activations))), (self.dropouts[0], float, self.dropout)]
        typed += [(key, int | None, self.missing.get(key)) for key in self.widths.values()]
        others = self.supported(GPTConfig()).keys() - self.widths.values()
        return msgspec.defstruct(self.title, typed + [(key, Any, msgspec.UNSET) for key in others])

    def read(self, found: msgspec.Struct) -> GPTConfig:
        """The shape of the model that a config.json's keys() describe.

        Raises ValueError with a line for each key whose value our model can't have.
        """
        names = self.sizes | self.widths | {"dropout": self.dropouts[0]}
        shape = {ours: getattr(found, theirs) for ours, theirs in names.items()}
        shape["gelu"] = self.activations.get(getattr(found, self.activation), "none")
        try:
            config = GPTConfig(**shape | self.kind, rope_theta=_theta(found))
        except ValueError as e:
            raise ValueError(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(e))) from None
        problems = []
        for key, values in {**self.supported(config), self.activation: tuple(self.activations)}.items():
            if (value := getattr(found, key)) is msgspec.UNSET:
                value = self.missing.get(key, values[0])
            if value not in values and not any(_is_part(value, whole) for whole in values):
                wanted = " or ".join(f"within {one}" if isinstance(one, dict) else repr(one) for one in values)
                problems.append(f"{key}: found {shorten(repr(value))}, must be {wanted}")
        if problems:
            raise ValueError("\n".join(problems))
        return config


def _theta(found: msgspec.Struct) -> float:
    """The base of the rotation: transformers 4 has a key for it, 5 a mapping."""
    theta, rope = getattr(found, "rope_theta", msgspec.UNSET), getattr(found, "rope_parameters", None)
    if theta is msgspec.UNSET:
        theta = rope.get("rope_theta", GPTConfig.rope_theta) if isinstance(rope, dict) else GPTConfig.rope_theta
    if type(theta) not in (int, float):
        raise ValueError(f"rope_theta: found {shorten(repr(theta))}, must be a number")
    return float(theta)


def _rotation(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """What our rotary positions support."""
    plain = {"rope_type": "default", "type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    return {
        "rope_theta": (config.rope_theta,),  # transformers 4's place for the base; 5 reads it too
        "head_dim": (None, config.head_size),
        "rope_scaling": (None, plain),  # transformers 4's
        "rope_parameters": (None, plain),  # transformers 5's
        "partial_rotary_factor": (None, 1.0),
    }


def _is_part(value: Any, whole: Any) -> bool:
    return isinstance(value, dict) and isinstance(whole, dict) and value.items() <= whole.items()


GPT2 = Architecture(
    title="GPT-2",
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    kind={"positions": "learned", "norm": "layernorm", "mlp": "gelu"},
    sizes={"block_size": "n_positions"} | {key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
    activation="activation_function",
    activations=GELUS,
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    dropout=0.1,
    supported=lambda config: {
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * config.n_embd),
    },
    layout=Layout(
        prefix="transformer",
        transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),  # Conv1D
    ),
)

STARCODER2 = Architecture(
    title="Starcoder2",
    model_type="starcoder2",
    class_name="Starcoder2ForCausalLM",
    kind={"positions": "rotary", "norm": "layernorm", "mlp": "gelu"},
    sizes=SIZE_KEYS,
    widths=WIDTH_KEYS,
    activation="hidden_act",
    activations={"gelu_pytorch_tanh": "tanh"} | GELUS,
    dropouts=("residual_dropout", "embedding_dropout", "attention_dropout"),
    dropout=0.0,
    supported=lambda config: {
        "norm_epsilon": (1e-5,),
        "use_bias": (True,),
        "tie_word_embeddings": (True,),
        "num_key_value_heads": (config.kv_heads,),
        "intermediate_size": (config.inner,),
        "sliding_window": (None,),
        **_rotation(config),
    },
    missing={"num_key_value_heads": 2, "intermediate_size": 12_288},
    layout=Layout(prefix="model", names=LAYER_NAMES, apart={C_ATTN: PROJECTIONS}),
)

LLAMA = Architecture(
    title="Llama",
    model_type="llama",
    class_name="LlamaForCausalLM",
    kind={"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "gelu": "none", "bias": False},
    sizes=SIZE_KEYS,
    widths=WIDTH_KEYS,
    activation="hidden_act",
    activations={"silu": "none"},
    dropouts=("attention_dropout",),
    dropout=0.0,
    supported=lambda config: {
        "rms_norm_eps": (1e-5,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "tie_word_embeddings": (True,),
        "num_key_value_heads": (config.kv_heads,),
        "intermediate_size": (config.inner,),
        "rope_interleaved": (None, False),
        **_rotation(config),
    },
    missing={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "intermediate_size": 11_008},
    layout=Layout(
        prefix="model",
        names=LAYER_NAMES | {".mlp.c_proj.": ".mlp.down_proj."},
        apart={C_ATTN: PROJECTIONS, C_FC: (".mlp.gate_proj.", ".mlp.up_proj.")},
        biases=False,
    ),
)

ARCHITECTURES = {kind.model_type: kind for kind in (GPT2, STARCODER2, LLAMA)}


def is_as_wide_as_gpt2(config: GPTConfig) -> bool:
    """Whether queries share no keys, and the MLP is 4 C wide."""
    return config.kv_heads == config.n_head and config.inner == 4 * config.n_embd


def architecture_of(config: GPTConfig) -> Architecture:
    """The architecture that a model of ours is exported as; raises CheckpointError if there is none."""
    for found in ARCHITECTURES.values():
        is_kind = all(getattr(config, key) == value for key, value in found.kind.items())
        if is_kind and (found.widths or is_as_wide_as_gpt2(config)):
            return found
    kind = ", ".join(f"{key} {getattr(config, key)}" for key in (*LLAMA.kind, "n_kv_head"))
    raise CheckpointError(f"export: other programs have GPT-2's kind of model and Llama's, but none with {kind}")

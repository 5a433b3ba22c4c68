"""The architectures of transformers that our model is, a table each: GPT-2 (learned positions), Starcoder2 (rotary).

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
from robopoet.errors import shorten
from robopoet.weights.layout import Layout

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # its name -> torch's `approximate`
ROPE = {"rope_type": "default", "type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}

Name = Annotated[str, msgspec.Meta(max_length=100)]


@dataclass(frozen=True)
class Architecture:
    """A model of transformers: its config.json, and the layout of its weights.

    model_type, class_name: what config.json calls it and its class. positions: ours. sizes: our names -> config.json's.
    gelu: the key of the activation; gelus: our `gelu` -> its value. dropouts: keys for our `dropout`, the first of
    which is read; dropout: what that is if missing. supported: a model's shape -> the values that our model can have of
    each other key that matters; the first is written, unless it is None. Where only some keys of a mapping matter, it
    holds them all. missing: the values that transformers takes for a key that is not there, if not the first.
    """

    title: str
    model_type: str
    class_name: str
    positions: str
    sizes: dict[str, str]
    gelu: str
    gelus: dict[str, str]
    dropouts: tuple[str, ...]
    dropout: float
    supported: Callable[[GPTConfig], dict[str, tuple[Any, ...]]]
    layout: Layout
    missing: dict[str, Any] = field(default_factory=dict)

    def write(self, config: GPTConfig, dropout: float) -> dict[str, Any]:
        """A model's config.json, up to the special tokens."""
        fixed = {key: values[0] for key, values in self.supported(config).items() if values[0] is not None}
        sizes = {theirs: getattr(config, ours) for ours, theirs in self.sizes.items()}
        kind = {"model_type": self.model_type, **fixed, "architectures": [self.class_name]}
        return kind | sizes | {self.gelu: self.gelus[config.gelu]} | dict.fromkeys(self.dropouts, dropout)

    def keys(self) -> type[msgspec.Struct]:
        """The keys of a config.json that matter, with their types."""
        typed = [(key, int) for key in self.sizes.values()]
        typed += [(self.gelu, Name, self.gelus["tanh"]), (self.dropouts[0], float, self.dropout)]
        return msgspec.defstruct(self.title, typed + [(key, Any, msgspec.UNSET) for key in self.supported(GPTConfig())])

    def read(self, found: msgspec.Struct) -> GPTConfig:
        """The shape of the model that a config.json's keys() describe.

        Raises ValueError with a line for each key whose value our model can't have.
        """
        gelu, names = getattr(found, self.gelu), self.sizes | {"dropout": self.dropouts[0]}
        shape = {ours: getattr(found, theirs) for ours, theirs in names.items()}
        try:
            config = GPTConfig(**shape, gelu=GELUS.get(gelu, "none"), positions=self.positions)
        except ValueError as e:
            raise ValueError(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(e))) from None
        problems = []
        for key, values in {**self.supported(config), self.gelu: tuple(GELUS)}.items():
            if (value := getattr(found, key)) is msgspec.UNSET:
                value = self.missing.get(key, values[0])
            if value not in values and not any(_is_part(value, whole) for whole in values):
                wanted = " or ".join(f"within {one}" if isinstance(one, dict) else repr(one) for one in values)
                problems.append(f"{key}: found {shorten(repr(value))}, must be {wanted}")
        if problems:
            raise ValueError("\n".join(problems))
        return config


def _is_part(value: Any, whole: Any) -> bool:
    return isinstance(value, dict) and isinstance(whole, dict) and value.items() <= whole.items()


GPT2 = Architecture(
    title="GPT-2",
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    positions="learned",
    sizes={"block_size": "n_positions"} | {key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
    gelu="activation_function",
    gelus={"tanh": "gelu_new", "none": "gelu"},
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
    positions="rotary",
    sizes={
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
    },
    gelu="hidden_act",
    gelus={"tanh": "gelu_pytorch_tanh", "none": "gelu"},
    dropouts=("residual_dropout", "embedding_dropout", "attention_dropout"),
    dropout=0.0,
    supported=lambda config: {
        "norm_epsilon": (1e-5,),
        "use_bias": (True,),
        "tie_word_embeddings": (True,),
        "rope_theta": (10_000.0,),  # transformers 4's place for the base; 5 reads it too
        "num_key_value_heads": (config.n_head,),
        "intermediate_size": (4 * config.n_embd,),
        "head_dim": (None, config.n_embd // config.n_head),
        "sliding_window": (None,),
        "rope_scaling": (None, ROPE),  # transformers 4's
        "rope_parameters": (None, ROPE),  # transformers 5's
        "partial_rotary_factor": (None, 1.0),
    },
    missing={"num_key_value_heads": 2, "intermediate_size": 12_288},
    layout=Layout(
        prefix="model",
        names={
            ".wte.": ".embed_tokens.",
            ".ln_f.": ".norm.",
            ".h.": ".layers.",
            ".ln_1.": ".input_layernorm.",
            ".ln_2.": ".post_attention_layernorm.",
            ".attn.c_proj.": ".self_attn.o_proj.",
        },
        qkv=(".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
    ),
)

ARCHITECTURES = {kind.model_type: kind for kind in (GPT2, STARCODER2)}


def architecture_of(config: GPTConfig) -> Architecture:
    """The architecture that a model of ours is exported as."""
    return next(kind for kind in ARCHITECTURES.values() if kind.positions == config.positions)

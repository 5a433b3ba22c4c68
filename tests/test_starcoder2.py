"""Rotary models as transformers' Starcoder2, both ways: logits, greedy text, weights bit for bit, what is refused."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import train
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.text.tokenizer import END, CharTokenizer
from robopoet.weights import checkpoint, huggingface
from robopoet.writing.decode import generate
from sample import Poet
from train import TrainConfig

CPU = torch.device("cpu")
CHARS = CharTokenizer("abcdefghijklmnop", [END, "<|alpha|>"])


def random_shape(rng: random.Random) -> dict:
    """Heads of an even size; layers, widths, context, biases and GELU of every kind."""
    n_head = rng.randint(1, 5)
    shape = {"n_layer": rng.randint(1, 4), "n_head": n_head, "n_embd": n_head * rng.choice([2, 4, 6, 10, 16])}
    return shape | {"block_size": rng.randint(2, 50), "bias": rng.random() < 0.5, "gelu": rng.choice(["none", "tanh"])}


def random_model(seed: int, std: float = 0.3, **shape) -> GPT:
    """A model with rotary positions whose weights are all random, biases and LayerNorms too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=CHARS.vocab_size, positions="rotary", **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def export(model: GPT, folder: Path) -> Path:
    huggingface.export(model, CHARS, checkpoint.model_entries(model), "a passage", folder)
    return folder


def load_theirs(folder: Path) -> transformers.Starcoder2ForCausalLM:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    assert type(theirs) is transformers.Starcoder2ForCausalLM
    return theirs


def logits_of(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(idx, idx)[0]


@pytest.mark.parametrize("seed", range(12))
def test_an_export_has_the_same_logits_in_transformers_and_the_same_weights_when_loaded_back(tmp_path, seed):
    shape = random_shape(random.Random(seed))
    model = random_model(seed, **shape)
    back, tok, _ = checkpoint.load_model(export(model, tmp_path / "poet"), CPU, torch.float32)
    explicit = {"bias": True, "n_kv_head": model.config.n_head, "n_inner": 4 * model.config.n_embd}
    assert back.config == dataclasses.replace(model.config, **explicit) and tok.to_json() == CHARS.to_json()
    kept = dict(model.state_dict())
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, kept[name] if name in kept else torch.zeros_like(weight)), name
    idx = torch.randint(CHARS.vocab_size, (3, shape["block_size"]))
    with torch.no_grad():
        theirs = load_theirs(tmp_path / "poet")(idx).logits
    torch.testing.assert_close(theirs, logits_of(model, idx), rtol=0, atol=1e-9)
    torch.testing.assert_close(theirs, logits_of(back, idx), rtol=0, atol=1e-9)


def make_theirs(**changes) -> transformers.Starcoder2ForCausalLM:
    """A random Starcoder2 that our model can be; a CPU's own random state decides its weights."""
    shape = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96}
    shape |= {"vocab_size": CHARS.vocab_size, "num_hidden_layers": 2, "max_position_embeddings": 40}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    theirs = transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**shape | changes)).double().eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return theirs


@pytest.mark.parametrize("seed", range(8))
def test_a_starcoder2_of_transformers_has_the_same_logits_here(tmp_path, seed):
    torch.manual_seed(seed)
    rng, shape = random.Random(100 + seed), random_shape(random.Random(seed))
    theirs = make_theirs(
        hidden_size=shape["n_embd"],
        num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_head"],
        intermediate_size=4 * shape["n_embd"],
        num_hidden_layers=shape["n_layer"],
        max_position_embeddings=shape["block_size"],
        hidden_act=rng.choice(["gelu", "gelu_new", "gelu_pytorch_tanh"]),
        residual_dropout=0.25,
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=rng.choice(["10GB", "20KB"]))
    content = checkpoint.load(tmp_path / "theirs")
    assert content["model_args"]["dropout"] == 0.25
    ours = checkpoint.build_model(content, tmp_path / "theirs").eval()  # in float32
    idx = torch.randint(CHARS.vocab_size, (3, shape["block_size"]))
    with torch.no_grad():
        logits = theirs.float().double()(idx).logits
    torch.testing.assert_close(logits_of(ours, idx), logits, rtol=0, atol=1e-9)


def test_greedy_text_is_that_of_transformers_up_to_the_end_of_the_context(tmp_path):
    distinct = 0
    for seed in range(4):
        model = random_model(seed, 0.6, n_layer=3, n_head=4, n_embd=64, block_size=64).double()
        with torch.no_grad():  # tied embeddings repeat one token; here what was written becomes unlikely
            model.transformer.ln_f.weight.abs_().neg_()
            model.transformer.ln_f.bias.zero_()
            for block in model.transformer.h:
                block.attn.c_proj.weight.mul_(4)
        prompt = torch.randint(CHARS.vocab_size, (1, 5))
        ours = [ids.item() for ids in generate(model, prompt, 59, lambda logits: logits.argmax(-1))]
        theirs = load_theirs(export(model, tmp_path / f"{seed}"))
        theirs.generation_config.suppress_tokens = None  # ours chooses from all ids here
        keys = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 59, "do_sample": False}
        ids = theirs.generate(prompt, **keys, eos_token_id=-1, pad_token_id=0)
        assert ids[0, 5:].tolist() == ours
        distinct += len(set(ours))
    assert distinct > 14


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_starts_from_a_rotary_folder_and_its_best_is_sampled_and_exported(tmp_path, small, shapeless, kind):
    train.main(TrainConfig(**small | {"positions": "rotary", "bias": False}))
    first = Path(small["out_dir"]) / "best.pt"
    source = tmp_path / "poet"
    huggingface.export(*checkpoint.load_model(first, CPU, torch.float32), "O", source)
    out = str(tmp_path / "second")
    start = str(first if kind == "file" else source)
    train.main(TrainConfig(**shapeless | {"init_from": start, "out_dir": out}))
    trained = checkpoint.load(Path(out) / "best.pt")
    assert trained["model_extra"]["positions"] == "rotary"
    assert trained["model_args"]["bias"] == (kind == "folder")  # a Starcoder2 always has biases
    one, other = Poet(str(first), "cpu", "float32"), Poet(str(source), "cpu", "float32")
    keys = {"max_new_tokens": 3 * small["block_size"], "until": "tokens", "temperature": 0}
    assert one.write("The", **keys) == other.write("The", **keys)


# --- what is refused


def test_rotary_positions_need_a_context_of_two_tokens(tmp_path, small, shapeless):
    rotary = small | {"positions": "rotary"}
    assert TrainConfig(**rotary | {"block_size": 2}).problems() == []
    assert TrainConfig(**small | {"block_size": 1}).problems() == []
    found = TrainConfig(**rotary | {"block_size": 1, "n_embd": 6, "n_head": 2}).problems()
    assert found == [
        "n_embd: found 6, must be divisible by twice n_head, 4",
        "block_size: found 1, must be at least 2 with rotary positions",
    ]
    train.main(TrainConfig(**rotary))
    shorter = shapeless | {"init_from": str(Path(small["out_dir"]) / "best.pt"), "out_dir": str(tmp_path / "second")}
    with pytest.raises(CheckpointError, match=r"best\.pt: block_size: found 1, must be at least 2 with rotary"):
        train.main(TrainConfig(**shorter | {"block_size": 1}))
    train.main(TrainConfig(**shorter | {"block_size": 2}))
    assert len(Poet(str(tmp_path / "second" / "best.pt"), "cpu", "float32").write("T", max_new_tokens=9)[0]) > 1


STARCODER2_3B = {
    "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1,
    "attention_softmax_in_fp32": True,
    "bos_token_id": 0,
    "embedding_dropout": 0.1,
    "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 3072,
    "initializer_range": 0.018042,
    "intermediate_size": 12288,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "model_type": "starcoder2",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "num_attention_heads": 24,
    "num_hidden_layers": 30,
    "num_key_value_heads": 2,
    "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "use_bias": True,
    "use_cache": True,
    "vocab_size": 49152,
}
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    model = random_model(0, n_layer=2, n_head=2, n_embd=16, block_size=8)
    return export(model, tmp_path_factory.mktemp("starcoder2") / "poet")


def changed(intact: Path, folder: Path, config: dict | None = None, weights: dict | None = None) -> Path:
    """A copy of the folder with another config.json or other weights."""
    folder.mkdir()
    for path in intact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load_model(folder, CPU, torch.float32)
    line = str(caught.value)
    assert line.startswith(str(folder)) and len(line.splitlines()) == 1 and len(line) < 900


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        (
            STARCODER2_3B,
            "sliding_window: found 4096, must be None",
        ),
        (PYTHIA_70M, "model_type: found 'gpt_neox', must be gpt2 or starcoder2 or llama"),
    ],
    ids=["starcoder2-3b", "pythia-70m"],
)
def test_a_model_of_the_hub_is_refused_by_every_key(intact, tmp_path, config, problems):
    folder = changed(intact, tmp_path / "changed", config)
    refused(folder, f"^{re.escape(f'{folder}/config.json: is another architecture: {problems}')}$")


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "long_factor": [1.5] * 5000}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": "1e6"}, "rope_theta: found '1e6', must be a number"),
        ({"rope_theta": 0.5}, "rope_theta: found 0.5, must be above 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters: found {.*500000.0}, must"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            r"rope_parameters: found .*0\.25}, must be None or within {",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: found {'full_attention'"),
        ({"rope_parameters": YARN}, "rope_parameters: found {'rope_type': 'yarn', 'factor': 4.0.*'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: found {'type': 'linear', 'factor': 2.0}"),
        ({"rope_scaling": LONG}, "rope_scaling: found {'rope_type': 'longrope'"),
        ({"rope_scaling": 2.0}, "rope_scaling: found 2.0, must be None or within {'rope_type': 'default'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, must be None or 1.0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: found False, must be True"),
        ({"use_bias": False}, "use_bias: found False, must be True"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon: found 1e-06, must be 1e-05"),
        ({"sliding_window": 4}, "sliding_window: found 4, must be None"),
        ({"hidden_act": "silu"}, "hidden_act: found 'silu', must be 'gelu_pytorch_tanh' or 'gelu_new' or 'gelu'"),
        ({"num_key_value_heads": 1}, r"needs rows .*16 of q_proj, 8 of k_proj, 8 of v_proj; found k_proj \(16,"),
        ({"num_key_value_heads": 3}, "num_attention_heads: found 2, must be divisible by num_key_value_heads, 3"),
        ({"intermediate_size": 32}, r"mlp\.c_fc\.weight is \(64, 16\), must be \(32, 16\)"),
        ({"head_dim": 16}, "head_dim: found 16, must be None or 8"),
        (
            {"num_attention_heads": 16, "num_key_value_heads": 16},
            "hidden_size: found 16, must be divisible by twice num_attention_heads, 32",
        ),
        ({"max_position_embeddings": 1}, "max_position_embeddings: found 1, must be at least 2"),
        (
            {"max_position_embeddings": 2**21},
            "max_position_embeddings: found 2097152, must be at least 1 and at most 1,048",
        ),
        ({"num_hidden_layers": "2"}, r"\$\.num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0, must be at least 1 and at most 1,048,576"),
        ({"num_attention_heads": 1.5}, r"\$\.num_attention_heads"),
        ({"residual_dropout": 1.5}, "residual_dropout: found 1.5, must be from 0 to 1"),
        ({"num_hidden_layers": 3}, "there are 28 tensors, must be 40"),
        ({"vocab_size": 19}, r"wte\.weight is \(18, 16\), must be \(19, 16\)"),
        ({"model_type": "gpt2"}, "missing required field `n_positions`"),
        ({"model_type": "llama"}, "hidden_act: found 'gelu', must be 'silu'"),
        ({"model_type": "mamba"}, "model_type: found 'mamba', must be gpt2 or starcoder2 or llama"),
    ],
)
def test_a_config_that_our_model_does_not_support_is_refused_by_its_keys(intact, tmp_path, changes, message):
    config = json.loads((intact / "config.json").read_text())
    refused(changed(intact, tmp_path / "changed", config | changes), message)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("num_key_value_heads", "16 of q_proj, 8 of k_proj, 8 of v_proj"),
        ("intermediate_size", r"c_fc\.\w+ is \(64,.*, must be \(12288,"),
        ("num_hidden_layers", "missing required field `num_hidden_layers`"),
    ],
)
def test_a_missing_key_stands_for_transformers_own_default(intact, tmp_path, key, message):
    config = json.loads((intact / "config.json").read_text()) | {"num_attention_heads": 4, "num_key_value_heads": 4}
    del config[key]
    refused(changed(intact, tmp_path / "changed", config), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"type": "default"}, "head_dim": 8, "partial_rotary_factor": 1},
        {"hidden_act": "gelu_new", "sliding_window": None, "use_cache": True},
    ],
)
def test_what_either_transformers_writes_of_a_plain_rotary_model_is_read(intact, tmp_path, changes):
    config = json.loads((intact / "config.json").read_text())
    folder = changed(intact, tmp_path / "changed", config | changes)
    model, _, _ = checkpoint.load_model(folder, CPU, torch.float32)
    assert model.config.positions == "rotary"


def test_weights_that_are_not_those_of_the_config_are_named(intact, tmp_path):
    weights = safetensors.torch.load_file(intact / "model.safetensors")
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    for number, (other, message) in enumerate(
        [
            ({k_proj: torch.zeros(8, 16)}, r"h\.1\.attn\.c_attn\.weight needs .*k_proj \(8, 16\) torch.float32"),
            ({k_proj: torch.zeros(16, 16, dtype=torch.int64)}, r"k_proj \(16, 16\) torch.int64"),
            ({k_proj: None}, r"needs rows .*16 of k_proj.*found .*v_proj \(16, 16\)"),
            ({k_proj.replace("k_", f"{part}_"): torch.zeros(()) for part in "qkv"}, r"found k_proj \(\) "),
            ({"x" * 10**6 + ".self_attn.q_proj.weight": torch.zeros(2)}, "needs rows|xxx"),
            ({"model.norm.bias": None}, "there are 27 tensors, must be 28"),
            ({"model.wpe.weight": torch.zeros(8, 16)}, "positions are rotary, transformer.wpe.weight belongs"),
            ({"model.norm.weight": torch.full((16,), torch.nan)}, r"transformer\.ln_f\.weight is not finite"),
        ]
    ):
        changed_weights = {name: w for name, w in (weights | other).items() if w is not None}
        refused(changed(intact, tmp_path / str(number), weights=changed_weights), message)
    bare = {name.removeprefix("model."): w for name, w in weights.items()}
    bare["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    checkpoint.load_model(changed(intact, tmp_path / "bare", weights=bare), CPU, torch.float32)

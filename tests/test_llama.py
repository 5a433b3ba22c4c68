"""Llamas as transformers' LlamaForCausalLM, both ways: logits, decoding, weights bit for bit, what is refused."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import LLAMA, save_random, within

import configurator
import sample
import train
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.text.tokenizer import END, CharTokenizer
from robopoet.weights import checkpoint, gguf, html, huggingface
from robopoet.writing.decode import Rows, generate
from robopoet.writing.replay import replay
from sample import Poet
from train import TrainConfig

CPU = torch.device("cpu")
CHARS = CharTokenizer("abcdefghijklmnop", [END, "<|alpha|>"])
KIND = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}


def random_shape(rng: random.Random) -> dict:
    """Layers, widths, heads that share keys, contexts and bases of the rotation."""
    n_kv_head = rng.randint(1, 3)
    n_head = n_kv_head * rng.randint(1, 3)
    shape = {
        "n_layer": rng.randint(1, 3),
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": n_head * rng.choice([4, 6, 16]),
    }
    return shape | {
        "n_inner": rng.randint(3, 70),
        "block_size": rng.randint(2, 50),
        "rope_theta": rng.choice([1e4, 1e5, 3e6]),
    }


def random_model(seed: int, std: float = 0.3, **shape) -> GPT:
    """A Llama whose weights are all random, those of its norms too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=CHARS.vocab_size, **KIND | shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def logits_of(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(idx, idx)[0]


class RMSNorm(torch.nn.Module):
    """transformers' LlamaRMSNorm but for its rounding to float32."""

    def __init__(self, weight: torch.nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5


def in_float64(theirs: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """The same model, exact in float64."""
    for name, module in list(theirs.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, own = name.rpartition(".")
            setattr(theirs.get_submodule(parent), own, RMSNorm(module.weight))
    return theirs.double().eval()


def make_theirs(shape: dict, **changes) -> transformers.LlamaForCausalLM:
    """A random Llama of transformers."""
    keys = {
        "hidden_size": shape["n_embd"],
        "intermediate_size": shape["n_inner"],
        "num_hidden_layers": shape["n_layer"],
        "num_attention_heads": shape["n_head"],
        "num_key_value_heads": shape["n_kv_head"],
        "max_position_embeddings": shape["block_size"],
        "rope_theta": shape["rope_theta"],
        "vocab_size": CHARS.vocab_size,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys | changes)).double().eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return theirs


@pytest.mark.parametrize("seed", range(8))
def test_a_llama_has_the_same_logits_in_transformers_whoever_wrote_it(tmp_path, seed):
    torch.manual_seed(seed)
    shape = random_shape(random.Random(seed))
    theirs = make_theirs(shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.build_model(checkpoint.load(tmp_path / "theirs"), tmp_path / "theirs").eval()
    assert {key: getattr(ours.config, key) for key in KIND | shape} == KIND | shape
    idx = torch.randint(CHARS.vocab_size, (3, shape["block_size"]))
    with torch.no_grad():
        logits = in_float64(theirs.float())(idx).logits
    torch.testing.assert_close(logits_of(ours, idx), logits, rtol=0, atol=1e-9)

    huggingface.export(ours.float(), CHARS, checkpoint.model_entries(ours), "a passage", tmp_path / "poet")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "poet")
    assert type(again) is transformers.LlamaForCausalLM
    for name, weight in theirs.float().state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    with torch.no_grad():
        torch.testing.assert_close(in_float64(again)(idx).logits, logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_each_step_of_one_row_of_a_batch_and_of_uneven_rows_is_a_window_read_at_once(seed):
    shape = random_shape(random.Random(50 + seed)) | {"block_size": 12}
    model = random_model(seed, **shape).double()
    idx = torch.randint(CHARS.vocab_size, (3, 12))
    whole = logits_of(model, idx)
    for B in (1, 3):
        found = []

        def choose(logits: torch.Tensor, found: list = found, B: int = B) -> torch.Tensor:
            found.append(logits)
            return idx[:B, 2 + len(found)]

        list(generate(model, idx[:B, :3], 9, choose))
        torch.testing.assert_close(torch.stack(found, 1), whole[:B, 2:-1], rtol=0, atol=1e-9)
    rows = Rows(model, 3)
    added = [rows.add(ids[:n].tolist(), None)[0] for ids, n in zip(idx, (1, 4, 7), strict=True)]
    for i in range(4):
        logits = rows.step()
        for row, ids, n, predicted in zip(added, idx, (1, 4, 7), whole, strict=True):
            torch.testing.assert_close(logits[row.place], predicted[n - 1 + i], rtol=0, atol=1e-9)
            rows.push(row, int(ids[n + i]))


def test_heads_that_share_keys_learn_as_if_each_had_a_copy():
    shape = {"n_layer": 2, "n_head": 6, "n_embd": 48, "n_inner": 32, "block_size": 10}
    shared = random_model(0, n_kv_head=2, **shape).double()
    copied = random_model(1, **shape).double()
    weights = shared.state_dict()
    for name in [name for name in weights if "c_attn" in name]:
        q, k, v = weights[name].split([48, 16, 16])
        k, v = (part.view(2, 8, 48).repeat_interleave(3, 0).reshape(48, 48) for part in (k, v))
        weights[name] = torch.cat([q, k, v])
    copied.load_state_dict(weights)
    idx = torch.randint(CHARS.vocab_size, (3, 11))
    for model in (shared, copied):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    for (name, one), (_, other) in zip(shared.named_parameters(), copied.named_parameters(), strict=True):
        expected = other.grad
        if "c_attn" in name:
            q, k, v = expected.split(48)
            expected = torch.cat([q, *(part.view(2, 3, 8, 48).sum(1).reshape(16, 48) for part in (k, v))])
        torch.testing.assert_close(one.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_llama_is_trained_resumed_sampled_and_fine_tuned(tmp_path, small, shapeless, optimizer):
    keys = small | KIND | {"n_kv_head": 1, "optimizer": optimizer}
    train.main(TrainConfig(**keys))
    best = Path(small["out_dir"]) / "best.pt"
    content = checkpoint.load(best)
    assert content["model_extra"] == {
        "gelu": "none", "positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "n_inner": None,
        "rope_theta": 10_000.0,
    }  # fmt: skip
    model, tok, content = checkpoint.load_model(best, CPU, torch.float32)
    huggingface.export(model, tok, content, "O", tmp_path / "poet")
    for number, start in enumerate((best, tmp_path / "poet")):
        begun = shapeless | {"init_from": str(start), "out_dir": str(tmp_path / f"{number}"), "optimizer": optimizer}
        given = {"optimizer", "learning_rate", "muon_learning_rate", "batch_size"}
        train.main(TrainConfig(**begun, given=frozenset(given)))
    first, second = (checkpoint.load(tmp_path / f"{number}" / "best.pt")["model"] for number in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, other = Poet(str(best), "cpu", "float32"), Poet(str(tmp_path / "poet"), "cpu", "float32")
    sampled = {"max_new_tokens": 3 * small["block_size"], "until": "tokens", "seed": 3}
    assert one.write("The", **sampled) == other.write("The", **sampled)


def test_a_run_from_a_llama_keeps_its_kind_and_refuses_another(small, shapeless, tmp_path):
    keys = small | KIND | {"n_head": 4}
    for n_kv_head, own in ((2, None), (None, 4)):  # 4: auto
        train.main(TrainConfig(**keys | {"n_kv_head": n_kv_head}))
        start = shapeless | {"init_from": f"{small['out_dir']}/best.pt", "out_dir": str(tmp_path / "new")}
        for given in ({}, {"norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": n_kv_head or own}):
            train.main(TrainConfig(**start | given | {"n_head": 4}))
            for config in (
                checkpoint.load(tmp_path / "new/best.pt")["config"],
                yaml.safe_load((tmp_path / "new/config.yaml").read_text()),
            ):
                assert (config["norm"], config["mlp"]) == ("rmsnorm", "swiglu")
                assert config.get("n_kv_head") == n_kv_head
        other = {"norm": "layernorm", "mlp": "gelu", "n_kv_head": 1, "given": frozenset({"norm", "mlp", "n_kv_head"})}
        with pytest.raises(CheckpointError) as raised:
            train.main(TrainConfig(**start | other))
        heads = n_kv_head or "auto"
        assert sorted(str(raised.value).removeprefix(f"{small['out_dir']}/best.pt: ").split("\n  ")) == [
            "mlp: the checkpoint has swiglu, the config gelu; leave it out",
            f"n_kv_head: the checkpoint has {heads}, the config 1; leave it out",
            "norm: the checkpoint has rmsnorm, the config layernorm; leave it out",
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_passages_are_replayed_to_the_byte(tmp_path, capsys, dtype):
    path, file = save_random(tmp_path / "best.pt", **LLAMA), tmp_path / "passages.jsonl"
    for keys in (["--style=bard:0.6,alice:0.4", "--num_samples=3"], ["--prompt=o romeo, romeo, romeo", "--seed=5"]):
        argv = [f"--checkpoint={path}", f"--save={file}", f"--dtype={dtype}", "--device=cpu", "--until=tokens", *keys]
        sample.main(configurator.parse(sample.SampleConfig, [*argv, "--max_new_tokens=50"]))
    replay(file)
    assert "4 passages, all reproduced exactly" in capsys.readouterr().out


def test_an_older_checkpoint_without_a_llamas_keys_is_a_gpt2_and_resumes(small, tmp_path):
    train.main(TrainConfig(**small | {"out_dir": str(tmp_path / "whole")}))
    train.main(TrainConfig(**small | {"max_iters": 3, "lr_decay_iters": 6}))
    path, new = Path(small["out_dir"]) / "ckpt.pt", ("norm", "mlp", "n_kv_head", "n_inner", "rope_theta")
    content = checkpoint.load(path)
    for part in ("model_extra", "config"):
        content[part] = {key: value for key, value in content[part].items() if key not in new}
    checkpoint.save(path, content)
    train.main(TrainConfig(**small | {"init_from": "resume", "lr_decay_iters": 6}))
    whole, resumed = (checkpoint.load(folder / "ckpt.pt")["model"] for folder in (tmp_path / "whole", path.parent))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_mlp_has_as_many_weights_as_gpt2s_unless_n_inner_is_given():
    for width in (48, 256, 576, 768):
        gelu, swiglu = (
            GPT(GPTConfig(n_embd=width, n_head=2, n_layer=1, bias=False, mlp=mlp)) for mlp in ("gelu", "swiglu")
        )
        assert 1 <= swiglu.num_params() / gelu.num_params() < 1.2
    wide = GPTConfig(n_embd=48, n_head=2, mlp="swiglu", n_inner=100)
    assert GPT(wide).transformer.h[0].mlp.c_fc.weight.shape == (200, 48)


@pytest.mark.parametrize("seed", range(4))
def test_llama_cpps_layout_keeps_every_bit_and_rotates_neighbours(seed):
    model = random_model(seed, **random_shape(random.Random(seed)))
    c, layout = model.config, gguf.LAYOUTS["llama"]
    theirs = layout.theirs(model)
    back = layout.ours(theirs, c)
    kept = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    assert back.keys() == kept.keys() and all(torch.equal(back[name], kept[name]) for name in kept)
    q, own = theirs["blk.0.attn_q.weight"], kept["transformer.h.0.attn.c_attn.weight"]
    for head, i in [(0, 0), (c.n_head - 1, c.head_size // 2 - 1)]:
        pair = q[head * c.head_size + 2 * i], q[head * c.head_size + 2 * i + 1]
        rows = own[head * c.head_size + i], own[head * c.head_size + i + c.head_size // 2]
        assert torch.equal(pair[0], rows[0]) and torch.equal(pair[1], rows[1])


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings: found False, must be True"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps: found 1e-06, must be 1e-05"),
        ({"attention_bias": True}, "attention_bias: found True, must be False"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', must be 'silu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: found {'rope_type': 'llama3'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: found 0, must be at least 1"),
        ({"num_key_value_heads": 4}, "num_attention_heads: found 2, must be divisible by num_key_value_heads, 4"),
        ({"head_dim": 16}, "head_dim: found 16, must be None or 8"),
    ],
)
def test_a_config_that_our_model_does_not_support_is_refused_by_its_keys(tmp_path, changes, message):
    model = random_model(0, n_layer=1, n_head=2, n_embd=16, block_size=8)
    huggingface.export(model, CHARS, checkpoint.model_entries(model), "O", tmp_path / "poet")
    config = json.loads((tmp_path / "poet" / "config.json").read_text())
    (tmp_path / "poet" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "poet")


@pytest.mark.parametrize("changes", [{"mlp": "gelu"}, {"positions": "learned"}, {"bias": True}])
def test_what_no_other_program_has_is_not_exported(changes):
    config = GPTConfig(**KIND | changes)
    for module in (huggingface, gguf, html):
        with pytest.raises(CheckpointError, match="export: "):
            module.check(config, CHARS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_kv_head", 0, "n_kv_head: found 0, must be at least 1"),
        ("n_kv_head", -1, "n_kv_head: found -1, must be at least 1"),
        ("n_kv_head", 3, "n_head: found 2, must be divisible by n_kv_head, 3"),
        ("n_kv_head", 2**40, "n_kv_head: found 1099511627776, must be at least 1 and at most 1,048,576"),
        ("n_kv_head", True, "Expected `int | null`, got `bool`"),
        ("n_kv_head", 2, "c_attn.weight is (64, 32), must be (96, 32)"),
        ("n_kv_head", None, "c_attn.weight is (64, 32), must be (96, 32)"),
        ("n_inner", -64, "n_inner: found -64, must be at least 1"),
        ("n_inner", 2**20, "c_fc.weight is (256, 32), must be (2097152, 32)"),
        ("n_inner", 2**40, "n_inner: found 1099511627776, must be at least 1 and at most 1,048,576"),
        ("n_inner", 3.5, "Expected `int | null`, got `float`"),
        ("n_inner", "64", "Expected `int | null`, got `str`"),
        ("n_inner", False, "Expected `int | null`, got `bool`"),
        ("rope_theta", float("nan"), "rope_theta: found nan, must be above 1 and at most 1e12"),
        ("rope_theta", float("inf"), "rope_theta: found inf, must be above 1 and at most 1e12"),
        ("rope_theta", 1e300, "rope_theta: found 1e+300, must be above 1 and at most 1e12"),
        ("rope_theta", -10_000.0, "rope_theta: found -10000.0, must be above 1"),
        ("rope_theta", 10**400, "Number out of range - at `$.model_extra.rope_theta`"),
        ("rope_theta", None, "Expected `float`, got `null`"),
        ("norm", "batchnorm", "norm: found 'batchnorm', must be layernorm or rmsnorm"),
        ("norm", "a\nb", r"norm: found 'a\nb', must be layernorm or rmsnorm"),
        ("norm", ["rmsnorm"], "Expected `str`, got `array`"),
        ("mlp", "gelu", "c_fc.weight is (256, 32), must be (128, 32)"),
        ("mlp", 1, "Expected `str`, got `int`"),
        ("mlp", None, "Expected `str`, got `null`"),
    ],
)
def test_a_resealed_checkpoint_that_claims_another_shape_ends_in_one_line(tmp_path, key, value, message):
    content = checkpoint.load(save_random(tmp_path / "best.pt", **LLAMA, n_layer=1, n_inner=128))
    checkpoint.save(tmp_path / "best.pt", content | {"model_extra": content["model_extra"] | {key: value}})
    with within(5), pytest.raises(CheckpointError) as raised:
        checkpoint.load_model(tmp_path / "best.pt", CPU, torch.float32)
    told = str(raised.value)
    assert message in told and len(told.splitlines()) == 1 and len(told) < 500


def test_a_shape_that_can_not_be_is_refused_in_one_message():
    with pytest.raises(ValueError) as raised:
        GPTConfig(n_kv_head=3, norm="batchnorm", mlp="moe", rope_theta=1.0)
    assert str(raised.value).splitlines() == [
        "n_head: found 8, must be divisible by n_kv_head, 3",
        "norm: found 'batchnorm', must be layernorm or rmsnorm",
        "mlp: found 'moe', must be gelu or swiglu",
        "rope_theta: found 1.0, must be above 1 and at most 1e12",
    ]
    assert dataclasses.replace(GPTConfig(), n_kv_head=None).kv_heads == 8

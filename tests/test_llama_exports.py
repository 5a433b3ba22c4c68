"""Exported Llamas: in llama.cpp, in transformers, read back as written, what they name, and what is refused."""

import re
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
import transformers
from conftest import make_book, make_text, save_random
from llama_cpp import compare_greedy_text, compare_log_probabilities, export, make_model
from llamas import make_llama, save_folder, small_tokenizer, tensors_of
from scripts import run_script

import prepare
import sample
import train
from model import GPTConfig
from prepare import PrepareConfig
from robopoet.errors import CheckpointError
from robopoet.text.tokenizer import CHAT, END, SMOLLM_PATTERN, BPETokenizer, Tokenizer
from robopoet.weights import checkpoint, gguf, html, huggingface
from robopoet.weights.exports import EXPORTS
from sample import SampleConfig
from train import TrainConfig

CPU = torch.device("cpu")
KIND = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
SHAPES = [  # shared heads, bases of the rotation, widths that are no multiple of 32
    KIND | {"n_head": 4, "n_kv_head": 2, "n_inner": 50, "rope_theta": 100_000.0},
    KIND | {"n_head": 4, "n_kv_head": 1, "rope_theta": 500.0},
    KIND | {"n_embd": 30, "n_head": 5, "n_layer": 3},
]
LICENCES = ["a: public domain", "the model Small: apache-2.0"]


@pytest.fixture(scope="module")
def tok(bpe) -> BPETokenizer:
    """Text is cut as SmolLM's; its tokens of a chat, and tags."""
    return BPETokenizer(bpe.tokens, [*CHAT, END, "<|a|>", "<|b|>"], SMOLLM_PATTERN)


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_and_log_probabilities_are_ours(tmp_path, tok, shape):
    llama = compare_log_probabilities(tmp_path, make_model(tok, **shape), tok, spread=0.15, atol=0.002)
    text = make_text(30, seed=7)
    ids = [tok.specials["<|a|>"], *tok.encode(text)]
    assert llama.ids(f"<|a|>{text}", parse_special=True) == ids


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_poets_for_each_tag(tmp_path, tok, shape):
    compare_greedy_text(tmp_path, tok, shape)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_tensor_is_as_llama_cpps_converter_has_it(tmp_path, tok, shape, dtype):
    model = make_model(tok, **shape)
    huggingface.export(model, tok, checkpoint.model_entries(model), "a passage", tmp_path / "poet")
    theirs = tensors_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "poet"))
    found = reference.GGUFReader(export(model, tok, tmp_path / "poet.gguf", dtype)).tensors
    assert {tensor.name for tensor in found} == theirs.keys()
    for tensor in found:
        wanted = theirs[tensor.name].astype(dtype if theirs[tensor.name].ndim == 2 else "float32")
        assert tensor.data.dtype == wanted.dtype and np.array_equal(tensor.data, wanted), tensor.name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("shape", "kind"), [*zip(SHAPES, ["tok", "bpe", "tok"], strict=True)])
def test_a_file_that_is_read_is_exported_as_it_was(tmp_path, request, shape, kind, dtype):
    tok = request.getfixturevalue(kind)
    model = make_model(tok, **shape)
    content = checkpoint.model_entries(model) | {"licences": LICENCES}
    paths = [tmp_path / name / "poet.gguf" for name in ("first", "second")]
    for path in paths:
        path.parent.mkdir()
    gguf.export(model, tok, content, "a passage", paths[0], dtype)
    back, back_tok, content = checkpoint.load_model(paths[0], CPU, torch.float32)
    assert back_tok.to_json() == tok.to_json() and content["licences"] == LICENCES
    assert {key: getattr(back.config, key) for key in shape} == shape and back.config.inner == model.config.inner
    if dtype == "float32":
        for name, weight in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], weight), name
    gguf.export(back, back_tok, content, "a passage", paths[1], dtype)
    assert paths[1].read_bytes() == paths[0].read_bytes()


# --- transformers


def test_transformers_has_the_same_ids_and_continues_a_batch(tmp_path, tok):
    """Its AutoTokenizer takes the class that the folder names, not Llama's own, which would cut text otherwise."""
    model = make_model(tok, **SHAPES[0])
    huggingface.export(model, tok, checkpoint.model_entries(model), "a passage", tmp_path / "poet")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "poet")
    for text in (make_text(500, seed=3), "in 1851, 3.14  42\n 7", " 1", "\u0664\u0662 ²½"):
        assert theirs(text)["input_ids"] == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text
    write = transformers.pipeline("text-generation", model=str(tmp_path / "poet"))
    assert type(write.model) is transformers.LlamaForCausalLM and theirs.pad_token == END
    keys = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    prompts = ["The rose", "<|a|>1599", "T"]
    one_by_one = [write(prompt, **keys) for prompt in prompts]
    assert write(prompts, batch_size=3, **keys) == one_by_one
    assert len({written["generated_text"] for (written,) in one_by_one}) == 3


# --- what an export names


def card(folder: Path) -> list[str]:
    """The licences that a model card lists."""
    return [line[2:] for line in (folder / "README.md").read_text().splitlines() if line.startswith("- ")]


def test_the_model_and_each_text_that_a_run_came_from_are_named_once_however_it_went_on(tmp_path, shapeless):
    keys = {"num_samples": 1, "max_new_tokens": 3, "device": "cpu", "dtype": "float32"}
    start, named = save_folder(tmp_path / "Small", make_llama(small_tokenizer()), small_tokenizer()), []
    for i, (book, ending) in enumerate([("alpha", ""), ("beta", ".gguf"), ("alpha", "")]):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        (folder / f"{book}.txt").write_text(make_book(5, 80))
        prepare.main(PrepareConfig(input=(f"{folder}/*.txt",), out=f"{folder}/bins", tokenizer=str(start)))
        run = {"init_from": str(start), "dataset": f"{folder}/bins", "out_dir": f"{folder}/out", "max_iters": 3}
        train.main(TrainConfig(**shapeless | run))
        start = folder / f"poet{ending}"
        sample.main(SampleConfig(checkpoint=f"{folder}/out/best.pt", export=str(start), **keys))
        named.append(card(start) if ending == "" else checkpoint.load(start)["licences"])
    model, alpha, beta = "the model Small: see its model card", "alpha: unknown", "beta: unknown"
    assert named == [[alpha, model], [beta, alpha, model], [alpha, beta, model]]


# --- what is refused


def refused(folder: Path, tok: Tokenizer, ending: str, message: str, **shape) -> None:
    """An export exits with 2 and one line, before anything is generated."""
    path = save_random(folder / "best.pt", tok, **shape)
    keys = f"--checkpoint={path}", "--device=cpu", "--prompt=a", f"--export={folder}/poet{ending}"
    done = run_script("sample.py", *keys)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(f"sample.py: export: {message}\n", done.stderr)
    assert [path.name for path in folder.iterdir()] == ["best.pt"]


@pytest.mark.parametrize(
    ("title", "shape"), [("Llama", SHAPES[0]), ("Starcoder2", {"positions": "rotary", "n_inner": 50})]
)
def test_a_page_refuses_what_it_can_not_compute_and_says_what_can(tmp_path, tok, title, shape):
    instead = "write a GGUF for llama.cpp: --export=poet.gguf"
    refused(tmp_path, tok, ".html", f"a page computes GPT-2's blocks, not this {title}'s; {instead}", **shape)
    for large, message in ((shape, f"this {title}'s; {instead}"), ({}, f"a page can take 30,000,000; {instead}")):
        with pytest.raises(CheckpointError, match=message):
            html.check(GPTConfig(**large | {"n_embd": 4096, "n_head": 8}), tok)


@pytest.mark.parametrize("ending", EXPORTS)
def test_a_mix_that_no_program_has_is_refused(tmp_path, tok, ending):
    message = r"other programs have GPT-2's kind of model and Llama's, but none with .*mlp gelu.*"
    refused(tmp_path, tok, ending, message, **KIND | {"mlp": "gelu"})


def test_a_llama_of_characters_is_sent_from_the_page_to_a_folder(tmp_path, char):
    refused(tmp_path, char, ".html", ".*not this Llama's; write a folder for transformers: --export=poet", **KIND)
    config = GPTConfig(vocab_size=char.vocab_size, **KIND)
    huggingface.check(config, char)

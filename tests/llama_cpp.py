"""llama.cpp's server, models and exports for it, and what both it and ours must make of a model."""

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from conftest import make_text

from model import GPT, GPTConfig
from robopoet.text.tokenizer import BPETokenizer, Tokenizer
from robopoet.weights import checkpoint, gguf
from robopoet.weights.header import ExportDtype
from sample import Poet

LICENCES = ("a: public domain", "b: \x1b[31mMIT\x00\ud800\r")


def make_model(tok: Tokenizer, **shape) -> GPT:
    """A model whose weights are all random, biases and LayerNorms too."""
    torch.manual_seed(0)
    shape = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": tok.vocab_size} | shape
    model = GPT(GPTConfig(**shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def train_model(tok: Tokenizer, tags: list[str], **shape) -> GPT:
    """A model that has learned a text by heart for each tag ("": none): 100 tokens that differ, after "The rose"."""
    model, rng = make_model(tok, **shape), random.Random(4)
    starts = [[*([tok.specials[tag]] if tag else []), *tok.encode("The rose")] for tag in tags]
    rows = [start + rng.sample(range(len(tok.tokens)), 102) for start in starts]
    idx = torch.tensor([row[:104] for row in rows])
    targets = idx[:, 1:].clone()
    for row, start in zip(targets, starts, strict=True):
        row[: len(start) - 1] = -1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(400):
        loss = model(idx[:, :-1], targets)[1]
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model


def export(model: GPT, tok: Tokenizer, path: Path, dtype: ExportDtype = "float32") -> Path:
    content = checkpoint.model_entries(model) | {"licences": list(LICENCES), "best_val_loss": 2.5}
    gguf.export(model, tok, content, "a passage", path, dtype)
    return path


class Llama:
    """llama.cpp's server with a model."""

    def __init__(self, path: Path, **keys):
        params = xllamacpp.CommonParams()
        params.model.path, params.cpuparams.n_threads, params.verbosity, params.n_parallel = str(path), 1, -1, 1
        for key, value in keys.items():
            setattr(params, key, value)
        self.server = xllamacpp.Server(params)

    def ask(self, route: str, **body) -> dict[str, Any]:
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, parse_special: bool = False) -> list[int]:
        return self.ask("/tokenize", content=text, parse_special=parse_special)["tokens"]

    def greedy(self, prompt: str | list[int], n: int) -> dict[str, Any]:
        return self.ask("/completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True)

    def log_probabilities(self, ids: list[int], vocab_size: int) -> torch.Tensor:
        """After each of `ids`: (n, V). Of a token that ends within a character nothing is told, so "a" is forced."""
        rows = torch.full((len(ids), vocab_size), torch.nan, dtype=torch.float64)
        keys = {"n_predict": 1, "n_probs": vocab_size, "logit_bias": [["a", 1000.0]]}
        for i, row in enumerate(rows):
            answer = self.ask("/completion", prompt=ids[: i + 1], **keys)
            for token in answer["completion_probabilities"][0]["top_logprobs"]:
                row[token["id"]] = token["logprob"]
        return rows


def poem(poet: Poet, prompt: str, n: int, style: str = "") -> tuple[list[int], str]:
    """Greedily, from the prompt's own ids, as llama.cpp does."""
    passages = poet.begin(prompt, heals=False, temperature=0, until="tokens", max_new_tokens=n, style=style)
    for _ in poet.stream(passages):
        pass
    return list(passages[0].ids), passages[0].text


def compare_log_probabilities(folder: Path, model: GPT, tok: BPETokenizer, spread: float, atol: float) -> Llama:
    """Export a model and see that llama.cpp's log-probabilities are ours, which differ by more than `spread`."""
    llama = Llama(export(model, tok, folder / "poet.gguf"))
    ids = [tok.specials["<|a|>"], *tok.encode(make_text(30, seed=7))][:60]
    idx = torch.tensor([ids])
    with torch.no_grad():
        ours = model.double()(idx, idx)[0][0].log_softmax(-1)
    assert ours.std() > spread
    torch.testing.assert_close(llama.log_probabilities(ids, tok.vocab_size), ours, rtol=0, atol=atol)
    return llama


def compare_greedy_text(folder: Path, tok: BPETokenizer, shape: dict) -> None:
    """Train and export a model and see that llama.cpp writes the same for each tag, something else for each."""
    model = train_model(tok, ["", "<|a|>", "<|b|>"], **shape)
    path = folder / "best.pt"
    checkpoint.save(path, {**checkpoint.model_entries(model), "tokenizer": tok.to_json()})
    poet = Poet(str(path), "cpu", "float32")
    llamas = [Llama(export(model, tok, folder / f"{dtype}.gguf", dtype)) for dtype in ("float32", "float16")]
    poet.characters = None  # llama.cpp does not know which ids would break a character
    texts = set()
    for style, tag in (("", ""), ("a", "<|a|>"), ("b", "<|b|>")):
        ids, text = poem(poet, "The rose", 100, style)
        for llama in llamas:
            theirs = llama.greedy(f"{tag}The rose", 100)
            assert theirs["tokens"] == ids
            assert theirs["content"].rstrip("\ufffd") == text.rstrip("\ufffd")  # ours has no unfinished character
        assert len(ids) == 100 and len(set(ids)) > 90
        texts.add(text)
    assert len(texts) == 3

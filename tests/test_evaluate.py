"""Evaluation beside naive loops, on one rank and on several."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from splits import write_split
from test_train import CPU

import train
from bench.writing import compare_tags
from model import GPT, GPTConfig
from robopoet.machine import Machine
from robopoet.text import tokenizer
from robopoet.text.dataset import read_meta
from robopoet.text.windows import EvalPlan, open_split
from robopoet.training.evaluate import evaluate, result_line


def test_evaluation_equals_a_naive_loop(small, small_config, books):
    meta = read_meta(books)
    split = open_split(books, "val", meta, 32, CPU.device)
    lengths = tokenizer.token_bytes(tokenizer.from_json(meta.tokenizer))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=meta.vocab_size, n_layer=2, n_head=2, n_embd=32)).double()
    nats, count, size, means = {}, {}, 0, []
    for entry in meta.splits["val"].documents:
        ids = split.tokens[entry.start : entry.stop].long()
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            inputs = window[:-1].clone()
            inputs[0] = meta.styles[entry.style]
            logits = model(inputs[None], targets=window[None, 1:])[0][0]
            found = [-logits[i].log_softmax(-1)[target].item() for i, target in enumerate(window[1:])]
            nats[entry.style] = nats.get(entry.style, 0) + sum(found)
            count[entry.style] = count.get(entry.style, 0) + len(found)
            size += sum(lengths[target] for target in window[1:])
            means.append(np.mean(found))
    plan = EvalPlan(small_config.block_size, small_config.batch_size)
    result = evaluate(model, split, tokenizer.from_json(meta.tokenizer), plan, CPU)
    total = sum(nats.values()) / sum(count.values())
    assert result["loss"] == pytest.approx(total, abs=1e-9)
    assert result["ppl"] == pytest.approx(math.exp(total))
    assert result["bpb"] == pytest.approx(sum(nats.values()) / math.log(2) / size)
    assert result["loss_by_style"] == pytest.approx({style: nats[style] / count[style] for style in nats})
    assert result["loss_se"] == pytest.approx(np.std(means) / math.sqrt(len(means)))
    assert result["tokens"] == sum(count.values()) == sum(e.stop - e.start - 1 for e in meta.splits["val"].documents)


def test_a_style_without_a_token_to_predict_has_no_loss(tmp_path):
    meta = write_split(tmp_path, [("alice", 20), ("king", 1)])
    split = open_split(tmp_path, "train", meta, 8, CPU.device)
    model = GPT(GPTConfig(block_size=8, vocab_size=meta.vocab_size, n_layer=1, n_head=1, n_embd=4))
    result = evaluate(model, split, meta.load_tokenizer(), EvalPlan(8, 2), CPU)
    assert result["loss_by_style"] == {"alice": pytest.approx(result["loss"])}


@pytest.mark.parametrize("n, shown, more", [(1, 1, ""), (8, 8, ""), (9, 8, ", 1 more; "), (40, 8, ", 32 more; ")])
def test_a_line_shows_the_losses_of_eight_styles_and_counts_the_others(n, shown, more):
    result = {"loss": 1.0, "loss_se": 0.1, "ppl": 2.7, "bpb": 1.4, "tokens": 9, "seconds": 0.1}
    line = result_line(result | {"loss_by_style": {f"poem{i}": 2.0 for i in range(n)}})
    assert line.count("poem") == shown and ("more" in line) == bool(more) and more in line


@pytest.mark.parametrize("even", [False, True])
def test_ranks_that_share_an_evaluation_find_what_one_rank_does(small_config, books, monkeypatch, even):
    meta = read_meta(books)
    split = open_split(books, "val", meta, 32, CPU.device)
    tok = meta.load_tokenizer()
    model, plan = train.make_model(small_config, meta.vocab_size).double(), EvalPlan(32, 8, even=even)
    alone = evaluate(model, split, tok, plan, CPU)
    ranks, sums = [dataclasses.replace(CPU, rank=rank, world_size=3) for rank in range(3)], []
    monkeypatch.setattr(Machine, "all_reduce", lambda self, tensor: sums.append(tensor) or tensor)
    for rank in ranks:
        evaluate(model, split, tok, plan, rank)
    monkeypatch.setattr(Machine, "all_reduce", lambda self, tensor: sum(sums))
    for rank in ranks:
        found = evaluate(model, split, tok, plan, rank)
        for key in alone.keys() - {"seconds"}:
            assert found[key] == pytest.approx(alone[key], abs=1e-12), key


def test_the_cost_of_a_wrong_tag_is_that_of_a_naive_loop(small, small_config, books):
    model = train.make_model(small_config, read_meta(books).vocab_size).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    meta = read_meta(books)
    split = open_split(books, "val", meta, 32, CPU.device)
    found = compare_tags(model, split, meta.styles, EvalPlan(small_config.block_size, small_config.batch_size), CPU)
    assert found.keys() == {("alpha", "beta"), ("beta", "alpha")}
    for document, style in enumerate(split.styles):
        wrong = next(tag for name, tag in meta.styles.items() if name != style)
        more = []
        ids = split.tokens[split.starts[document] : split.stops[document]].long()
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            losses = []
            for tag in (meta.styles[style], wrong):
                inputs = torch.cat([torch.tensor([tag]), window[1:-1]])
                logits = model(inputs[None], inputs[None])[0][0]
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
            more.append(losses[1] - losses[0])
        mean, error = found[style, "beta" if style == "alpha" else "alpha"]
        assert mean == pytest.approx(np.mean(more)) and error == pytest.approx(np.std(more) / len(more) ** 0.5)

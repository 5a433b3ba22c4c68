"""serve.py as a process of its own, and the clients that people use: curl, openai, llm, lm-evaluation-harness."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from conftest import KINDS, REPO, TEXT, save_random

import serve
from robopoet.text.tokenizer import BPETokenizer
from robopoet.weights import checkpoint, huggingface
from robopoet.writing.poet import Poet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def model_pt(request, tmp_path_factory, bpe: BPETokenizer):
    path = tmp_path_factory.mktemp("peers") / "best.pt"
    return save_random(path, bpe, seed=2, scale=4, block_size=64, **KINDS[request.param])


class Process:
    """python serve.py."""

    def __init__(self, path, *keys):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "serve.py", str(path), f"--port={port}", "--dtype=float32", "--name=mine"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*command, *keys], cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            assert self.process.poll() is None
            time.sleep(0.1)

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def served(model_pt):
    process = Process(model_pt)
    yield process
    process.end()


def test_the_openai_package(served, model_pt):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["mine", "mine:a", "mine:b"]
    keys = {"model": "mine", "prompt": "The queen", "max_tokens": 30, "seed": 5, "temperature": 0.8}
    whole = client.completions.create(**keys, n=2, logprobs=3)
    expected = Poet(str(model_pt), "cpu", "float32").write(
        "The queen", 2, max_new_tokens=30, seed=5, temperature=0.8, top_p=1.0, until="tokens"
    )
    assert ["The queen" + choice.text for choice in whole.choices] == expected
    for choice in whole.choices:
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in whole.choices)
    stream = client.completions.create(**keys, stream=True, stream_options={"include_usage": True})
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason and last.usage.total_tokens > 0
    letter = whole.choices[0].text[len(whole.choices[0].text) // 2]
    stopped = client.completions.create(**keys, stop=[letter]).choices[0]
    assert stopped.text == whole.choices[0].text.split(letter)[0] and stopped.finish_reason == "stop"
    assert client.completions.create(**keys, extra_body={"top_k": 1}).choices[0].text
    with pytest.raises(openai.BadRequestError, match="temperature: found -1") as e:
        client.completions.create(**keys | {"temperature": -1})
    assert e.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**keys | {"model": "gpt-4"})
    said = {"model": "mine", "messages": [{"role": "user", "content": "The queen"}], "seed": 5, "temperature": 0.8}
    chat = client.chat.completions.create(
        **said, max_completion_tokens=30, logprobs=True, extra_body={"until": "tokens"}
    )
    assert chat.choices[0].message.content == whole.choices[0].text and chat.choices[0].logprobs.content
    parts = list(client.chat.completions.create(**said, max_tokens=30, stream=True, extra_body={"until": "tokens"}))
    assert "".join(part.choices[0].delta.content for part in parts) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="this server does not have it"):
        client.chat.completions.create(**said, response_format={"type": "json_object"})


def test_the_command_of_the_servers_own_header(served):
    command = next(text for text in serve.__doc__.split("\n\n") if "curl" in text).partition("\n")[2]
    command = command.replace("localhost:8000", served.url).replace("demo", "mine")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["usage"]["completion_tokens"] > 0, done.stderr + done.stdout


def test_the_llm_command(served, model_pt, tmp_path):
    pytest.importorskip("llm")
    book = {"model_id": "book", "model_name": "mine", "api_base": f"{served.url}/v1", "completion": True}
    chat = book | {"model_id": "chat", "completion": False}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([book, chat]))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def llm(*args: str) -> str:
        command = [sys.executable, "-m", "llm", *args]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().removesuffix("\n")

    options = "-o seed 5 -o temperature 0.8 -o max_tokens 30".split()
    settings = {"max_new_tokens": 30, "seed": 5, "temperature": 0.8, "top_p": 1.0}
    poet = Poet(str(model_pt), "cpu", "float32")
    for model, until, more in (("book", "tokens", ["--no-stream"]), ("chat", "auto", [])):
        (expected,) = poet.write("The queen", **settings, until=until)
        assert "The queen" + llm("-m", model, *options, *more, "The queen") == expected
    assert llm("-m", "chat", *options, "--continue", "and so")


def test_lm_evaluation_harness_gives_the_log_likelihoods_of_the_export(served, model_pt, tmp_path, monkeypatch):
    lm_eval, manager = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    huggingface.export(*checkpoint.load_model(model_pt, torch.device("cpu"), torch.float32), "x", tmp_path / "hf")
    words = TEXT.split()
    rows = [
        {"context": " ".join(words[i : i + 6]), "endings": [" ".join(words[i + 6 : i + 6 + k]) for k in (1, 2, 3)]}
        for i in range(0, 60, 6)
    ]
    (tmp_path / "task").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task" / "endings.yaml").write_text(f"""
task: endings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path}/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
""")
    tasks = manager.TaskManager(include_path=str(tmp_path / "task"), include_defaults=False)
    found = {}
    for name, arguments in {
        "hf": {"pretrained": str(tmp_path / "hf"), "device": "cpu", "dtype": "float32"},
        "local-completions": {
            "model": "mine",
            "base_url": f"{served.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tmp_path / "hf"),
            "max_length": 64,
            "num_concurrent": 4,
        },
    }.items():
        result = lm_eval.simple_evaluate(name, arguments, ["endings"], task_manager=tasks, log_samples=True)
        samples = sorted(result["samples"]["endings"], key=lambda sample: sample["doc_id"])
        found[name] = [(float(p), str(greedy)) for s in samples for ((p, greedy),) in s["resps"]]
    assert len(found["hf"]) == 30
    for (theirs, their_greedy), (ours, greedy) in zip(*found.values(), strict=True):
        assert abs(theirs - ours) < 1e-3 and greedy == their_greedy


def test_sigterm_finishes_what_runs_up_to_a_limit(model_pt):
    process = Process(model_pt, "--grace_s=30")
    keys = {"model": "mine", "prompt": "a", "max_tokens": 2000, "temperature": 2, "stream": True, "n": 8}
    with httpx.stream("POST", f"{process.url}/v1/completions", json=keys, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.process.wait(60) == 0
    process = Process(model_pt, "--grace_s=0.2", "--max_tokens=1000000")
    with httpx.stream(
        "POST", f"{process.url}/v1/completions", json=keys | {"max_tokens": 10**6, "n": 64}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert "Cancel 1 running task" in process.end()

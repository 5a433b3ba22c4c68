"""The Modelfile: its templates filled by Go's own engine, and every line as Ollama's parser reads it."""

import json
import re
from pathlib import Path

import jinja2
import pytest
import transformers
from conftest import TEXT
from llama_cpp import export, make_model

from robopoet.text.chat import BOOK, BOOK_GO, CHATML, CHATML_GO
from robopoet.text.tokenizer import CHAT, END, BPETokenizer
from robopoet.weights import checkpoint, huggingface
from robopoet.weights.header import SAMPLING
from robopoet.weights.ollama import MOST_TOKENS, commands
from robopoet.writing.passage import Settings

CHATS = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant"],
    ["assistant", "user"],
]


def parse(text: str) -> list[tuple[str, str]]:
    """A Modelfile's commands and their arguments; one in three quotes may have several lines."""
    assert re.sub(r'^(#.*|[A-Z]+ ("""[\s\S]*?"""|[^"\n]*("[^"\n]*")?))\n', "", text, flags=re.M) == ""
    found = re.findall(r'^([A-Z]+) (?:"""([\s\S]*?)"""|(.*))$', text, re.M)
    return [(name, quoted or plain) for name, quoted, plain in found]


@pytest.mark.parametrize("has_chat", [False, True])
def test_a_modelfile_says_what_sample_py_does(tmp_path, bpe, has_chat):
    tok = BPETokenizer.train([TEXT], 343, [END, *CHAT]) if has_chat else bpe
    path = export(make_model(tok, block_size=96), tok, tmp_path / "my poet.gguf")
    text = (tmp_path / "my poet.Modelfile").read_text()
    said = parse(text)
    assert said[:2] == [("FROM", "./my poet.gguf"), ("TEMPLATE", CHATML_GO if has_chat else BOOK_GO)]
    assert (tmp_path / said[0][1]) == path
    parameters = [argument.split(" ", 1) for name, argument in said[2:] if name == "PARAMETER"]
    assert len(parameters) == len(said) - 2
    ours = Settings()
    expected = {"num_ctx": 96, "num_predict": ours.max_new_tokens, "repeat_penalty": ours.repetition_penalty}
    expected |= {"temperature": ours.temperature, "top_k": ours.top_k, "top_p": ours.top_p}
    assert {name: float(value) for name, value in parameters if name != "stop"} == expected
    assert [value for name, value in parameters if name == "stop"] == [f'"{name}"' for name in CHAT if has_chat]
    assert ("<|a|>, <|b|>" in text.splitlines()[0]) == (not has_chat)
    assert ours.max_new_tokens == MOST_TOKENS and ours.min_p == 0  # Ollama's own


def test_transformers_samples_as_sample_py_does_and_writes_no_tag(tmp_path, bpe):
    model = make_model(bpe)
    huggingface.export(model, bpe, checkpoint.model_entries(model), "", tmp_path / "poet")
    found, ours = transformers.GenerationConfig.from_pretrained(tmp_path / "poet"), Settings()
    assert {key: getattr(found, key) for key in SAMPLING} == SAMPLING and found.do_sample
    assert {key: getattr(ours, key) for key in SAMPLING} == SAMPLING
    tags = [id for name, id in bpe.specials.items() if name != END]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "poet")
    theirs.lm_head.weight.data[tags] += 100 * theirs.lm_head.weight.data[tags].sign()
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "poet")
    written = theirs.generate(**tok("<|a|>The rose", return_tensors="pt"), max_new_tokens=40)[0].tolist()
    assert written[0] == bpe.specials["<|a|>"] and not {*tags} & {*written[1:]}
    assert tok.decode(written, skip_special_tokens=True).startswith("The rose")


@pytest.mark.parametrize(
    ("file", "name"),
    [("poet", "poet"), ("My Poet", "my-poet"), ("a.b", "a-b"), ("Война", "poet"), ("x" * 99, "x" * 80), ("_1-", "_1")],
)
def test_ollama_takes_the_name(file, name):
    create, run = commands(Path("out") / f"{file}.Modelfile").splitlines()
    quoted = f"'out/{file}.Modelfile'" if file in ("My Poet", "Война") else f"out/{file}.Modelfile"
    assert (create, run) == (f"ollama create {name} -f {quoted}", f"ollama run {name}")


@pytest.mark.slow
@pytest.mark.parametrize("roles", CHATS, ids=str)
@pytest.mark.parametrize(("go", "jinja"), [(BOOK_GO, BOOK), (CHATML_GO, CHATML)], ids=["book", "chatml"])
def test_gos_templates_make_of_a_chat_what_jinjas_do(tmp_path, go, jinja, roles):
    go_template = pytest.importorskip("go_template")
    messages = [{"role": role, "content": f" what {i} \"said\"\n'it' <b>{{{{ no }}}}"} for i, role in enumerate(roles)]
    turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    (tmp_path / "values.yml").write_text(json.dumps({"Messages": turns}))
    (tmp_path / "poet.tmpl").write_text(go)
    go_template.render_template(*(str(tmp_path / name) for name in ("poet.tmpl", "values.yml", "made")))
    expected = jinja2.Template(jinja, keep_trailing_newline=True).render(messages=messages, add_generation_prompt=True)
    assert (tmp_path / "made").read_text() == expected

"""The HTML file of --export: in V8 beside Poet and torch, and what its text can't do."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPECIALS, TEXT, make_book
from py_mini_racer import MiniRacer
from test_huggingface import make_checkpoint

import sample
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, ConfigError
from robopoet.text.tokenizer import END, PATTERNS, BPETokenizer, CharTokenizer, StreamDecoder
from robopoet.weights import checkpoint, html
from robopoet.writing import sampler
from robopoet.writing.decode import generate
from robopoet.writing.passage import Passage, Settings
from sample import Poet, SampleConfig

SCRIPT = "<script>alert(1)</script>"
ENGINE = Path(html.__file__).parent / "poet.js"
# what the page's Worker does, and a function that also tells the ids
RUN = """
const weights = {};
for (const [name, base64] of Object.entries(lines)) weights[name] = decodeWeights(base64, about.dtype);
const poet = new Poet(about, weights);
function write(prompt, settings) {
  const ids = [], next = Sampler.prototype.next;
  let text = "";
  Sampler.prototype.next = function (logits) { ids.push(next.call(this, logits)); return ids.at(-1); };
  for (const parts of poet.write(prompt, settings)) for (const [piece] of parts ?? []) text += piece;
  Sampler.prototype.next = next;
  return { ids, text };
}
function logits(ids, n) { // read the first n, then step by step
  poet.model.start(1);
  for (const _ of poet.model.read(ids.slice(0, n), [])) {}
  for (const id of ids.slice(n)) poet.model.step(id);
  return Array.from(poet.model.logits);
}
"""


class Elements(HTMLParser):
    """Every element of a page as [name, attributes, text up to the first tag in it]."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.is_open = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.found[-1][2] += data


def export(path: Path, out: Path, dtype: str = "float32", passage: str = "A sample.", **more) -> list[list]:
    model, tok, content = checkpoint.load_model(path, torch.device("cpu"), torch.float32)
    html.export(model, tok, content | more, passage, out, dtype)
    return Elements(out.read_text(encoding="utf-8")).found


def engine(elements: list[list], has_simd: bool = True) -> MiniRacer:
    """V8 with the engine, the model and the tokenizer that a page holds; has_simd: as in a browser with WebAssembly."""
    v8 = MiniRacer()
    if not has_simd:
        v8.eval("globalThis.WebAssembly = undefined")
    texts = {attrs.get("id"): text for _, attrs, text in elements}
    lines = {attrs["data-name"]: text for _, attrs, text in elements if "data-name" in attrs}
    v8.eval(f"{texts['engine']}\nconst about = {texts['about']}, lines = {json.dumps(lines)};{RUN}")
    return v8


def call(v8: MiniRacer, function: str, *given):
    """What a JavaScript function returns."""
    return v8.call(f"({function})", *given)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([make_book(3, 60) + "Été, 東京! 1234 don't  we'll\t\n"], 360, [END, "<|a|>", "<|b|>"])


@pytest.fixture(scope="module")
def v8() -> MiniRacer:
    """V8 with the engine alone."""
    v8 = MiniRacer()
    v8.eval(ENGINE.read_text(encoding="utf-8"))
    return v8


SHAPES = [
    {"positions": "rotary", "block_size": 24},
    {"block_size": 24},
    {"block_size": 7, "gelu": "tanh", "bias": False},
    {"positions": "rotary", "gelu": "tanh", "bias": False, "n_head": 1, "n_embd": 30, "rope_theta": 500.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_text_equals_poets_far_beyond_the_window_in_every_blend(tmp_path, bpe, shape):
    path = make_checkpoint(tmp_path / "best.pt", bpe, **shape)
    v8, poet = engine(export(path, tmp_path / "poet.html")), Poet(str(path), "cpu", "float32")
    settings = {"temperature": 0.0, "until": "tokens", "max_new_tokens": 300}
    for prompt, style in (("The rabbit", {}), ("", {"a": 1}), (make_book(1, 3), {"a": 0.7, "b": 0.3})):
        wanted = ",".join(f"{name}:{share}" for name, share in style.items())
        passages = poet.begin(prompt, 1, style=wanted, **settings)
        for _ in poet.stream(passages):
            pass
        found = call(v8, "write", prompt, settings | {"style": style})
        assert found == {"ids": list(passages[0].ids), "text": passages[0].text}


@pytest.mark.parametrize("has_simd", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_torchs_to_1e5_and_with_float16_those_of_the_rounded_weights(tmp_path, bpe, shape, has_simd):
    path = make_checkpoint(tmp_path / "best.pt", bpe, **shape)
    model, _, _ = checkpoint.load_model(path, torch.device("cpu"), torch.float64)
    ids = torch.randint(bpe.vocab_size, (1, model.config.block_size))
    in_float32, in_float16 = (
        torch.tensor(
            call(engine(export(path, tmp_path / f"{dtype}.html", dtype), has_simd), "logits", ids[0].tolist(), 5)
        )
        for dtype in ("float32", "float16")
    )
    with torch.no_grad():
        wanted = model(ids)[0][0, 0]
        torch.testing.assert_close(in_float32.double(), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(in_float16.double(), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
        for p in model.parameters():
            p.copy_(p.half())
        torch.testing.assert_close(in_float16.double(), model(ids)[0][0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [22, 23, 24, 25, 47, 48, 90])
def test_a_full_ring_of_rotary_positions_gives_the_logits_of_generate(tmp_path, bpe, n):
    path = make_checkpoint(tmp_path / "best.pt", bpe, positions="rotary", block_size=24)
    model, _, _ = checkpoint.load_model(path, torch.device("cpu"), torch.float32)
    ids = torch.randint(bpe.vocab_size, (1, n), generator=torch.Generator().manual_seed(n))
    seen = []

    def force(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits[0])
        return ids[:, min(4 + len(seen), n - 1)]

    for _ in generate(model, ids[:, :5], n - 4, force):
        pass
    found = call(engine(export(path, tmp_path / "poet.html")), "logits", ids[0].tolist(), 5)
    torch.testing.assert_close(torch.tensor(found), seen[-1], rtol=0, atol=2e-5)


ODD = [
    TEXT[:2000],
    "",
    " ",
    "\n",
    "  spaces\n\n\n and\ttabs  \r\n\r\n  ",
    "it's HE'LL we'Ve I'm 'tis o'D don'ſ ’s",
    "a\u00a0b\u2003c\u3000\u0085d\x1ce\ufefff\u200bg",
    "Été naïve e\u0301 ΣΑΣ ﬁ Ⅷ ½ ٣٤٥ 1234567 東京 ひらがな 한글 עברית हिन्दी",
    "🙂👩‍👩‍👧🏳️‍🌈 \U0001f1e9\U0001f1ea",
    "!!!???...\n\n--\r\n(x)  [y]\t{z}",
    "<script>alert(1)</script> <|endoftext|> <|a|>",
    "x" * 300,
]


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_bpe_ids_are_poets_with_every_pattern(v8, bpe, pattern):
    joined = ["'ſa", "'sa", "'LLa", "a'", "  a", "\n\n ", "12", "1234", "!\n", " \n", "é1"]  # tokens across likely cuts
    pairs = [part.encode() for part in joined if part.encode() not in bpe.tokens]
    tok = BPETokenizer([*bpe.tokens, *(dict.fromkeys(p[:i] for p in pairs for i in range(2, len(p) + 1) if
                       p[:i] not in bpe.tokens))], SPECIALS, pattern)  # fmt: skip
    rng = np.random.default_rng(0)
    chars = [*" \n\r\t'sSſaé1٣東🙂!\u00a0\u0085\u3000_-ltLVEve"]
    odd = ODD + [f"x{part}z" for part in joined] + ["".join(rng.choice(chars, 40)) for _ in range(300)]
    found = call(v8, "(saved, texts) => { const tok = new Tokenizer(saved); return texts.map((t) => tok.encode(t)); }",
                    tok.to_json(), odd)  # fmt: skip
    assert found == [tok.encode(text) for text in odd]


def test_character_ids_are_poets_with_and_without_unknown(v8):
    for specials in (SPECIALS, []):
        tok = CharTokenizer.train([TEXT], specials)
        found = call(v8, "(saved, texts) => texts.map((t) => new Tokenizer(saved).encode(t))", tok.to_json(), ODD)
        assert found == [tok.encode(text) for text in ODD]


def test_bytes_are_decoded_as_they_come_as_in_python(v8, bpe):
    rng, code = (
        np.random.default_rng(1),
        """(parts) => {
        const decoder = new Utf8Decoder();
        return parts.map((part) => decoder.push(part)); }""",
    )
    lead = [0xC2, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xF5, 0x80, 0x9F, 0xA0, 0xBF, 0x41, 0xFF, 0x90, 0x8F]
    for raw in [TEXT[:500].encode(), *(bytes(rng.choice(lead, 12).tolist()) + b"." for _ in range(300))]:
        decoder = StreamDecoder(bpe)
        ids = [bpe.tokens.index(bytes([byte])) for byte in raw]
        wanted = [decoder.push([id]) for id in ids]
        found = call(v8, code, [chr(byte) for byte in raw])
        # Python notices a byte later than the page that half a surrogate pair is no character
        assert found == wanted or (0xED in raw and "".join(found) == "".join(wanted))


FILTERS = [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
           {"top_k": 10**9, "top_p": 1.0}, {"temperature": 0.3, "top_p": 0.9}, {"top_p": 1e-9}]  # fmt: skip


@pytest.mark.parametrize("keys", FILTERS, ids=str)
def test_the_filtered_probabilities_are_the_samplers_to_1e6(v8, keys):
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = -torch.inf
    s = Settings(**{"temperature": 1.3, "top_p": 1.0} | keys)
    z = sampler.keep_top_p(sampler.keep_top_k(logits / s.temperature, torch.tensor([[s.top_k or 300]])), s.top_p)
    wanted = sampler.keep_min_p(z, s.min_p).softmax(-1)
    code = """(rows, settings) => rows.map((row) => { row[7] = -Infinity;
        const p = filter(new Float64Array(300), row, new Float64Array(300), settings);
        const total = p.reduce((a, b) => a + b); return Array.from(p, (q) => q / total); })"""
    found = call(v8, code, logits.masked_fill(logits.isinf(), 0).tolist(), dataclasses.asdict(s))
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), wanted, rtol=0, atol=1e-6)


def test_penalties_and_blends_are_the_samplers_and_draws_follow_the_probabilities(v8):
    prompt, weights, forbidden = [3, 4, 5, 3, 4], [0.7, 0.3], torch.tensor([1, 9])
    keys = {"repetition_penalty": 1.7, "no_repeat_ngram": 3, "temperature": 0.0}
    code = """(settings, forbidden, weights, prompt, steps) => {
        const s = new Sampler({ ...DEFAULTS, ...settings }, 12, forbidden, weights, prompt);
        return steps.map((z) => { const id = s.next(Float32Array.from(z.flat()));
            return [id, Array.from(s.z, (x) => Math.max(x, -1e9)), s.explain(id)]; }); }"""
    for shares in (weights, [1.0]):
        ours = sampler.Sampler([sampler.SampledText(Settings(**keys), 0, prompt, shares)], forbidden)
        steps = torch.randn(200, len(shares), 12, generator=torch.Generator().manual_seed(1)) * 2
        for logits, (id, z, note) in zip(
            steps, call(v8, code, keys, forbidden.tolist(), shares, prompt, steps.tolist()), strict=True
        ):
            raw = logits.clone().index_fill_(1, forbidden, -torch.inf)
            penalized = ours.penalize(sampler.blended(raw, torch.tensor(shares)))[0]
            torch.testing.assert_close(torch.tensor(z), penalized.clamp(min=-1e9), rtol=0, atol=1e-5)
            assert id == ours(logits.clone())[0]
            assert note["p"] == pytest.approx(ours.logprobs.exp().item(), abs=1e-6)
            probs = ours.logits.softmax(-1)[0]
            others = [v for v in probs.argsort(descending=True).tolist() if v != id][:5]
            assert [v for v, _ in note["others"]] == others
            assert [p for _, p in note["others"]] == pytest.approx(probs[others].tolist(), abs=1e-6)
    code = """(n) => { const s = new Sampler({ ...DEFAULTS, seed: 5 }, 4, [], [1], []), counts = [0, 0, 0, 0];
        for (let i = 0; i < n; i++) counts[s.draw([1, 0, 2, 5])]++; return counts; }"""
    counts = call(v8, code, 80_000)
    assert counts[1] == 0 and np.abs(np.array(counts) - [10_000, 0, 20_000, 50_000]).max() < 700


PLAY = (
    "JULIET\nO, never! “What?” he said. (No.) And so on\nto the end.\n\nFirst Citizen:\nSpeak, speak.  \n \n"
    "  \nHe sat.\n\nACT II\n\nSCENE I. Rome.\n\nÉlan 🙂 vital! Yes\x85no. "
)


@pytest.mark.parametrize("until", ["auto", "tokens", "line", "sentence", "paragraph", "speech", "scene"])
def test_passages_release_and_end_as_poets_do(v8, bpe, until):
    code = """(saved, settings, prompt, ids) => {
        const p = new Passage(new Tokenizer(saved), settings, prompt), all = [];
        const add = (parts) => all.push(parts.map(([text]) => text).join(""));
        for (const id of ids) if (!p.done) add(p.push(id));
        if (!p.done) add(p.finish());
        return all; }"""
    rng, tok = np.random.default_rng(2), bpe.to_json()
    for trial in range(60):
        parts = re.split(r"(?<=\n)|(?<=[.!?] )", PLAY)
        text = "".join(rng.choice(parts, 12)) + ("🙂" * 5 if trial % 7 == 0 else "")
        ids = bpe.encode(text)[: int(rng.integers(5, 200))] + [bpe.specials[END]] * (trial % 3 == 0)
        stop = (("he", "\n\n", "🙂"), (), ())[trial % 3]
        settings = Settings(until=until, stop=stop, max_new_tokens=len(ids) * (1 + trial % 2))
        prompt = ("", "ROMEO\nO", "It was")[trial % 3]
        passage, wanted = Passage(bpe, settings, prompt), []
        for id in ids:
            if not passage.done:
                wanted.append(passage.push(id))
        if not passage.done:
            wanted.append(passage.finish())
        assert call(v8, code, tok, dataclasses.asdict(settings), prompt, ids) == wanted


def test_text_from_a_checkpoint_or_prompt_never_becomes_html(tmp_path):
    tok = CharTokenizer("\n <>/abcdeilprst()1!-{}", [END, f"<|{SCRIPT}|>", "<|<!--|>", "<|{{about}}{{weights}}\0|>"])
    licence = f"x: {SCRIPT}<!--</script>"
    path = make_checkpoint(tmp_path / "best.pt", tok)
    plain = export(make_checkpoint(tmp_path / "plain.pt", CharTokenizer("ab", [])), tmp_path / "plain.html")
    found = export(path, tmp_path / "poet.html", passage=f"</script>{SCRIPT}<!--{{{{title}}}}", licences=[licence])
    shown = [(tag, attrs) for tag, attrs, _ in found if tag != "meta"]
    assert shown == [(tag, attrs) for tag, attrs, _ in plain if tag != "meta"]  # not an element more
    texts = {attrs.get("id"): text for _, attrs, text in found}
    about = json.loads(texts["about"])
    assert about["licences"] == [licence] and about["styles"] == [SCRIPT, "<!--", "{{about}}{{weights}}\0"]
    assert about["sample"] == f"</script>{SCRIPT}<!--{{{{title}}}}" and "<" not in texts["about"]
    assert call(engine(found), "write", SCRIPT, {"max_new_tokens": 5})["ids"]


def test_the_policy_names_our_scripts_and_forbids_all_else(tmp_path, bpe):
    found = export(make_checkpoint(tmp_path / "best.pt", bpe), tmp_path / "poet.html")
    (policy,) = [attrs["content"] for tag, attrs, _ in found if tag == "meta" and "http-equiv" in attrs]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    for kind, name, more in (("script-src", "script", ["'wasm-unsafe-eval'"]), ("style-src", "style", [])):
        run = [text for tag, attrs, text in found if tag == name and "type" not in attrs]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
        assert len(run) == 1 and rules.pop(kind) == [f"'sha256-{digest}'" for digest in hashes] + more
    assert rules == {
        "default-src": ["'none'"], "worker-src": ["blob:"], "base-uri": ["'none'"], "form-action": ["'none'"],
        "require-trusted-types-for": ["'script'"], "trusted-types": ["engine"],
    }  # fmt: skip
    page = ENGINE.with_suffix(".html").read_text(encoding="utf-8") + ENGINE.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval|new Function|fetch\(|https?:", page
    )


def test_a_page_holds_each_parameter_once(tmp_path, bpe):
    found = export(make_checkpoint(tmp_path / "best.pt", bpe), tmp_path / "poet.html", "float16")
    assert sum(len(base64.b64decode(text)) for _, attrs, text in found if "data-name" in attrs) == 2 * 38_016


def test_an_export_is_atomic_and_a_model_too_large_or_beyond_float16_is_refused(tmp_path, bpe, monkeypatch, capsys):
    path, out = make_checkpoint(tmp_path / "best.pt", bpe), tmp_path / "poet.html"
    keys = {"checkpoint": str(path), "export": str(out), "device": "cpu", "dtype": "float32", "max_new_tokens": 5}
    monkeypatch.setattr(html, "MOST_PARAMETERS", 1000)
    with pytest.raises(CheckpointError, match=r"^export: the model has 38,016 parameters.* --export=poet\.gguf$"):
        sample.main(SampleConfig(**keys))
    assert capsys.readouterr().out == "" and not out.exists()
    monkeypatch.undo()
    model, tok, content = checkpoint.load_model(path, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1e5
    with pytest.raises(CheckpointError, match=r"ln_f\.bias has numbers too large for float16; use --export"):
        html.export(model, tok, content, "", out)
    assert [found.name for found in tmp_path.iterdir()] == ["best.pt"]
    html.export(model, tok, content, "", out, "float32")
    assert out.stat().st_mode & 0o777 == 0o644
    for change in ({}, {"export_dtype": "float32"}):
        with pytest.raises(ConfigError, match="exists; choose another"):
            sample.main(SampleConfig(**keys | change))
    out.unlink()
    sample.main(SampleConfig(**keys))
    assert "poet.html: 0.2 MB; open it" in capsys.readouterr().out


def test_a_checkpoint_of_nanogpt_with_a_padded_vocabulary_writes(tmp_path):
    tok = CharTokenizer("\n abcdefgh", [])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, bias=False)).eval()
    html.export(model, tok, {"config": {"dataset": "data/my_songs"}}, "a", tmp_path / "poet.html")
    found = Elements((tmp_path / "poet.html").read_text()).found
    assert [text for tag, _, text in found if tag == "title"] == ["My Songs"]
    written = engine(found).call(
        "write", "abc", {"max_new_tokens": 200, "until": "tokens", "temperature": 1.5, "top_p": 1}
    )
    assert max(written["ids"]) < tok.vocab_size and len(written["text"]) == 200

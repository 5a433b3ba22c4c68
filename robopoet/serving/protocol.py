"""OpenAI's completions as JSON: requests checked into choices, what they gain into responses, errors."""

import re
import secrets
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec
import torch

from robopoet import VERSION, files
from robopoet.errors import ConfigError, DataError, bounds
from robopoet.serving.engine import Bias, Choice, Gain, Scored
from robopoet.text.tokenizer import StreamDecoder
from robopoet.writing.healing import Prompt
from robopoet.writing.passage import Settings, make_settings
from robopoet.writing.poet import Poet

MOST_BIASED = 300  # ids of `logit_bias`: OpenAI's limit
Status = Literal["loading", "ending"]  # why there is no model to ask
MOST_TOP = 5  # likeliest tokens that `logprobs` may ask for: OpenAI's limit


@dataclass(frozen=True)
class Limits:
    """What a request, and all of them together, may take."""

    # limits
    max_rows: int = 64  # rows of the batch: a text takes one, a text in a blend one for each of its styles
    max_waiting: int = 256  # requests that may wait beyond max_rows; further ones are refused with 429
    max_body: int = 2**20  # longest body of a request, in bytes
    max_prompt: int = 16_384  # longest prompt, in tokens
    max_tokens: int = 4_096  # longest text that a request may ask for, in tokens
    max_choices: int = 128  # texts that a request may ask for: its prompts times n
    request_s: float = 300.0  # seconds from a request's arrival to its end
    client_s: float = 15.0  # seconds that a client may take to send a request, or to read what is sent
    grace_s: float = 30.0  # seconds that running requests have to finish after SIGTERM

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "max_rows max_choices", 1, 4096) + bounds(self, "max_waiting", 1, 2**20)
        found += bounds(self, "max_body", 1, 2**30) + bounds(self, "max_prompt max_tokens", 1, 2**20)
        return found + bounds(self, "request_s client_s grace_s", 0.01, 1e6)


class RequestError(ValueError):
    """A request that is refused: HTTP status, the key that is wrong, and OpenAI's code where it has one."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def param(self) -> str | None:
        """The key of a request that the message names: a decoder's somewhere, all others as their first word."""
        found = re.match(r"(?:request: .*?(?:unknown field `|\$\.)(\w+)|(\w+):)?", str(self))
        decoded, key = found.groups() if found else (None, None)
        return decoded or (key if self.status in (400, 404) and key != "request" else None)


def error_body(e: RequestError) -> bytes:
    """The error in OpenAI's form."""
    kind = "rate_limit_error" if e.status == 429 else "invalid_request_error" if e.status < 500 else "server_error"
    return msgspec.json.encode({"error": {"message": str(e), "type": kind, "param": e.param, "code": e.code}})


# ---------------------------------------------------------------------------------------------------------------------
# requests


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How a stream ends: with a last chunk that has the usage, if asked for."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


OPENAI = {  # the keys of a request that are no settings of ours
    "model": str,
    "prompt": str | list[str | int | list[int]],
    "max_tokens": int,
    "n": int,
    "stop": str | list[str],
    "stream": bool,
    "stream_options": StreamOptions,
    "logprobs": int,
    "echo": bool,
    "user": str,
    "best_of": int,
    "suffix": str,
    "presence_penalty": float,
    "frequency_penalty": float,
    "logit_bias": dict[int, float],
}
SETTINGS = {key: kind for key, kind in get_type_hints(Settings).items() if key not in ("stop", "max_new_tokens")}
DEFAULTS = {"until": "tokens", "temperature": 1.0, "top_p": 1.0}  # OpenAI's, not sample.py's
Body = msgspec.defstruct(
    "Body",
    [(key, kind | None, None) for key, kind in (OPENAI | SETTINGS).items()],
    forbid_unknown_fields=True,
    kw_only=True,
)


def model_name(checkpoint: str) -> str:
    """The name of a checkpoint's folder, or of the folder itself: out/mine/best.pt is mine."""
    path = Path(checkpoint)
    name = path.absolute().parent.name if path.suffix == ".pt" else path.name
    return name.replace(":", "-") or "model"


def model_ids(poet: Poet, name: str) -> list[str]:
    """The ids under which a model is known: its name, and one for each of its styles, such as mine:alice."""
    return [name, *(f"{name}:{style}" for style in poet.styles)]


def read_request(raw: bytes, poet: Poet, name: str, limits: Limits) -> "Reply":
    """A request's JSON, as the reply that waits for its texts; raises RequestError for what is wrong with it."""
    try:
        body: Any = files.decode_json(raw, Body, "request", RequestError, "see OpenAI's reference of completions")
        lacking = {"suffix": body.suffix, "best_of": body.best_of not in (None, 1, body.n)}
        refuse_what_we_lack(body, [key for key, is_asked in lacking.items() if is_asked])
        within("logprobs", body.logprobs or 0, 0, MOST_TOP)
        return make_reply(body, poet, name, limits)
    except (ConfigError, DataError) as e:
        raise RequestError(str(e)) from None


def make_reply(
    body: Any, poet: Poet, name: str, limits: Limits, kind: "type[Reply] | None" = None, also_ends: int | None = None
) -> "Reply":
    """The reply, of this kind, to a Body; raises RequestError, ConfigError or DataError for what is wrong with it.

    also_ends: a token that ends a text as <|endoftext|> does.
    """
    style = body.style or ""
    if body.model is None:
        raise RequestError(f"model: is missing; GET /v1/models lists them, the first is {name}")
    if body.model not in model_ids(poet, name):
        message = f"model: found {body.model[:100]!r}, but there are {', '.join(model_ids(poet, name))[:500]}"
        raise RequestError(message, 404, "model_not_found")
    if named := body.model.removeprefix(name).removeprefix(":"):
        if style not in ("", named):
            raise RequestError(f"style: found {style[:100]!r}, but the model is {body.model}; give one")
        style = named
    max_tokens, n = 16 if body.max_tokens is None else body.max_tokens, 1 if body.n is None else body.n
    within("max_tokens", max_tokens, 0, limits.max_tokens)
    within("n", n, 1, limits.max_choices)
    given = {key: value for key in SETTINGS if (value := getattr(body, key)) is not None}
    given |= {"top_k": 0} if body.top_k == -1 else {}  # vLLM's way to say all
    given |= {"style": style, "stop": [body.stop] if isinstance(body.stop, str) else body.stop or []}
    given |= {"seed": secrets.randbits(52) if body.seed is None else body.seed, "max_new_tokens": max(max_tokens, 1)}
    settings = make_settings(DEFAULTS | given)
    within("style: number of styles", len(poet.blend_of(style)), 0, limits.max_rows)
    poet.copied(settings, "")  # raises if max_copy needs a training text that is not there
    prompts = _prompts(body.prompt)
    within("prompt: texts times n", len(prompts) * n, 1, limits.max_choices)
    reply = (kind or Reply)(body.model, poet, bool(body.stream), settings.seed)
    reply.tells_usage = bool(body.stream_options and body.stream_options.include_usage)
    for i, prompt in enumerate(prompts):
        drawn = settings if body.seed is not None else replace(settings, seed=settings.seed + i)
        read = _read_prompt(prompt, poet)
        within("prompt: tokens", len(read.ids), 1, limits.max_prompt)
        scores_prompt = bool(body.echo) and body.logprobs is not None and bool(prompt)
        if scores_prompt and len(read.ids) + bool(style) > poet.model.config.block_size:
            most = poet.model.config.block_size - bool(style)
            message = f"prompt: has {len(read.ids):,} tokens; with echo and logprobs the model reads at most {most:,}"
            raise RequestError(message, code="context_length_exceeded")
        reply.prompt_tokens += len(read.ids) if prompt else 0
        for number in range(n):
            choice = Choice(read, drawn, number, max_tokens, body.logprobs, scores_prompt, reply.gain, also_ends)
            choice.bias = _bias(body, poet)
            reply.add(choice, read.text if body.echo else "")
    return reply


def _bias(body: Any, poet: Poet) -> Bias | None:
    """What a text's logits get; None if nothing was asked for."""
    presence, frequency, biases = body.presence_penalty or 0.0, body.frequency_penalty or 0.0, body.logit_bias or {}
    within("presence_penalty", presence, -2, 2)
    within("frequency_penalty", frequency, -2, 2)
    within("logit_bias: number of ids", len(biases), 0, MOST_BIASED)
    if not (presence or frequency or biases):
        return None
    logits = torch.zeros(poet.model.config.vocab_size, device=poet.machine.device)
    for id, value in biases.items():
        if not 0 <= id < len(logits):
            raise RequestError(f"logit_bias: found {id:,}, must be token ids from 0 to {len(logits) - 1:,}")
        within("logit_bias", value, -100, 100)
        logits[id] = value
    return Bias(logits, presence, frequency)


def within(what: str, value: float, low: int, high: int) -> None:
    """Raise RequestError unless low <= value <= high."""
    if not low <= value <= high:
        raise RequestError(f"{what}: found {value:,}, must be at least {low:,} and at most {high:,}")


def refuse_what_we_lack(body: Any, asked: list[str]) -> None:
    """Raise RequestError for the keys `asked`, which want what this server does not do, and for lone options."""
    if asked:
        raise RequestError(f"{asked[0]}: this server does not have it; leave it out", code="unsupported")
    if body.stream_options and not body.stream:
        raise RequestError("stream_options: needs stream")


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request: a text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt or ()}
    if kinds == {int}:
        return [prompt]
    if kinds not in ({str}, {list}):
        raise RequestError("prompt: must be a text, a list of texts, token ids, or a list of those")
    return prompt


def _read_prompt(prompt: str | list[int], poet: Poet) -> Prompt:
    """A prompt as the model reads it, ids as they are; raises ConfigError or RequestError if it is none."""
    if isinstance(prompt, str):
        return poet.read(prompt)
    size = poet.model.config.vocab_size
    if not prompt or not all(0 <= id < size for id in prompt):
        raise RequestError(f"prompt: must be token ids from 0 to {size - 1:,}, at least one")
    return Prompt(poet.tokenizer.decode_bytes(prompt).decode(errors="replace"), prompt, prompt)


# ---------------------------------------------------------------------------------------------------------------------
# responses


@dataclass
class Text:
    """What a choice has gained since it was last sent, and how far it is."""

    index: int
    decoder: StreamDecoder
    parts: list[str]
    asks: bool  # for log-probabilities
    tokens: list[tuple[Scored, int]] = field(default_factory=list)  # with their offsets in the text
    offset: int = 0  # characters before the next token
    finish: str | None = None
    is_begun: bool = False  # whether its first part was sent

    def take_tokens(self) -> list[tuple[Scored, int]]:
        """The tokens since the last call."""
        taken = self.tokens
        self.tokens = []
        return taken


class Reply:
    """A request's texts as they grow, and their JSON.

    error: what went wrong, instead of texts. is_done: whether all texts are whole.
    """

    id_prefix = "cmpl"
    kind = streamed_kind = "text_completion"

    def __init__(self, model: str, poet: Poet, streams: bool, seed: int):
        self.tok, self.streams, self.tells_usage = poet.tokenizer, streams, False
        self.texts: dict[Choice, Text] = {}
        self.error: RequestError | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.wake = lambda: None  # called when there is something to send
        self._changed: dict[Choice, None] = {}
        self._names = {id: name for name, id in self.tok.specials.items()}
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.streamed_kind if streams else self.kind,
            "created": int(datetime.now(UTC).timestamp()),
            "model": model,
            "system_fingerprint": f"robopoet-{VERSION}-{poet.sha256[:12]}-{str(poet.machine.dtype)[6:]}",
            "seed": seed,  # ours; of the first prompt: if it was not given, the next one's is one more
        }

    @property
    def is_done(self) -> bool:
        """Whether all texts are whole, or one has failed."""
        return self.error is not None or all(text.finish for text in self.texts.values())

    @property
    def usage(self) -> dict[str, int]:
        """The tokens that were read and generated."""
        read, generated = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}

    def add(self, choice: Choice, echo: str) -> None:
        """Add a text that is to be generated, with the prompt in front if it is echoed."""
        asks = choice.top is not None
        self.texts[choice] = Text(len(self.texts), StreamDecoder(self.tok), [echo] if echo else [], asks)

    def gain(self, gain: Gain) -> None:
        """Take what a text gained."""
        text = self.texts[gain.choice]
        if gain.error:
            self.error = RequestError(gain.error, 500)
        if gain.text:
            text.parts.append(gain.text)
        for token in gain.tokens:
            if text.asks:
                text.tokens.append((token, text.offset))
                text.decoder.skip = token.cut
                text.offset += len(text.decoder.push([token.id]))
        self.completion_tokens += 0 if gain.is_prompt else len(gain.tokens)
        text.finish = gain.finish or None
        self._changed[gain.choice] = None
        self.wake()

    def whole(self) -> dict[str, Any]:
        """The response to a request that does not stream."""
        return self._head | {"choices": [*map(self._take, self.texts.values())], "usage": self.usage}

    def chunks(self) -> bytes:
        """The server-sent events for what was gained since the last call, "" if that is nothing to be seen."""
        changed = self._changed
        self._changed = {}
        events: list[bytes] = []
        usage: dict[str, None] = {"usage": None} if self.tells_usage else {}
        for text in (self.texts[choice] for choice in changed):
            if text.parts or text.tokens or text.finish:
                events.append(msgspec.json.encode(self._head | {"choices": [self._take(text)]} | usage))
        if self.error:
            events.append(error_body(self.error))
        elif self.is_done:
            if self.tells_usage:
                events.append(msgspec.json.encode(self._head | {"choices": [], "usage": self.usage}))
            events.append(b"[DONE]")
        return b"".join(b"data: " + event + b"\n\n" for event in events)

    def _take(self, text: Text) -> dict[str, Any]:
        """A choice of the response with what its text has gained."""
        parts = text.parts
        text.parts = []
        return self.choice(text, "".join(parts))

    def choice(self, text: Text, gained: str) -> dict[str, Any]:
        """A choice of the response, which takes the text's tokens."""
        logprobs = self._logprobs(text.take_tokens()) if text.asks else None
        return {"text": gained, "index": text.index, "logprobs": logprobs, "finish_reason": text.finish}

    def _logprobs(self, tokens: list[tuple[Scored, int]]) -> dict[str, list[Any]]:
        """OpenAI's legacy form: the sampled token is among the likeliest in any case."""
        top = [
            None if token.logprob is None else {self.name(id, token.cut): p for id, p in (*token.top, token[:2])}
            for token, _ in tokens
        ]
        return {
            "tokens": [self.name(token.id, token.cut) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": top,
            "text_offset": [offset for _, offset in tokens],
        }

    def name(self, id: int, cut: int = 0) -> str:
        """A token's text from byte `cut` on; what is no whole characters as bytes:\\xe2\\x80, as OpenAI's."""
        if id >= len(self.tok.tokens):
            return self._names.get(id, f"<|{id}|>")
        raw = self.tok.tokens[id][cut:]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

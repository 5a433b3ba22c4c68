"""OpenAI's chat completions: the chat becomes the prompt of a completion, whose text is the assistant's next turn."""

from typing import Any, Literal

import msgspec

from robopoet import files
from robopoet.errors import ConfigError, DataError
from robopoet.serving.protocol import (
    OPENAI,
    SETTINGS,
    Body,
    Limits,
    Reply,
    RequestError,
    Text,
    make_reply,
    refuse_what_we_lack,
    within,
)
from robopoet.text.chat import Turn, book_text, chatml_ids, is_chatml
from robopoet.text.tokenizer import CHAT
from robopoet.writing.poet import Poet

MOST_LIKELIEST = 20  # likeliest tokens that `top_logprobs` may ask for: OpenAI's limit


class ContentPart(msgspec.Struct):
    """A part of what a message says; others, such as pictures, are refused."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct):
    """A turn of the chat; what else clients send back of an answer is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: str | None = None


ONLY_COMPLETIONS = "prompt", "echo", "suffix", "best_of"
IGNORED = "metadata", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort", "safety_identifier"
IGNORED += "service_tier", "store", "verbosity"
# what asks for nothing, of the keys that ask for something that this server does not do
NEUTRAL = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    **dict.fromkeys(("tools", "functions", "audio", "prediction", "web_search_options"), ()),
}
CHAT_KEYS = {
    **{key: kind for key, kind in (OPENAI | SETTINGS).items() if key not in ONLY_COMPLETIONS},
    "messages": list[Message],
    "max_completion_tokens": int,
    "logprobs": bool,
    "top_logprobs": int,
    **dict.fromkeys((*IGNORED, *NEUTRAL), Any),
}
ChatBody = msgspec.defstruct(
    "ChatBody", [(key, kind | None, None) for key, kind in CHAT_KEYS.items()], forbid_unknown_fields=True, kw_only=True
)


def read_chat(raw: bytes, poet: Poet, name: str, limits: Limits) -> Reply:
    """A chat's JSON, as the reply that waits for its texts; raises RequestError for what is wrong with it."""
    try:
        body: Any = files.decode_json(
            raw, ChatBody, "request", RequestError, "see OpenAI's reference of chat completions"
        )
        return _check(body, poet, name, limits)
    except (ConfigError, DataError) as e:
        raise RequestError(str(e)) from None


def _check(body: Any, poet: Poet, name: str, limits: Limits) -> Reply:
    refuse_what_we_lack(body, [key for key, values in NEUTRAL.items() if getattr(body, key) not in (None, [], *values)])
    if not body.messages:
        raise RequestError("messages: must be a list of at least one message")
    within("top_logprobs", body.top_logprobs or 0, 0, MOST_LIKELIEST)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs")
    for key in ("max_completion_tokens", "max_tokens"):
        if (tokens := getattr(body, key)) is not None:
            within(key, tokens, 1, limits.max_tokens)
    turns = [_turn(message, poet) for message in body.messages]
    most = min(poet.model.config.block_size, limits.max_tokens)
    shared = {key: getattr(body, key) for key in CHAT_KEYS if key in Body.__struct_fields__}
    asked: Any = Body(**shared | {"logprobs": (body.top_logprobs or 0) if body.logprobs else None})
    asked.max_tokens = body.max_completion_tokens or body.max_tokens or most
    if is_chatml(poet.tokenizer):
        asked.prompt = chatml_ids(turns, poet.tokenizer)
        return make_reply(asked, poet, name, limits, ChatReply, poet.tokenizer.specials[CHAT[1]])
    if turns[0].role == "system" and turns[0].content in poet.styles and not asked.style:
        asked.style = turns.pop(0).content
    asked.prompt, asked.until = book_text(turns), asked.until or "auto"
    return make_reply(asked, poet, name, limits, ChatReply)


def _turn(message: Message, poet: Poet) -> Turn:
    """A message as the model reads it; raises ConfigError if it is not text."""
    content = message.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    return Turn(role, poet.read(text).text, poet.read(message.name or "").text)


class ChatReply(Reply):
    """A chat's texts as they grow, and their JSON."""

    id_prefix = "chatcmpl"
    kind, streamed_kind = "chat.completion", "chat.completion.chunk"

    def choice(self, text: Text, gained: str) -> dict[str, Any]:
        """A choice of the response; a stream's first one of a text says who speaks."""
        told: dict[str, Any] = {"index": text.index, "finish_reason": text.finish}
        told["logprobs"] = {"content": self._told(text), "refusal": None} if text.asks else None
        if not self.streams:
            return told | {"message": {"role": "assistant", "content": gained, "refusal": None}}
        begins, text.is_begun = not text.is_begun, True
        return told | {"delta": {"role": "assistant", "content": gained} if begins else {"content": gained}}

    def _told(self, text: Text) -> list[dict[str, Any]]:
        return [
            self._token(token.id, token.logprob, token.cut)
            | {"top_logprobs": [self._token(id, p, token.cut) for id, p in token.top]}
            for token, _ in text.take_tokens()
        ]

    def _token(self, id: int, logprob: float | None, cut: int) -> dict[str, Any]:
        raw = list(self.tok.tokens[id][cut:]) if id < len(self.tok.tokens) else None
        return {"token": self.name(id, cut), "logprob": logprob, "bytes": raw}

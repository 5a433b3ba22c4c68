"""A chat as the text that a model goes on with: in ChatML if it learned that, else as a book has it."""

from typing import NamedTuple

from robopoet.text.tokenizer import CHAT, END, Tokenizer

# for transformers, llama.cpp and others, which read Jinja
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOOK = (
    "{% for message in messages %}{% if not loop.first and message['role'] != 'assistant' %}{{ '\n\n' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)
# the same for Ollama, in Go's language of templates
CHATML_GO = """\
{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
BOOK_GO = """\
{{ range $i, $turn := .Messages }}{{ if and $i (ne $turn.Role "assistant") }}

{{ end }}{{ $turn.Content }}{{ end }}"""


class Turn(NamedTuple):
    """What system, user or assistant says, and the speaker's name, "" without one."""

    role: str
    content: str
    name: str = ""


def is_chatml(tok: Tokenizer) -> bool:
    """Whether a model with this tokenizer learned chats in ChatML."""
    return {*CHAT, END} <= tok.specials.keys()


def template(tok: Tokenizer) -> str:
    """The chat template of a model with this tokenizer, in Jinja."""
    return CHATML if is_chatml(tok) else BOOK


def go_template(tok: Tokenizer) -> str:
    """The same as a template of Go's, for Ollama."""
    return CHATML_GO if is_chatml(tok) else BOOK_GO


def ending_ids(tok: Tokenizer) -> list[int]:
    """The ids that end a text: <|endoftext|>, and in ChatML the end of a turn."""
    names = (END, CHAT[1]) if is_chatml(tok) else (END,)
    return [tok.specials[name] for name in names if name in tok.specials]


def chatml_ids(turns: list[Turn], tok: Tokenizer) -> list[int]:
    """The ids of a chat in ChatML, up to where the assistant's next turn begins.

    What is said may hold the text of a special token, but never the token.
    """
    begin, end = (tok.specials[name] for name in CHAT)
    ids: list[int] = []
    for turn in turns:
        ids += [begin, *tok.encode(f"{turn.role}\n{turn.content}"), end, *tok.encode("\n")]
    return [*ids, begin, *tok.encode("assistant\n")]


def book_text(turns: list[Turn]) -> str:
    """A chat as the text of a book: the assistant goes on where the others' paragraph ends.

    A turn under a name is a paragraph of its own, with the name in the line above, as in a play. If the assistant has
    spoken under one, it does so again.
    """
    own = [turn.name for turn in turns if turn.role == "assistant" and turn.name]
    text: str = ""
    before = Turn("user", "")
    for turn in (*turns, Turn("assistant", "", own[-1] if own else "")):
        if text and (turn.name or before.name or turn.role != "assistant"):
            text += "\n\n"
        text, before = text + (f"{turn.name}\n" if turn.name else "") + turn.content, turn
    return text

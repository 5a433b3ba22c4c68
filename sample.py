"""Let a trained model write: once, in batches, or at a prompt of its own.

python sample.py --checkpoint=out/demo/best.pt --prompt="To be or not to be" --style=shakespeare
python sample.py out/demo/best.pt --interactive

from sample import Poet
Poet("out/demo/best.pt").write("O Romeo", n=3)
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import checkpoint
import configurator
from checkpoint import CheckpointError
from configurator import ConfigError, bounds
from data import DataError
from data.tokenizer import END, UNKNOWN, StreamDecoder, Tokenizer, styles


@dataclass(frozen=True)
class Settings:
    """How a passage is written."""

    # the passage
    style: str = ""  # write in this style, one of the checkpoint's (none: as the prompt suggests)
    max_new_tokens: int = 300  # tokens to write; more than block_size is fine
    stop: tuple[str, ...] = ()  # end before this text, as --stop="\n\n"; repeatable
    seed: int = 1337  # same seed, same passage
    # the choice of a token; applied in this order
    repetition_penalty: float = 1.0  # above 1: tokens already in the text are less likely
    temperature: float = 0.8  # below 1: bolder towards the likely; 0: always the likeliest
    top_k: int = 0  # choose among the k likeliest (0: all)
    top_p: float = 0.95  # choose among the likeliest that together have this probability (1: all)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "max_new_tokens", 1) + bounds(self, "seed", 0, 2**63 - 1)
        found += bounds(self, "temperature top_k", 0) + bounds(self, "top_p", 1e-9, 1)
        found += bounds(self, "repetition_penalty", 1e-9)
        return found + [f"stop: found {text!r}, must not be empty" for text in self.stop if not text]


@dataclass(frozen=True)
class SampleConfig(Settings):
    """The keys of sample.py."""

    # input and output
    checkpoint: str = "out/demo/best.pt"  # the model; it carries its tokenizer
    prompt: str = ""  # text to go on from, FILE:path, or - for stdin; \n is a line end
    num_samples: int = 1  # passages, written together
    interactive: bool = False  # prompt again and again; /help there
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of weights; auto: the fastest

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "num_samples", 1)


# ---------------------------------------------------------------------------------------------------------------------
# choosing a token: logits and probabilities are (B, V), text is (B, n) int64


def penalize_repetition(logits: torch.Tensor, text: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the positive logits of tokens in `text` by `penalty`, multiply the negative (Keskar et al. 2019, CTRL)."""
    seen = logits.gather(1, text)
    return logits.scatter(1, text, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Leave the k largest logits of each row, the rest -inf (Fan et al. 2018, arXiv:1805.04833)."""
    smallest = logits.topk(min(k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Leave each row's likeliest tokens until their probability reaches p (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, places = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, places, ordered)


def is_kept(probs: torch.Tensor, ids: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Whether keep_top_k, if k, and then keep_top_p, if p < 1, would leave each row's token, (B,) bool.

    probs: (B, V). ids: (B,) int64. Asks how many tokens are likelier than it, and what they add up to: no sorting.
    """
    likelier = probs > probs.gather(1, ids[:, None])
    kept = likelier.sum(-1) < (k or probs.shape[1])
    if p < 1:
        kept &= (probs * likelier).sum(-1) < (p * probs.topk(min(k, probs.shape[1])).values.sum(-1) if k else p)
    return kept


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token a row, (B,) int64: the inverse of the cumulative distribution at `uniforms` (B,) float64 in [0, 1)."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]


class Chooser:
    """Picks each row's next token by `settings`, never one of `forbidden` (ids, int64).

    Row i draws from a random stream of its own, made from (seed, passages[i]), so that a passage is the same whatever
    is written beside it.
    """

    def __init__(self, settings: Settings, forbidden: torch.Tensor, passages: range):
        self.settings, self.forbidden = settings, forbidden
        self.streams = [np.random.default_rng((settings.seed, passage)) for passage in passages]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.streams = [self.streams[row] for row in rows]

    def uniforms(self, rows: list[int]) -> torch.Tensor:
        """The next number of each of these rows' streams, float64 in [0, 1)."""
        numbers = [self.streams[row].random() for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device=self.forbidden.device)

    def __call__(self, logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) and the text so far (B, n) int64 -> ids (B,) int64."""
        s = self.settings
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(1, self.forbidden, -torch.inf)
        if s.repetition_penalty != 1:
            logits = penalize_repetition(logits, text, s.repetition_penalty)
        if s.temperature == 0:
            return logits.argmax(-1)
        logits = logits / s.temperature
        probs = logits.softmax(-1)
        ids = draw(probs, self.uniforms(list(range(len(probs)))))
        if not s.top_k and s.top_p == 1:
            return ids
        # A token drawn from all and thrown back unless the filters leave it has the distribution that they leave, and
        # to ask whether they do takes a tenth of their sorting. Most are left; after three throws they are applied.
        rows = (~is_kept(probs, ids, s.top_k, s.top_p)).nonzero()[:, 0]
        for _ in range(2):
            if not len(rows):
                return ids
            again = draw(probs[rows], self.uniforms(rows.tolist()))
            ids[rows] = again
            rows = rows[~is_kept(probs[rows], again, s.top_k, s.top_p)]
        if len(rows):
            left = keep_top_p(keep_top_k(logits[rows], s.top_k or logits.shape[1]), s.top_p)
            ids[rows] = draw(left.softmax(-1), self.uniforms(rows.tolist()))
        return ids


# ---------------------------------------------------------------------------------------------------------------------
# writing


class Passage:
    """One row's text as it grows: whole characters only, and nothing that may turn out to begin a stop."""

    def __init__(self, tok: Tokenizer, stops: tuple[str, ...]):
        self.text, self.done = "", False
        self._decoder, self._stops, self._held = StreamDecoder(tok), stops, ""
        self._end = tok.specials.get(END)

    def push(self, id: int) -> str:
        """Take the next token; returns the text that is now certain."""
        if self.done:
            return ""
        if id == self._end:
            return self.finish()
        self._held += self._decoder.push([id])
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self._held, self.done = self._held[: min(places)], True
            return self._release(len(self._held))
        held_back = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
        )
        return self._release(len(self._held) - held_back)

    def finish(self) -> str:
        """No more tokens come; returns the text that was held back."""
        if self.done:
            return ""
        self.done = True
        self._held += self._decoder.push([], final=True)
        return self._release(len(self._held))

    def _release(self, n: int) -> str:
        certain, self._held = self._held[:n], self._held[n:]
        self.text += certain
        return certain


class Poet:
    """A model with its tokenizer, ready to write.

    checkpoint_path: a .pt file. Raises CheckpointError when it can't be read, ConfigError for a device not here.
    """

    def __init__(self, checkpoint_path: str = "out/demo/best.pt", device: str = "auto", dtype: str = "auto"):
        self.machine = configurator.find_machine(device, dtype)
        path = Path(checkpoint_path)
        self.model, self.tokenizer, _ = checkpoint.load_model(path, self.machine.device, self.machine.dtype)
        self.model.prepack()
        self.styles = styles(self.tokenizer)
        end = self.tokenizer.specials.get(END)
        forbidden = [id for id in self.tokenizer.specials.values() if id != end]
        self.forbidden = torch.tensor(forbidden, dtype=torch.long, device=self.machine.device)

    def write(self, prompt: str = "", n: int = 1, **settings: Any) -> list[str]:
        """`n` passages that go on from `prompt`, each with the prompt before it; `settings` are those of Settings."""
        texts = [prompt] * n
        for pieces in self.stream(prompt, n, **settings):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(self, prompt: str = "", n: int = 1, first: int = 0, **settings: Any) -> Iterator[list[str]]:
        """What each of `n` passages gains, token by token; `first` numbers the first one's random stream.

        Raises ConfigError when a setting is out of range, the style is not one of the model's, or no prompt is left.
        """
        chosen = Settings(**settings)
        if problems := chosen.problems():
            raise ConfigError("; ".join(problems))
        tag = self.tag_of(chosen.style)
        ids = ([] if tag is None else [tag]) + self.tokenizer.encode(prompt or "\n")
        if not ids:
            raise ConfigError(f"prompt: found {prompt!r}, must have a character that the model knows")
        idx = torch.tensor([ids] * n, device=self.machine.device)
        choose = Chooser(chosen, self.forbidden, range(first, first + n))
        return self._stream(idx, [Passage(self.tokenizer, chosen.stop) for _ in range(n)], choose, tag, chosen)

    def _stream(
        self, idx: torch.Tensor, passages: list[Passage], choose: Chooser, tag: int | None, chosen: Settings
    ) -> Iterator[list[str]]:
        writing = self.model.generate(idx, chosen.max_new_tokens, choose, tag)
        written, going = list(range(len(passages))), None  # the passages that the model's rows are
        with contextlib.suppress(StopIteration):
            while True:
                ids = writing.send(going).tolist()
                pieces = [""] * len(passages)
                for passage, id in zip(written, ids, strict=True):
                    pieces[passage] = passages[passage].push(id)
                yield pieces
                rows = [row for row, passage in enumerate(written) if not passages[passage].done]
                if not rows:
                    return
                going = None
                # a row that is done is dropped, on CUDA with half of all: with other rows the step is recorded anew
                if len(rows) < len(written) and (self.machine.device.type == "cpu" or 2 * len(rows) <= len(written)):
                    written = [written[row] for row in rows]
                    choose.keep(rows)
                    going = torch.tensor(rows, device=idx.device)
        yield [passage.finish() for passage in passages]

    def tag_of(self, style: str) -> int | None:
        """The id that stands for `style`, None for no style; raises ConfigError when the model has no such style."""
        if style and style not in self.styles:
            raise ConfigError(f"style: found {style!r}, must be one of the model's: {', '.join(self.styles) or 'none'}")
        return self.styles.get(style)

    def unknown(self, prompt: str) -> str:
        """What to tell a user whose prompt has characters the tokenizer doesn't know; empty if it has none."""
        if not (unknown := self.tokenizer.unknown(prompt)):
            return ""
        fate = f"taken as {UNKNOWN}" if UNKNOWN in self.tokenizer.specials else "left out"
        return f"prompt: the model does not know {', '.join(map(repr, unknown))}: {fate}"


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def read_prompt(prompt: str) -> str:
    """The text that the key `prompt` stands for; raises ConfigError when its file is not UTF-8 text."""
    try:
        if prompt.startswith("FILE:"):
            return Path(prompt[5:]).read_text(encoding="utf-8")
        return sys.stdin.read() if prompt == "-" else unescape(prompt)
    except UnicodeDecodeError as e:
        raise ConfigError(f"prompt: {prompt[5:] or 'stdin'}: byte {e.start} is not UTF-8") from None


def unescape(text: str) -> str:
    """Let \\n and \\t stand for a line end and a tab, which a shell makes hard to type."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def tell(poet: Poet, prompt: str, n: int, first: int, settings: Settings) -> None:
    """Print `n` passages: one as it is written, several when they are whole."""
    if problem := poet.unknown(prompt):
        configurator.warn(problem)
    stream = poet.stream(prompt, n, first, **dataclasses.asdict(settings))
    if n == 1:
        print(prompt, end="", flush=True)
        for pieces in stream:
            print(pieces[0], end="", flush=True)
        print()
    else:
        for pieces in zip(*stream, strict=True):
            print(prompt + "".join(pieces))
            print("-" * 15)


COMMANDS = {
    "/style": "style",
    "/temp": "temperature",
    "/topk": "top_k",
    "/topp": "top_p",
    "/rep": "repetition_penalty",
    "/tokens": "max_new_tokens",
    "/seed": "seed",
}


def interact(poet: Poet, settings: Settings) -> None:
    """Ask for prompts and write on from each until /quit or end of input; Ctrl-C stops a passage."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and line editing)
    print("Type a prompt, or /help.")
    written = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return None
        if command == "/settings":
            print("\n".join(f"{key}: {value!r}" for key, value in dataclasses.asdict(settings).items()))
        elif command in COMMANDS:
            try:
                changed = configurator.change(settings, COMMANDS[command], argument.strip())
                poet.tag_of(changed.style)
                settings = changed
                written = 0 if command == "/seed" else written
            except ConfigError as e:
                print(e)
        elif command.startswith("/"):
            print(
                f"{' VALUE, '.join(COMMANDS)} VALUE, /settings, /help, /quit; anything else is a prompt (\\n: line end)"
            )
            print(f"styles: {', '.join(poet.styles) or 'none'}")
        else:
            try:
                tell(poet, unescape(line), 1, written, settings)
            except ConfigError as e:
                print(e)
            except KeyboardInterrupt:
                print()
            written += 1


def main(cfg: SampleConfig) -> None:
    """Write what `cfg` asks for."""
    prompt = read_prompt(cfg.prompt)
    poet = Poet(cfg.checkpoint, cfg.device, cfg.dtype)
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**values | {"stop": tuple(map(unescape, cfg.stop))})
    if cfg.interactive:
        interact(poet, settings)
    else:
        tell(poet, prompt, cfg.num_samples, 0, settings)


if __name__ == "__main__":
    configurator.launch(main, SampleConfig, DataError, CheckpointError, positional="checkpoint")

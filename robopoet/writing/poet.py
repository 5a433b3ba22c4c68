"""A trained model with its tokenizer, ready to generate passages."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

from model import GPT
from robopoet.errors import ConfigError, DataError, did_you_mean
from robopoet.files import HOME
from robopoet.machine import Machine, find_machine
from robopoet.text.cleaning import plain
from robopoet.text.dataset import find_dataset
from robopoet.text.tokenizer import END, UNKNOWN, BPETokenizer, Tokenizer, style_token, styles
from robopoet.weights import checkpoint, pretrained
from robopoet.writing.batch import Batch
from robopoet.writing.characters import find_characters
from robopoet.writing.copies import Copied, Copies
from robopoet.writing.decode import generate, prepack_matrices, window_start
from robopoet.writing.healing import Healing, Prompt, Rest, heal
from robopoet.writing.originality import Originality
from robopoet.writing.passage import Passage, Settings, make_settings
from robopoet.writing.sampler import SampledText, Sampler, blended

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
MAX_PASSAGES = 10_000  # in one batch
MAX_PROMPT = 10 * 2**20  # characters, or bytes of a file


class Poet:
    """A model and its tokenizer.

    checkpoint_path: what checkpoint.load takes. record: replay each decode step as a CUDA graph. Raises CheckpointError
    if it can't be read, ConfigError if the device is not available.
    """

    def __init__(
        self, checkpoint_path: str = "out/demo/best.pt", device: str = "auto", dtype: str = "auto", record: bool = False
    ):
        if dtype not in get_args(Dtype):
            raise ConfigError(f"dtype: found {dtype!r}, must be one of {', '.join(get_args(Dtype))}")
        machine = find_machine(device, dtype, trains=False)
        path = Path(checkpoint_path)
        if path.suffix == ".pt" and not os.path.exists(path):
            raise checkpoint.not_found(path, _advice())
        model, tokenizer, content = checkpoint.load_model(path, machine.device, machine.dtype)
        prepack_matrices(model)
        self._take(path, content, model, tokenizer, machine, record)

    @classmethod
    def of_model(
        cls, model: GPT, tokenizer: Tokenizer, machine: Machine, excerpts: dict[str, list[int]] | None = None
    ) -> Self:
        """A poet of a model in memory, on the machine's device: it stays as it is and can be trained on.

        excerpts: style -> ids, as a checkpoint has them. The poet has neither a checkpoint nor a training text: what
        needs one, as max_copy does, raises an error that says so.
        """
        poet = cls.__new__(cls)
        poet._take(Path("a model in memory"), {"excerpts": excerpts or {}}, model, tokenizer, machine, record=False)
        return poet

    def _take(
        self, path: Path, content: dict[str, Any], model: GPT, tokenizer: Tokenizer, machine: Machine, record: bool
    ) -> None:
        self.path, self.model, self.tokenizer, self.machine, self.record = path, model, tokenizer, machine, record
        self.dataset, self.text_sha256 = content.get("config", {}).get("dataset", ""), content.get("text_sha256", "")
        self.identity = content.get("identity", {})
        self.styles = styles(tokenizer)
        self.excerpts = {self.styles.get(style): ids for style, ids in content.get("excerpts", {}).items()}
        forbidden = [id for name, id in tokenizer.specials.items() if name != END]
        forbidden += range(tokenizer.vocab_size, model.config.vocab_size)  # nanoGPT's padding
        self._copies: dict[tuple[int, bool], Copies] = {}
        self.forbidden = torch.tensor(forbidden, dtype=torch.long, device=machine.device)
        self.characters = find_characters(tokenizer, model.config.vocab_size, machine.device)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the checkpoint, or of the weights in its folder, in hexadecimal; raises CheckpointError."""
        path = self.path if self.path.exists() else pretrained.locate(str(self.path))  # it is here by now
        return checkpoint.weights_sha256(path)

    @functools.cached_property
    def originality(self) -> Originality:
        """An index of the text that the model was trained on; raises DataError when that is not available."""
        if not self.text_sha256:
            raise DataError(f"{self.path}: does not say which text it was trained on, so nothing can be checked")
        return Originality(find_dataset(self.dataset), self.text_sha256, self.identity)

    @functools.cached_property
    def _healing(self) -> Healing:
        assert isinstance(self.tokenizer, BPETokenizer)
        return Healing(self.tokenizer)

    def windows(self, prompt: Prompt, blend: dict[int, float]) -> list[list[int]]:
        """The ids that the model reads of a prompt, a row for each style in the blend, with its tag in front.

        A model that was tuned on a text first reads an excerpt of it, in half of its context: so it knows whose voice
        is to go on, from the first word.
        """
        tags = list(blend) or [None]
        excerpts = [self.excerpts.get(tag, ()) if prompt.is_text else () for tag in tags]
        n = max(min(self.model.config.block_size // 2 - len(prompt.read), *map(len, excerpts)), 0)
        ids = prompt.read
        if n:  # then no line's end need stand for a beginning
            ids = prompt.ids[: len(prompt.ids) - len(prompt.own)] if prompt.text else []
        rows = [[*excerpt[len(excerpt) - n :], *ids] for excerpt in excerpts]
        return [[tag, *row] for tag, row in zip(blend, rows, strict=True)] if blend else rows

    @torch.inference_mode()
    def rest(self, prompt: Prompt, blend: dict[int, float]) -> Rest | None:
        """What a text that continues `prompt` in this blend of styles writes of it first."""
        if not prompt.own:
            return None
        odds, later = [0.0] * (len(prompt.own) - 1), prompt.own[:-1]
        windows = [[*row, *later] for row in self.windows(prompt, blend)]
        if start := window_start(len(windows[0]), self.model.config):
            windows = [[*row[: bool(blend)], *row[start + bool(blend) :]] for row in windows]
        if 0 < len(later) <= len(windows[0]):
            hidden = self.model.hidden_states(torch.tensor(windows, device=self.machine.device))[:, -len(later) :]
            weights = torch.tensor(list(blend.values()) or [1.0], device=self.machine.device)
            logits = self.model.lm_head(hidden).transpose(0, 1).flatten(0, 1)  # (k * S, V), the styles side by side
            odds = self._healing.odds(prompt.own, blended(logits, weights).log_softmax(-1))
        return Rest(self._healing, prompt.own, odds)

    def copied(self, settings: Settings, prompt: str) -> Copied | None:
        """What a passage that continues `prompt` would copy; None without max_copy.

        Raises DataError when the training text is not available.
        """
        if not settings.max_copy:
            return None
        key = settings.max_copy, bool(settings.stop)
        if key not in self._copies:
            self._copies[key] = Copies(self.originality, self.tokenizer, *key)
        return Copied(self._copies[key], prompt)

    def sampler(self, texts: list[SampledText]) -> Sampler:
        """A sampler of these texts, for the model's logits."""
        dtype = torch.promote_types(self.machine.dtype, torch.float32)
        return Sampler(texts, self.forbidden, self.characters, dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # generating

    def write(self, prompt: str = "", n: int = 1, **settings: Any) -> list[str]:
        """`n` passages that continue `prompt`, each with the prompt in front; `settings` are the fields of Settings.

        Raises ConfigError as begin() does.
        """
        passages = self.begin(prompt, n, **settings)
        for _ in self.stream(passages):
            pass
        return [passage.prompt + passage.text for passage in passages]

    def begin(self, prompt: str = "", n: int = 1, first: int = 0, heals: bool = True, **settings: Any) -> list[Passage]:
        """`n` empty passages (at most 10,000) for stream() to continue `prompt` with.

        first: the number of the first passage's random stream; the others follow. heals: let the model write the
        prompt's last word, see heal(). Raises ConfigError if a setting is unknown, has the wrong type or is out of
        range, if the model lacks the style, if the prompt is not text, is over ten million characters long or has no
        character that the model knows, or if the passages don't fit in memory; DataError if max_copy needs a training
        text that is not there.
        """
        for name, value, low, high in (("n", n, 1, MAX_PASSAGES), ("first", first, 0, 2**53)):
            if not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}: found {value!r}, must be a whole number from {low} to {high}")
        checked = make_settings(settings)
        rows = n * max(len(self.blend_of(checked.style)), 1)
        read = self.read(prompt, heals)
        self._check_memory(rows)
        if checked.max_copy:
            _ = self.originality
        return [Passage(self.tokenizer, checked, read.text, first + i, read.rest) for i in range(n)]

    def stream(self, passages: list[Passage], logprobs: bool = False) -> Iterator[list[str]]:
        """Generate the passages that one begin() returned; yields the text that each one gains, token by token.

        logprobs: keep each token's log-probability too. Raises ConfigError unless all passages come from one begin().
        """
        if len({(p.settings, p.prompt, p.rest) for p in passages}) != 1:
            raise ConfigError(f"passages: found {len(passages)}, must all come from one begin()")
        settings, device = passages[0].settings, self.machine.device
        blend = self.blend_of(settings.style)
        prompt = self.read(passages[0].prompt, bool(passages[0].rest))
        windows = self.windows(prompt, blend)
        start = window_start(len(windows[0]), self.model.config)  # the model reads only a long prompt's end
        windows = [row[start:] for row in windows]
        idx = torch.tensor(windows * len(passages), device=device)
        tags = torch.tensor(list(blend) * len(passages), device=device) if blend else None
        weights, copied = list(blend.values()) or [1.0], self.copied(settings, prompt.before)
        ids = [*list(blend)[:1], *prompt.read]
        first = SampledText(settings, passages[0].number, ids, weights, copied, self.rest(prompt, blend))
        sampler = self.sampler([first.fork(passage.number) for passage in passages])
        batch = Batch(passages, sampler, logprobs)
        most = settings.max_new_tokens + len(prompt.rest)
        steps = generate(self.model, idx, most, sampler, tags, self.record)
        rows = None  # the rows to keep for the next step; None keeps all
        while True:
            yield batch.push(steps.send(rows))
            if batch.is_done:
                return
            rows = batch.drop_done()

    # -----------------------------------------------------------------------------------------------------------------
    # styles and checks

    def blend_of(self, style: str) -> dict[int, float]:
        """The tag id and weight of each style in `style`, such as shakespeare:0.7,alice:0.3; weights add up to 1.

        Empty for no style. Raises ConfigError if the model lacks a style or a share is not within 1e-6 to 1e6.
        """
        if style and not self.styles:
            raise ConfigError(f"style: found {style[:100]!r}, but this model was trained without styles; leave it out")
        shares: dict[int, float] = {}
        for part in style.split(",") if style else ():
            name, _, share = part.strip().partition(":")
            if name not in self.styles:
                known, near = ", ".join(self.styles) or "none", did_you_mean(name, self.styles)
                raise ConfigError(f"style: found {name[:100]!r}, must be one of the model's: {known}{near}")
            try:
                shares[self.styles[name]] = float(share or 1)
            except ValueError:
                shares[self.styles[name]] = 0.0
            if not 1e-6 <= shares[self.styles[name]] <= 1e6:
                raise ConfigError(
                    f"style: found {part[:100]!r}, must be NAME or NAME:SHARE, its share from a millionth to a million"
                )
        total = sum(shares.values())
        return {tag: share / total for tag, share in shares.items()}

    def unknown(self, prompt: str) -> str:
        """A warning that names the characters in `prompt` that the tokenizer does not know; "" if it knows them all."""
        if not (unknown := self.tokenizer.unknown(prompt)):
            return ""
        fate = f"taken as {UNKNOWN}" if UNKNOWN in self.tokenizer.specials else "left out"
        return f"prompt: the model does not know {', '.join(map(repr, unknown))}: {fate}"

    def read(self, prompt: str, heals: bool = True) -> Prompt:
        """A prompt with LF line ends, as ids, and as the model reads it.

        Without a prompt the ids are those of a line's end, or id 0 if the vocabulary has none. heals: let the model
        write the last word, see heal(). Raises ConfigError if it is not text, is too long, begins with a style's tag,
        which would be read as text, or has no character that the model knows.
        """
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            found = f"{len(prompt):,} characters" if isinstance(prompt, str) else repr(prompt)[:100]
            raise ConfigError(f"prompt: found {found}, must be a text of at most {MAX_PROMPT:,}")
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise ConfigError(f"prompt: character {e.start} is a lone surrogate, which UTF-8 can't encode") from None
        if style := next((name for name in self.styles if prompt.startswith(style_token(name))), ""):
            tag = style_token(style)
            raise ConfigError(
                f"prompt: begins with {tag}, as exported models have it; leave it out, set style to {style}"
            )
        text = plain(prompt)
        if (ids := self.tokenizer.encode(text or "\n")) or not text:
            ids = ids or [0]
            healed = heal(self.tokenizer, text, ids) if heals else Prompt(text, ids, ids)
            return healed._replace(is_text=True)
        raise ConfigError(f"prompt: found {prompt[:100]!r}, must have a character that the model knows")

    def _check_memory(self, rows: int) -> None:
        c = self.model.config
        need = rows * 2 * c.n_layer * c.block_size * c.kv_heads * c.head_size * self.machine.dtype.itemsize
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.machine.device.type == "cpu" and need > have:
            raise ConfigError(
                f"num_samples: the keys and values of {rows:,} rows take {need / 2**30:,.0f} GB, and this machine has "
                f"{have / 2**30:,.0f} GB; generate fewer passages at a time"
            )


def _advice() -> str:
    """What to do about a missing checkpoint."""
    if found := sorted(map(str, [*Path("out").glob("*/best.pt")] or HOME.glob("out/*/best.pt"))):
        return f"there {'are' if len(found) > 1 else 'is'} {', '.join(found[:10])}; try: python sample.py {found[0]}"
    return f"train one first: make poem, in {HOME}, trains the demo"

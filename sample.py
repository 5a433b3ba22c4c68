"""Let a trained model write: once, in batches, or at a prompt of its own.

python sample.py --checkpoint=out/demo/best.pt --prompt="To be or not to be" --style=shakespeare
python sample.py out/demo/best.pt --interactive

from sample import Poet
Poet("out/demo/best.pt").write("O Romeo", n=3)
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch

import configurator
from configurator import ConfigError, bounds
from robopoet import untrusted
from robopoet.errors import CheckpointError, DataError
from robopoet.machine import find_machine
from robopoet.text.batches import find_dataset
from robopoet.text.tokenizer import END, UNKNOWN, styles
from robopoet.weights import checkpoint, huggingface
from robopoet.writing.generate import generate, prepack, window_start
from robopoet.writing.originality import Originality
from robopoet.writing.passage import Passage, SavedSettings, Settings, make_settings
from robopoet.writing.sampler import Sampler

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
MAX_PASSAGES = 10_000  # written together
MAX_PROMPT = 10 * 2**20  # bytes of a file, characters of a text


@dataclass(frozen=True)
class SampleConfig(Settings):
    """The keys of sample.py."""

    # input and output
    checkpoint: str = "out/demo/best.pt"  # the model: ours, nanoGPT's, or a Hugging Face folder or name, as gpt2
    prompt: str = ""  # text to go on from, FILE:path, or - for stdin; \n is a line end
    num_samples: int = 1  # passages, written together
    interactive: bool = False  # prompt again and again; /help there
    check: bool = False  # tell how much of each passage is copied from the training text
    save: str = ""  # append each passage to this file, a line of JSON, with all it takes to write it again
    replay: str = ""  # instead, write the passages of such a file again, and compare
    export: str = ""  # write the model, too, to this new folder, as Hugging Face's transformers read it
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Dtype = "auto"  # of weights; auto: the fastest
    record: bool = False  # replay each token's step as a CUDA graph: faster, but not yet proven on a GPU

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = super().problems() + bounds(self, "num_samples", 1, MAX_PASSAGES)
        modes = {"replay": "interactive prompt num_samples check save export"}
        modes["interactive"] = "prompt num_samples check save export"
        for mode, unread in modes.items():
            given = [key for key in unread.split() if getattr(self, key) != getattr(SampleConfig, key)]
            if getattr(self, mode) and given:
                found.append(f"{mode}: takes no {', '.join(given)}; leave it out")
        return found


class Poet:
    """A model with its tokenizer, ready to write.

    checkpoint_path: a .pt file, a folder of Hugging Face's or a name on its Hub. record: replay a token's step as a
    CUDA graph. Raises CheckpointError when it can't be read, ConfigError for a device not here.
    """

    def __init__(
        self, checkpoint_path: str = "out/demo/best.pt", device: str = "auto", dtype: str = "auto", record: bool = False
    ):
        if dtype not in get_args(Dtype):
            raise ConfigError(f"dtype: found {dtype!r}, must be one of {', '.join(get_args(Dtype))}")
        self.machine = find_machine(device, dtype)
        self.path, self.record = Path(checkpoint_path), record
        if self.path.suffix == ".pt" and not os.path.exists(self.path):
            raise CheckpointError(f"{self.path}: not found; {_models()}")
        self.model, self.tokenizer, content = checkpoint.load_model(self.path, self.machine.device, self.machine.dtype)
        prepack(self.model)
        self.dataset, self.text_sha256 = content.get("config", {}).get("dataset", ""), content.get("text_sha256", "")
        self.styles = styles(self.tokenizer)
        end = self.tokenizer.specials.get(END)
        forbidden = [id for id in self.tokenizer.specials.values() if id != end]
        forbidden += range(self.tokenizer.vocab_size, self.model.config.vocab_size)  # nanoGPT's padding
        self.forbidden = torch.tensor(forbidden, dtype=torch.long, device=self.machine.device)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the checkpoint, or of the weights in its folder, in hexadecimal; raises CheckpointError."""
        path = self.path if self.path.exists() else huggingface.fetch(str(self.path))  # the Hub's are here already
        return checkpoint.sha256(path)

    def write(self, prompt: str = "", n: int = 1, **settings: Any) -> list[str]:
        """`n` passages that go on from `prompt`, each with the prompt before it; `settings` are those of Settings.

        Raises ConfigError, as begin() does.
        """
        passages = self.begin(prompt, n, **settings)
        for _ in self.stream(passages):
            pass
        return [prompt + passage.text for passage in passages]

    def begin(self, prompt: str = "", n: int = 1, first: int = 0, **settings: Any) -> list[Passage]:
        """`n` passages, 10,000 at most, that will go on from `prompt`; `first` numbers the first one's random stream.

        Raises ConfigError when a setting is unknown, of another type or out of range, the style is not one of the
        model's, the prompt is not text, has over ten million characters or none that the model knows, or so many
        passages find no place in memory.
        """
        for name, value, low, high in (("n", n, 1, MAX_PASSAGES), ("first", first, 0, 2**53)):
            if not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}: found {value!r}, must be a whole number from {low} to {high}")
        chosen = make_settings(settings)
        rows = n * max(len(self.blend_of(chosen.style)), 1)
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            found = f"{len(prompt):,} characters" if isinstance(prompt, str) else repr(prompt)[:100]
            raise ConfigError(f"prompt: found {found}, must be a text of at most {MAX_PROMPT:,}")
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise ConfigError(f"prompt: character {e.start} is half a surrogate pair, which is not text") from None
        if not self.tokenizer.encode(prompt or "\n"):
            raise ConfigError(f"prompt: found {prompt[:100]!r}, must have a character that the model knows")
        self._check_memory(rows)
        return [Passage(self.tokenizer, chosen, prompt, first + i) for i in range(n)]

    def _check_memory(self, rows: int) -> None:
        c = self.model.config
        need = rows * 2 * c.n_layer * c.block_size * c.n_embd * self.machine.dtype.itemsize
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.machine.device.type == "cpu" and need > have:
            raise ConfigError(
                f"num_samples: the keys and values of {rows:,} rows take {need / 2**30:,.0f} GB, and this machine has "
                f"{have / 2**30:,.0f} GB; write fewer passages at a time"
            )

    def stream(self, passages: list[Passage], logprobs: bool = False) -> Iterator[list[str]]:
        """Write passages that one begin() gave; yields what each of them gains, token by token.

        logprobs: keep those of each passage's tokens, too. Raises ConfigError for passages of several begin().
        """
        if not passages or any((p.settings, p.prompt) != (passages[0].settings, passages[0].prompt) for p in passages):
            raise ConfigError(f"passages: found {len(passages)}, must be those of one begin()")
        chosen, prompt = passages[0].settings, passages[0].prompt
        blend = self.blend_of(chosen.style)
        heads = [[tag] for tag in blend] or [[]]  # a passage has a row for each of the styles it blends
        ids = self.tokenizer.encode(prompt or "\n")
        rows = [(head + ids)[window_start(len(head + ids), self.model.config.block_size) :] for head in heads]
        idx = torch.tensor(rows * len(passages), device=self.machine.device)
        tags = torch.tensor(list(blend) * len(passages), device=self.machine.device) if blend else None
        numbers, weights = [passage.number for passage in passages], list(blend.values()) or [1.0]
        choose = Sampler(chosen, self.forbidden, numbers, weights, heads[0] + ids, logprobs)
        writing = generate(self.model, idx, chosen.max_new_tokens, choose, tags, self.record)
        written, going = list(range(len(passages))), None  # the passages that the model's rows are
        with contextlib.suppress(StopIteration):
            while True:
                ids = writing.send(going)[:: len(heads)].tolist()
                nats = choose.logprobs.tolist() if logprobs else ids
                pieces = [""] * len(passages)
                for i, id, logprob in zip(written, ids, nats, strict=True):
                    if logprobs and not passages[i].done:
                        passages[i].logprobs.append(logprob)
                    pieces[i] = passages[i].push(id)
                yield pieces
                left = [at for at, i in enumerate(written) if not passages[i].done]
                if not left:
                    return
                going = None
                # what is done is dropped, on CUDA with half of all: with other rows the step is recorded anew
                if len(left) < len(written) and (self.machine.device.type == "cpu" or 2 * len(left) <= len(written)):
                    written = [written[at] for at in left]
                    choose.keep(left)
                    going = torch.tensor([at * len(heads) + head for at in left for head in range(len(heads))])
                    going = going.to(idx.device)
        yield [passage.finish() for passage in passages]

    @functools.cached_property
    def originality(self) -> Originality:
        """The text that the model was trained on, to be searched; raises DataError when it is not at hand."""
        if not self.text_sha256:
            raise DataError(f"{self.path}: does not say which text it was trained on, so nothing can be checked")
        return Originality(find_dataset(self.dataset), self.text_sha256)

    def blend_of(self, style: str) -> dict[int, float]:
        """The ids of the styles in `style` and their shares, as shakespeare:0.7,alice:0.3 has two; empty for no style.

        Raises ConfigError when the model has no such style or a share is not from a millionth to a million.
        """
        if style and not self.styles:
            raise ConfigError(f"style: found {style[:100]!r}, but a model of one work has no tags; leave style out")
        shares: dict[int, float] = {}
        for part in style.split(",") if style else ():
            name, _, share = part.strip().partition(":")
            if name not in self.styles:
                known = ", ".join(self.styles) or "none"
                raise ConfigError(f"style: found {name[:100]!r}, must be one of the model's: {known}")
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
        """What to tell a user whose prompt has characters the tokenizer doesn't know; empty if it has none."""
        if not (unknown := self.tokenizer.unknown(prompt)):
            return ""
        fate = f"taken as {UNKNOWN}" if UNKNOWN in self.tokenizer.specials else "left out"
        return f"prompt: the model does not know {', '.join(map(repr, unknown))}: {fate}"


def _models() -> str:
    """What to do for want of a model."""
    if found := sorted(map(str, Path("out").glob("*/best.pt"))):
        return f"there {'are' if len(found) > 1 else 'is'} {', '.join(found[:10])}; as: python sample.py {found[0]}"
    return "train one first: make poem trains the demo"


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def read_prompt(prompt: str) -> str:
    """The text that the key `prompt` stands for; raises ConfigError when its file is not UTF-8 text of 10 MB at most.

    Every line end, as \\r\\n, is a \\n.
    """
    if prompt.startswith("FILE:"):
        raw, where = untrusted.read_bytes(Path(prompt[5:]), ConfigError, MAX_PROMPT), prompt[5:]
    elif prompt == "-":
        raw, where = sys.stdin.buffer.read(MAX_PROMPT + 1), "stdin"
        if len(raw) > MAX_PROMPT:
            raise ConfigError(f"prompt: stdin has more than {MAX_PROMPT:,} bytes")
    else:
        return unescape(prompt)
    try:
        return io.StringIO(raw.decode(), newline=None).read()
    except UnicodeDecodeError as e:
        raise ConfigError(f"prompt: {where}: byte {e.start} is not UTF-8") from None


def unescape(text: str) -> str:
    """Let \\n and \\t stand for a line end and a tab, which a shell makes hard to type."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def tell(
    poet: Poet, passages: list[Passage], stream: Iterator[list[str]], check: bool = False, after: bool = False
) -> None:
    """Print what passages become in `stream`: one as it is written, several when they are whole.

    check: and how original each is. after: the prompt stands there already.
    """
    prompt = "" if after else passages[0].prompt
    if not after and (problem := poet.unknown(prompt)):
        configurator.warn(problem)
    if len(passages) == 1:
        print(prompt, end="", flush=True)
        for pieces in stream:
            print(pieces[0], end="", flush=True)
        print()
    else:
        for _ in stream:
            pass
    for passage in passages:
        if len(passages) > 1:
            print(prompt + passage.text)
        if check:
            print(f"\n{poet.originality.check(passage.text).describe()}")
        if len(passages) > 1:
            print("-" * 15)


# ---------------------------------------------------------------------------------------------------------------------
# saved passages


@dataclass(frozen=True)
class Saved:
    """A line of a file of saved passages: all it takes to write one again, and what it then must be."""

    checkpoint: str
    sha256: untrusted.Sha256  # the checkpoint's
    torch: str
    device: str
    dtype: Dtype
    settings: SavedSettings
    prompt: str
    first: untrusted.Count  # the number of the first of those that were written together
    together: untrusted.Positive  # how many they were
    number: untrusted.Count
    text: str
    ids: tuple[untrusted.Count, ...]

    def source(self) -> tuple[str, str, str]:
        """What Poet is made of."""
        return self.checkpoint, self.device, self.dtype

    def company(self) -> tuple[Any, ...]:
        """What those that were written together have in common."""
        return *self.source(), self.sha256, self.settings, self.prompt, self.first, self.together


def check_save(path: Path) -> None:
    """Raise ConfigError unless `path` can be appended to."""
    if _exists("save", path):
        if not path.is_file() or not os.access(path, os.W_OK):
            raise ConfigError(f"save: {path} can't be written to; name another file")
    else:
        _check_folder("save", path)


def check_export(folder: Path) -> None:
    """Raise CheckpointError if `folder` exists, ConfigError if it can't be made."""
    if _exists("export", folder):
        raise CheckpointError(f"export: {folder} exists; choose another folder, or remove it")
    _check_folder("export", folder)


def _exists(key: str, path: Path) -> bool:
    try:
        return path.exists()
    except OSError as e:
        raise ConfigError(f"{key}: {str(path)[:100]}: {e.strerror}") from None


def _check_folder(key: str, path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {path} can't be made: {parent} is no folder that can be written to")


def save(path: Path, poet: Poet, passages: list[Passage]) -> None:
    """Append to `path` a line of JSON for each passage of those written together, a Saved: all of them or none."""
    about = {"checkpoint": str(poet.path), "sha256": poet.sha256, "torch": torch.__version__}
    about |= {"device": poet.machine.device.type, "dtype": str(poet.machine.dtype)[6:]}
    about |= {"settings": dataclasses.asdict(passages[0].settings), "prompt": passages[0].prompt}
    about |= {"first": passages[0].number, "together": len(passages)}
    lines = []
    for p in passages:
        tokens = {"ids": p.ids.tolist(), "logprobs": p.logprobs.tolist()}
        lines.append(json.dumps({"number": p.number, "text": p.text} | tokens | about))
    end = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as f:
            f.write("".join(f"{line}\n" for line in lines).encode())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, end)
        raise


def read_saved(path: Path) -> Iterator[list[tuple[int, Saved]]]:
    """The passages of a file, those written together in one list, each with its line number.

    Raises ConfigError for a line that is none, or does not fit those beside it.
    """
    lines = (
        (number, untrusted.decode_json(line, Saved, f"{path}: line {number}", ConfigError, "it is no saved passage"))
        for number, line in untrusted.read_lines(path, ConfigError)
    )
    for _, company in itertools.groupby(lines, lambda numbered: numbered[1].company()):
        group = list(company)
        for line, saved in group:
            if not saved.first <= saved.number < saved.first + saved.together:
                raise ConfigError(
                    f"{path}: line {line}: number is {saved.number}, but it was written together with "
                    f"{saved.together} from {saved.first} on; it is no saved passage"
                )
        yield group


def replay(path: Path) -> None:
    """Write the passages of a file again; raises ConfigError naming the first line that comes out otherwise."""
    count = sum(len(group) for group in read_saved(path))  # the whole file is read before anything is written
    source = None
    for group in read_saved(path):
        line, saved = group[0]
        try:
            if saved.source() != source:
                source = saved.source()
                poet = Poet(*source)
            if saved.sha256 != poet.sha256:
                raise ConfigError(f"was written by another {saved.checkpoint}; find that one again")
            settings = msgspec.structs.asdict(saved.settings)
            passages = poet.begin(saved.prompt, saved.together, saved.first, **settings)
        except (ConfigError, DataError, CheckpointError) as e:
            raise type(e)(f"{path}: line {line}: {untrusted.describe(e)}") from None
        tell(poet, passages, as_saved(poet.stream(passages), passages, group, path))
    if not count:
        raise ConfigError(f"{path}: holds no saved passage")
    print(f"{path}: {count} passages, each as it was")


def as_saved(
    stream: Iterator[list[str]], passages: list[Passage], group: list[tuple[int, Saved]], path: Path
) -> Iterator[list[str]]:
    """What `stream` yields, as long as each token is the one that was saved; else raises ConfigError."""
    pairs = [(passages[saved.number - saved.first], saved, line) for line, saved in group]
    for pieces in stream:
        for found, saved, line in pairs:
            n = len(found.ids)
            if n > len(saved.ids) or found.ids[-1] != saved.ids[n - 1]:
                raise _differs(saved, line, path)
        yield pieces
    for found, saved, line in pairs:
        if len(found.ids) != len(saved.ids) or found.text != saved.text:
            raise _differs(saved, line, path)


def _differs(saved: Saved, line: int, path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: line {line} comes out otherwise with torch {torch.__version__}; it was written with torch "
        f"{saved.torch}, in {saved.dtype} on {saved.device}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# the session

COMMANDS = {
    "/style": "style",
    "/temp": "temperature",
    "/topk": "top_k",
    "/topp": "top_p",
    "/minp": "min_p",
    "/rep": "repetition_penalty",
    "/ngram": "no_repeat_ngram",
    "/tokens": "max_new_tokens",
    "/until": "until",
    "/seed": "seed",
}
HELP = f"""{" VALUE, ".join(COMMANDS)} VALUE
/more goes on, /again writes another, /check tells what is copied, /save FILE keeps the last passage, /settings
/quit, quit or exit ends
anything else is a prompt (\\n: line end); Ctrl-C ends a passage"""


class Session:
    """Prompts again and again: passages stream, commands change settings or take up the last passage."""

    def __init__(self, poet: Poet, settings: Settings):
        self.poet, self.settings, self.written = poet, settings, 0
        self.last: list[Passage] = []

    def run(self) -> None:
        """Ask until /quit, quit, exit or end of input; Ctrl-C ends a passage. Raises ConfigError for no UTF-8."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its history and line editing)
        print("Type a prompt, or /help.")
        while True:
            try:
                line = input("> ")
            except EOFError:
                return print()
            except UnicodeDecodeError as e:
                raise ConfigError(f"stdin: byte {e.start} is not UTF-8") from None
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() in ("/quit", "/exit", "quit", "exit"):
                return None
            try:
                self.do(line)
            except (ConfigError, DataError, CheckpointError, OSError) as e:
                print(e)
            except KeyboardInterrupt:
                print()

    def do(self, line: str) -> None:
        """Obey one line; raises ConfigError when it can't be done."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/more", "/again", "/check", "/save") and not self.last:
            raise ConfigError(f"{command}: there is no passage yet; type a prompt")
        if not line.startswith("/"):
            self.write(unescape(line))
        elif command in COMMANDS:
            changed = configurator.change(self.settings, COMMANDS[command], argument)
            self.poet.blend_of(changed.style)
            self.settings = changed
            self.written = 0 if command == "/seed" else self.written
        elif command == "/more":
            self.write(self.last[0].prompt + self.last[0].text, after=True)
        elif command == "/again":
            self.write(self.last[0].prompt)
        elif command == "/check":
            print(self.poet.originality.check(self.last[0].text).describe())
        elif command == "/save":
            if not argument:
                raise ConfigError("/save: name a file, as /save passages.jsonl")
            check_save(Path(argument))
            save(Path(argument), self.poet, self.last)
        elif command == "/settings":
            print("\n".join(f"{key}: {value!r}" for key, value in dataclasses.asdict(self.settings).items()))
        else:
            print(HELP)
            print(f"styles: {', '.join(self.poet.styles) or 'none'}")

    def write(self, prompt: str, after: bool = False) -> None:
        """Write on from `prompt`, with a random stream of its own."""
        passages = self.poet.begin(prompt, 1, self.written, **dataclasses.asdict(self.settings))
        self.written += 1
        self.last = passages
        tell(self.poet, passages, self.poet.stream(passages, logprobs=True), after=after)


def main(cfg: SampleConfig) -> None:
    """Write what `cfg` asks for."""
    if cfg.replay:
        return replay(Path(cfg.replay))
    # what can be told now is told before anything is written
    if cfg.save:
        check_save(Path(cfg.save))
    if cfg.export:
        check_export(Path(cfg.export))
    prompt = read_prompt(cfg.prompt)
    poet = Poet(cfg.checkpoint, cfg.device, cfg.dtype, cfg.record)
    if cfg.save:
        _ = poet.sha256
    if cfg.check:
        _ = poet.originality
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**values | {"stop": tuple(map(unescape, cfg.stop))})
    if cfg.interactive:
        return Session(poet, settings).run()
    passages = poet.begin(prompt, cfg.num_samples, **dataclasses.asdict(settings))
    tell(poet, passages, poet.stream(passages, logprobs=bool(cfg.save)), cfg.check)
    if cfg.save:
        save(Path(cfg.save), poet, passages)
    if cfg.export:
        loaded = checkpoint.load_model(Path(cfg.checkpoint), torch.device("cpu"), torch.float32)
        huggingface.export(*loaded, prompt + passages[0].text, Path(cfg.export))
        print(f"{cfg.export}: AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it")
    return None


if __name__ == "__main__":
    configurator.launch(main, SampleConfig, DataError, CheckpointError, positional="checkpoint")

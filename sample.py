"""Let a trained model write: once, in batches, or at a prompt of its own.

python sample.py --checkpoint=out/demo/best.pt --prompt="To be or not to be" --style=shakespeare
python sample.py out/demo/best.pt --interactive

from sample import Poet
Poet("out/demo/best.pt").write("O Romeo", n=3)
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import checkpoint
import configurator
from checkpoint import CheckpointError
from choose import Chooser
from configurator import ConfigError, bounds
from data import DataError
from data.batches import find_dataset
from data.tokenizer import END, UNKNOWN, styles
from originality import Originality
from passage import Passage, Settings


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
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of weights; auto: the fastest
    record: bool = False  # replay each token's step as a CUDA graph: faster, but not yet proven on a GPU

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "num_samples", 1)


class Poet:
    """A model with its tokenizer, ready to write.

    checkpoint_path: a .pt file. Raises CheckpointError when it can't be read, ConfigError for a device not here.
    """

    def __init__(
        self, checkpoint_path: str = "out/demo/best.pt", device: str = "auto", dtype: str = "auto", record=False
    ):
        self.machine = configurator.find_machine(device, dtype)
        self.path, self.record = Path(checkpoint_path), record
        self.model, self.tokenizer, content = checkpoint.load_model(self.path, self.machine.device, self.machine.dtype)
        self.model.prepack()
        self.dataset, self.text_sha256 = content.get("config", {}).get("dataset", ""), content.get("text_sha256", "")
        self.styles = styles(self.tokenizer)
        end = self.tokenizer.specials.get(END)
        forbidden = [id for id in self.tokenizer.specials.values() if id != end]
        forbidden += range(self.tokenizer.vocab_size, self.model.config.vocab_size)  # nanoGPT's padding
        self.forbidden = torch.tensor(forbidden, dtype=torch.long, device=self.machine.device)

    def write(self, prompt: str = "", n: int = 1, **settings: Any) -> list[str]:
        """`n` passages that go on from `prompt`, each with the prompt before it; `settings` are those of Settings."""
        passages = self.begin(prompt, n, **settings)
        for _ in self.stream(passages):
            pass
        return [prompt + passage.text for passage in passages]

    def begin(self, prompt: str = "", n: int = 1, first: int = 0, **settings: Any) -> list[Passage]:
        """`n` passages that will go on from `prompt`; `first` numbers the first one's random stream.

        Raises ConfigError when a setting is out of range, the style is not one of the model's, or no prompt is left.
        """
        chosen = Settings(**settings)
        if problems := chosen.problems():
            raise ConfigError("; ".join(problems))
        self.blend_of(chosen.style)
        if not self.tokenizer.encode(prompt or "\n"):
            raise ConfigError(f"prompt: found {prompt!r}, must have a character that the model knows")
        return [Passage(self.tokenizer, chosen, prompt, first + i) for i in range(n)]

    def stream(self, passages: list[Passage], logprobs: bool = False) -> Iterator[list[str]]:
        """Write passages that begin() gave; yields what each of them gains, token by token.

        logprobs: keep those of each passage's tokens, too.
        """
        chosen, prompt = passages[0].settings, passages[0].prompt
        blend = self.blend_of(chosen.style)
        heads = [[tag] for tag in blend] or [[]]  # a passage has a row for each of the styles it blends
        rows = [head + self.tokenizer.encode(prompt or "\n") for head in heads]
        idx = torch.tensor(rows * len(passages), device=self.machine.device)
        tags = torch.tensor(list(blend) * len(passages), device=self.machine.device) if blend else None
        numbers = range(passages[0].number, passages[0].number + len(passages))
        choose = Chooser(chosen, self.forbidden, numbers, list(blend.values()) or [1.0], logprobs)
        writing = self.model.generate(idx, chosen.max_new_tokens, choose, tags, self.record)
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

        Raises ConfigError when the model has no such style or a share is not a number above 0.
        """
        shares: dict[int, float] = {}
        for part in style.split(",") if style else ():
            name, _, share = part.strip().partition(":")
            if name not in self.styles:
                known = ", ".join(self.styles) or "none"
                raise ConfigError(f"style: found {name!r}, must be one of the model's: {known}")
            try:
                shares[self.styles[name]] = float(share or 1)
            except ValueError:
                shares[self.styles[name]] = 0.0
            if not 0 < shares[self.styles[name]] < float("inf"):
                raise ConfigError(f"style: found {part!r}, must be NAME or NAME:SHARE, its share a number above 0")
        total = sum(shares.values())
        return {tag: share / total for tag, share in shares.items()}

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


def tell(poet: Poet, passages: list[Passage], logprobs: bool = False, check: bool = False, after: bool = False) -> None:
    """Print what passages that begin() gave become: one as it is written, several when they are whole.

    check: and how original each is. after: the prompt stands there already.
    """
    prompt = "" if after else passages[0].prompt
    if not after and (problem := poet.unknown(prompt)):
        configurator.warn(problem)
    stream = poet.stream(passages, logprobs)
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


def save(path: Path, poet: Poet, passages: list[Passage]) -> None:
    """Append to `path` a line of JSON for each passage of those written together: all it takes to write it again."""
    about = {"checkpoint": str(poet.path), "sha256": checkpoint.sha256(poet.path), "torch": torch.__version__}
    about |= {"device": poet.machine.device.type, "dtype": str(poet.machine.dtype)[6:]}
    about |= {"settings": dataclasses.asdict(passages[0].settings), "prompt": passages[0].prompt}
    about |= {"first": passages[0].number, "together": len(passages)}
    lines = []
    for p in passages:
        lines.append(json.dumps({"number": p.number, "text": p.text, "ids": p.ids, "logprobs": p.logprobs} | about))
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(f"{line}\n" for line in lines))


def replay(path: Path) -> None:
    """Write the passages of a file again; raises ConfigError naming the first line that comes out otherwise."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append({"line": number} | json.loads(line))
            if missing := set(REPLAYED) - records[-1].keys():
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except (ValueError, TypeError) as e:
            raise ConfigError(f"{path}: line {number} is not a saved passage ({e})") from None
    for (source, device, dtype), group in itertools.groupby(records, lambda r: [r[key] for key in REPLAYED[:3]]):
        poet = Poet(source, device, dtype)
        sha256 = checkpoint.sha256(poet.path)
        for _, together in itertools.groupby(group, lambda r: [r[key] for key in REPLAYED[3:8]]):
            saved = list(together)
            first = saved[0]
            if first["sha256"] != sha256:
                raise ConfigError(f"{path}: line {first['line']} was written by another {source}; find that one again")
            settings = first["settings"] | {"stop": tuple(first["settings"]["stop"])}
            passages = poet.begin(first["prompt"], first["together"], first["first"], **settings)
            tell(poet, passages)
            for record in saved:
                found = passages[record["number"] - first["first"]]
                if (found.text, found.ids) != (record["text"], record["ids"]):
                    raise ConfigError(
                        f"{path}: line {record['line']} comes out otherwise with torch {torch.__version__}; it was "
                        f"written with torch {record['torch']}, in {dtype} on {device}"
                    )
    print(f"{path}: {len(records)} passages, each as it was")


REPLAYED = ("checkpoint", "device", "dtype", "sha256", "settings", "prompt", "first", "together")
REPLAYED += ("number", "text", "ids", "torch")


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
/more goes on, /again writes another, /check tells what is copied, /save FILE keeps the last passage, /settings, /quit
anything else is a prompt (\\n: line end); Ctrl-C ends a passage"""


class Session:
    """Prompts again and again: passages stream, commands change settings or take up the last passage."""

    def __init__(self, poet: Poet, settings: Settings):
        self.poet, self.settings, self.written = poet, settings, 0
        self.last: list[Passage] = []

    def run(self) -> None:
        """Ask until /quit or end of input; Ctrl-C ends a passage."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its history and line editing)
        print("Type a prompt, or /help.")
        while True:
            try:
                line = input("> ")
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() == "/quit":
                return None
            try:
                self.do(line)
            except (ConfigError, DataError, OSError) as e:
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
        tell(self.poet, passages, logprobs=True, after=after)


def main(cfg: SampleConfig) -> None:
    """Write what `cfg` asks for."""
    if cfg.replay:
        return replay(Path(cfg.replay))
    prompt = read_prompt(cfg.prompt)
    poet = Poet(cfg.checkpoint, cfg.device, cfg.dtype, cfg.record)
    if cfg.check:
        _ = poet.originality  # if the training text is not here, that is told first
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**values | {"stop": tuple(map(unescape, cfg.stop))})
    if cfg.interactive:
        return Session(poet, settings).run()
    passages = poet.begin(prompt, cfg.num_samples, **dataclasses.asdict(settings))
    tell(poet, passages, logprobs=bool(cfg.save), check=cfg.check)
    if cfg.save:
        save(Path(cfg.save), poet, passages)
    if cfg.export:
        loaded = checkpoint.load_model(Path(cfg.checkpoint), torch.device("cpu"), torch.float32)
        checkpoint.export(*loaded, prompt + passages[0].text, Path(cfg.export))
        print(f"{cfg.export}: AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it")
    return None


if __name__ == "__main__":
    configurator.launch(main, SampleConfig, DataError, CheckpointError, positional="checkpoint")

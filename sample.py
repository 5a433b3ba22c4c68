"""Generate text with a trained model: one passage, a batch, or an interactive session.

python sample.py --checkpoint=out/demo/best.pt --prompt="To be or not to be" --style=shakespeare
python sample.py out/demo/best.pt --interactive

from sample import Poet
Poet("out/demo/best.pt").write("O Romeo", n=3)
"""

import collections
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
from robopoet.errors import bounds
from robopoet.training.history import loss_picture
from robopoet.weights import checkpoint
from robopoet.weights.exports import EXPORTS, ending_of, export_problems
from robopoet.weights.header import ExportDtype
from robopoet.writing.passage import Settings
from robopoet.writing.poet import MAX_PASSAGES, Dtype, Poet
from robopoet.writing.replay import replay, save_passages
from robopoet.writing.session import Session
from robopoet.writing.terminal import check_writable, print_passages, read_prompt, unescape


@dataclass(frozen=True)
class SampleConfig(Settings):
    """The keys of sample.py."""

    # input and output
    checkpoint: str = "out/demo/best.pt"  # ours, nanoGPT's, GGUF, a Hugging Face folder or Hub name, or smollm2
    prompt: str = ""  # text to continue; FILE:path reads a file, - reads stdin, \n is a line break
    num_samples: int = 1  # how many passages to write; all are generated in one batch
    interactive: bool = False  # ask for one prompt after another; /help lists the session's commands
    verbose: bool = False  # print on stderr how fast the passages were generated
    check: bool = False  # print how much of each passage is copied from the training text
    save: str = ""  # append each passage to this file, as a line of JSON from which replay can regenerate it
    replay: str = ""  # regenerate the passages of a file that save wrote, compare them with it, and exit
    export: str = ""  # export the model: to NAME.html (browser), NAME.gguf (llama.cpp), or a folder (transformers)
    export_dtype: ExportDtype = "float16"  # how a .html or .gguf stores the weights
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Dtype = "auto"  # dtype of the weights; auto: the fastest here
    record: bool = False  # replay each decode step as a CUDA graph: faster, but not yet proven on a GPU

    def problems(self) -> list[str]:
        """What is wrong with these values, one per line."""
        found = super().problems() + bounds(self, "num_samples", 1, MAX_PASSAGES)
        if " " in self.checkpoint and not Path(self.checkpoint).exists():
            found.append(f"checkpoint: {self.checkpoint!r} is no file; a prompt is --prompt={self.checkpoint!r}")
        found += export_problems(self.export)
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        unused = {"interactive": "prompt num_samples verbose check save export export_dtype".split(), "replay": changed}
        for mode, keys in unused.items():
            given = [key for key in keys if key in changed and key != mode]
            if getattr(self, mode) and given:
                found.append(f"{mode}: takes no {', '.join(given)}; leave it out")
        return found


def main(cfg: SampleConfig) -> None:
    """Generate what `cfg` asks for."""
    if cfg.replay:
        return replay(Path(cfg.replay))

    # --- raise what can be raised before anything is generated
    if cfg.save:
        check_writable("save", Path(cfg.save))
    if cfg.export:
        check_writable("export", Path(cfg.export), is_new=True)
    prompt = read_prompt(cfg.prompt)
    poet = Poet(cfg.checkpoint, cfg.device, cfg.dtype, cfg.record)
    exporter = EXPORTS[ending_of(cfg.export)]
    if cfg.export:
        exporter.check(poet.model.config, poet.tokenizer)
    picture = loss_picture(Path(cfg.checkpoint)) if cfg.export else ""
    if cfg.save:
        _ = poet.sha256
    if cfg.check:
        _ = poet.originality

    # --- generate and save
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**values | {"stop": tuple(map(unescape, cfg.stop))})
    if cfg.interactive:
        return Session(poet, settings).run()
    passages = poet.begin(prompt, cfg.num_samples, **dataclasses.asdict(settings))
    start = time.perf_counter()
    stream = poet.stream(passages, logprobs=bool(cfg.save))
    try:
        if cfg.export and not (cfg.prompt or cfg.check or cfg.save or cfg.num_samples > 1):
            collections.deque(stream, maxlen=0)  # nobody asked to read it; the export holds it as its sample
        else:
            print_passages(poet, passages, stream, cfg.check)
    finally:  # after Ctrl-C too, the finished passages are kept
        if cfg.save:
            save_passages(Path(cfg.save), poet, passages)
    if cfg.verbose:
        n_tokens, seconds = sum(len(passage.ids) for passage in passages), time.perf_counter() - start
        print(f"{n_tokens:,} tokens in {seconds:.2f} s, {n_tokens / seconds:,.0f} tokens/s", file=sys.stderr)

    # --- export
    if cfg.export:
        loaded = checkpoint.load_model(Path(cfg.checkpoint), torch.device("cpu"), torch.float32)
        passage = passages[0].prompt + passages[0].text
        note = exporter.export(*loaded, passage, Path(cfg.export), cfg.export_dtype, picture)
        print(f"{cfg.export}: {note}")
    return None


if __name__ == "__main__":
    configurator.launch(main, SampleConfig, positional="checkpoint")

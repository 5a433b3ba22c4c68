"""report.html: a run to look at while it trains, in one file that needs no network, and no script to be read.

It is drawn from the records of metrics.jsonl, so a resumed run's has the whole history, and from the run's config, text
and machine. Texts from outside, such as samples and the names of styles, are escaped, and a policy forbids all but the
page's own style and script.
"""

import functools
import html
import json
import platform
import shlex
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from robopoet import portable
from robopoet.errors import shorten
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.training.chart import axis_of, chart, dots, line, spark
from robopoet.training.history import History
from robopoet.weights.html import SCRIPT, STYLE, hashes

TEMPLATE = Path(__file__).with_suffix(".html")
OPEN = 4  # how many samples show at once
RENEWED_S = 30  # a browser loads the page of a run that goes on so often
UNSHOWN = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)], "\ufffd")  # HTML can't hold them


class RunReport(History):
    """A history that is shown: `page` draws it, with what is known of the run beside it.

    config: the value of each key of train.py. settings: the keys that are shown, with their values. parameters: how
    many the model has. These three are set from outside, config and settings again when a run plans anew.
    """

    def __init__(self, meta: Meta, machine: Machine):
        super().__init__()
        self.meta, self.machine = meta, machine
        self.config: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.parameters = 0

    def page(self, left_s: float = 0.0, ended: bool = False) -> bytes:
        """The page as it stands. left_s: seconds to the end (0: unknown). ended: whether the run has come to it."""
        template = TEMPLATE.read_text(encoding="utf-8")
        own = f"style-src {hashes(STYLE, template)}; script-src {hashes(SCRIPT, template)}"
        parts = {
            "policy": f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'",
            "refresh": "" if ended else f'\n<meta http-equiv="refresh" content="{RENEWED_S}">',
            "title": escape(Path(self.config["out_dir"]).absolute().name),
            "state": escape(self._state(left_s, ended)),
            "figures": self._figures(),
            "by_steps": self._charts(0, 1, "steps"),
            "by_time": self._charts(1, *time_unit(self.latest.seconds)),
            "samples": self._samples(),
            "rail": "".join(f'<section class="card">{part}</section>' for part in self._cards() if part),
            "footer": self._commands(),
        }
        return string.Template(template).substitute(parts).encode(errors="replace")

    def _state(self, left_s: float, ended: bool) -> str:
        """How far the run has come."""
        steps, patience = self.config["max_iters"], self.config["patience"]
        if not ended:
            left = f", about {duration(left_s)} to go" if left_s else ""
            return f"Step {self.step:,} of {steps:,} at {time.strftime('%H:%M on %Y-%m-%d')}{left}."
        if self.step >= steps:
            return f"Finished after {self.step:,} steps."
        if 0 < patience <= self.since_best:
            return f"Stopped at step {self.step:,}, after {self.since_best} evaluations without a better val loss."
        return f"Ended at step {self.step:,} of {steps:,}; --init_from=auto resumes it."

    def _figures(self) -> str:
        """The numbers to look at first."""
        best, latest = self.best, self.latest
        shown: dict[str, str] = {}
        if best.loss is not None:
            shown = {"bits per byte of val": f"{best.bpb or 0:.3f}"}
            shown |= {f"least val loss, at step {best.iter:,}": f"{best.loss:.4f}"}
        speed = latest.tokens / latest.seconds if latest.seconds else 0.0
        shown |= {"in training": duration(latest.seconds), "tokens a second": f"{speed:,.0f}"}
        return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())

    def _charts(self, column: int, size: float, unit: str) -> str:
        """Loss, learning rate and copies over steps (column 0), or seconds (1) in units of `size`."""
        if not self.has_begun:
            return '<p class="note">The curves begin with the first steps.</p>'
        figures, x = [figure(*self.loss_chart(column, size, unit))], self.axis(column, size)
        if rates := self.trained.over(column, size, 3):
            y = axis_of([0, *(rate for _, rate in rates)])
            figures.append(figure(["learning rate"], chart("learning rate", x, y, [line("val", rates, x, y)], unit)))
        if copied := self.copied.over(column, size, 2):
            y = axis_of([0, 5, *(words for _, words in copied)], 0.05)
            labels = [f"{words:,.0f} words" for _, words in copied]
            name = "longest copy from the training text, in words"
            figures.append(figure([name], chart(name, x, y, [dots("val", copied, labels, x, y)], unit)))
        return "".join(figures)

    def _samples(self) -> str:
        """What the model wrote, newest first."""
        if not self.samples:
            return '<p class="note">Nothing yet: a sample comes with an evaluation, unless sample_tokens is 0.</p>'
        parts = []
        for step, text, copied_words in reversed(self.samples):
            copied = "" if copied_words is None else f'<p class="note">longest copy: {copied_words} words</p>'
            parts.append(f'<article><h3>step {step:,}</h3><p dir="auto">{escape(text)}</p>{copied}</article>')
        older = parts[OPEN:]
        folded = f'<details id="earlier"><summary>{len(older)} earlier</summary>{"".join(older)}</details>'
        return "".join(parts[:OPEN]) + (folded if older else "")

    def _cards(self) -> Iterator[str]:
        """What stands beside the samples: styles, settings, the text, the machine."""
        if len(self.styles) > 1:
            yield f"<h2>Loss by style</h2>{self._styles()}"
        yield f"<h2>Settings</h2><p>{self._choice()}</p>{facts(self.settings)}"
        meta, rows = self.meta, [["split", "documents", "tokens", "characters"]]
        for name, split in meta.splits.items():
            counts = sum(span.works for span in split.documents), split.tokens, split.characters
            rows.append([name, *(f"{count:,}" for count in counts)])
        about = {"dataset": self.config["dataset"], "vocabulary": f"{meta.vocab_size:,} ids"}
        yield f"<h2>Text</h2>{table(rows)}{facts(about)}"
        memory = {"peak memory": f"{self.latest.peak_mem_mb:,.0f} MB"} if self.latest.peak_mem_mb else {}
        about = {key: value for key, value in self._machine.items() if value is not None} | memory
        yield f"<h2>Machine</h2>{facts(about | {'parameters': f'{self.parameters:,}'})}"

    @functools.cached_property
    def _machine(self) -> dict[str, Any]:
        """What the run trains on; it is looked up once."""
        return describe_machine(self.machine) | {"ranks": self.machine.world_size}

    def _styles(self) -> str:
        """A row for each style: its curve, all of one scale, and its last and least loss."""
        shown = {style: [(step, loss) for step, loss in series.rows()] for style, series in self.styles.items()}
        x = axis_of([0, *(step for rows in shown.values() for step, _ in rows)])
        y = axis_of([loss for rows in shown.values() for _, loss in rows], 0.1)
        rows = [["style", "", "last", "least"]]
        for style, points in shown.items():
            losses = [loss for _, loss in points]
            rows.append([escape(shorten(style)), spark(points, x, y), f"{losses[-1]:.3f}", f"{min(losses):.3f}"])
        return table(rows)

    def _choice(self) -> str:
        """How often the text is read, and for a run of minutes how its settings were chosen."""
        c, tokens, said = self.config, self.meta.splits["train"].tokens, ""
        if c["minutes"]:
            shape = "the largest shape that both can train, dropout by how often the text is read, and "
            said = (
                f"What was not given is chosen for {c['minutes']:g} minutes, this text and this machine: "
                f"{shape if c['init_from'] == 'scratch' else ''}as many steps as fit, unless the text teaches no more. "
            )
        step = c["gradient_accumulation_steps"] * c["batch_size"] * c["block_size"]
        times = c["max_iters"] * step / max(tokens, 1)
        said += f"{c['max_iters']:,} steps of {step:,} tokens read the text's {tokens:,} tokens {times:,.2f} times."
        plans = [[int(part) for part in text.split(":")] for text in c["plans"]]
        lasts = [last for _, last, _ in plans] + [c["max_iters"]]
        moves = [f"at step {plan[0]:,} to {last:,}" for plan, last in zip(plans, lasts[1:], strict=True)]
        if moves:
            said += f" The machine's pace moved the last step, at first {lasts[0]:,}: {', '.join(moves)}."
        return said

    def _commands(self) -> str:
        """What to do with the model."""
        best = shlex.quote(str(Path(self.config["out_dir"]) / "best.pt"))
        commands = {
            "To write with it": f"python sample.py {best}",
            "Its loss on the test split": f"python train.py --eval_only --split=test --init_from={best}",
        }
        lines = [f"<p>{what}: <code>{escape(command)}</code></p>" for what, command in commands.items()]
        return "".join(lines) if self.best.loss is not None else ""


# ---------------------------------------------------------------------------------------------------------------------
# text and HTML


def describe_machine(machine: Machine) -> dict[str, Any]:
    """What a figure depends on beside the code: device, its memory (GB = 2**30 bytes; CUDA only), dtype, torch.

    A processor is named with the widest products that torch has for it.
    """
    memory_gb = None
    if machine.device.type == "cuda":
        device = torch.cuda.get_device_properties(machine.device)
        name, memory_gb = device.name, round(device.total_memory / 2**30, 1)
    elif machine.device.type == "cpu":
        matrices = {"AMX": torch.cpu._is_amx_tile_supported, "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported}
        widest = (name for name, is_supported in matrices.items() if is_supported())
        name = f"{portable.cpu_name()}, {next(widest, torch.backends.cpu.get_cpu_capability())}"
    else:
        name = f"{platform.machine()} {machine.device.type}"
    return {
        "device": name,
        "memory_gb": memory_gb,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def duration(seconds: float) -> str:
    """Minutes and seconds, as 2:05, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit for times up to so many seconds: how many seconds it has, and its name."""
    return (1, "s") if seconds < 120 else (60, "min") if seconds < 3 * 3600 else (3600, "h")


def escape(text: str) -> str:
    """`text` as HTML that shows it, whatever it holds."""
    return html.escape(text.translate(UNSHOWN))


def figure(titles: list[str], drawing: str) -> str:
    """A chart under the titles of its left and right axis."""
    return f"<figure><figcaption>{''.join(f'<span>{t}</span>' for t in titles)}</figcaption>{drawing}</figure>"


def facts(values: dict[str, Any]) -> str:
    """A list of keys and values, which may be any."""
    shown = {key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in values.items()}
    pairs = (f"<dt>{escape(key)}</dt><dd>{escape(shorten(text))}</dd>" for key, text in shown.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def table(rows: list[list[str]]) -> str:
    """A table of HTML; the first row is its head."""
    lines = ["".join(f"<{'td' if i else 'th'}>{cell}" for cell in row) for i, row in enumerate(rows)]
    return f"<table>{''.join(f'<tr>{line}' for line in lines)}</table>"

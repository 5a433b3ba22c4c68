"""report.html: what it shows of a run, that nothing in it comes alive, and that no size and no disk stops the run."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import at_step, records, report_of
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import html
from matplotlib.ticker import MaxNLocator
from test_faults import largest_file
from test_html import SCRIPT
from test_train import CPU, losses, run

from robopoet.training import chart
from robopoet.training.chart import Axis, axis_of
from robopoet.training.history import MOST_POINTS, Record, Series
from robopoet.training.log import Log
from robopoet.training.report import RunReport, duration
from robopoet.training.run import Progress

ELEMENTS = "html head meta title style body header main footer section div span p h1 h2 h3 dl dt dd input label figure "
ELEMENTS += "figcaption svg line text polyline circle article details summary table tr th td code script"


def parsed(page: bytes | Path) -> html.HtmlElement:
    """The page's tree, in which every element is one of ours and nothing names another file."""
    content = page.read_bytes() if isinstance(page, Path) else page
    tree = html.document_fromstring(content, parser=html.HTMLParser(encoding="utf-8"))
    assert {element.tag for element in tree.iter(html.etree.Element)} <= {*ELEMENTS.split()}
    assert len(tree.findall(".//script")) == len(tree.findall(".//style")) == 1
    names = {name for element in tree.iter(html.etree.Element) for name in element.attrib}
    assert not {name for name in names if name.startswith("on") or name in ("href", "src", "style", "action")}
    assert not re.search(rb"://|@import|url\(", content)
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    return tree


def texts(tree: html.HtmlElement, path: str) -> list[str]:
    return [element.text_content() for element in tree.xpath(path)]


def drawn(tree: html.HtmlElement, block: str, nth: int = 0) -> np.ndarray:
    """The places of the nth line of a block of charts, from 0 to 1, upwards."""
    points = tree.xpath(f"//div[@class='charts {block}']//polyline/@points")[nth].split()
    places = np.array([[float(number) for number in point.split(",")] for point in points]) / chart.UNITS
    return np.stack([places[:, 0], 1 - places[:, 1]], 1)


def shown_at(step: int, loss: float, **values) -> list[Record]:
    """The records of a step and its evaluation."""
    trained = Record("train", step, loss, lr=0.1, seconds=step / 10, tok_per_sec=100.0)
    return [trained, Record("eval", step, loss, 2 * loss, **values)]


def test_a_run_shows_its_curves_samples_styles_settings_text_and_machine(small, books):
    found = run(small, sample_tokens=30, max_iters=40, eval_interval=10, learning_rate=5e-3)
    tree = parsed(Path(small["out_dir"]) / "report.html")
    evals = [record for record in found if record["kind"] == "eval"]
    assert [int(text.split()[1]) for text in texts(tree, "//article/h3")] == [40, 30, 20, 10]
    assert texts(tree, "//article/p[@dir]") == [record["text"].strip("\n") for record in reversed(evals)]
    copied = [f"longest copy: {record['copied_words']} words" for record in reversed(evals)]
    assert texts(tree, "//article/p[@class]") == copied
    for block in ("by-steps", "by-time"):
        figures = tree.xpath(f"//div[@class='charts {block}']/figure")
        dots = [figure.xpath(".//circle[@class='val']/title/text()") for figure in figures]
        assert dots[0] == [f"step {r['iter']}: {r['loss']:.4f}, {r['bpb']:.3f} bits per byte" for r in evals]
        assert [len(each) for each in dots] == [4, 0, 4] and len(figures[0].xpath(".//circle[@class='best']")) == 1
    best = min(evals, key=lambda record: record["loss"])
    last = found[-2]  # the last evaluation follows it
    speed = [duration(last["seconds"]), f"{last['tokens'] / last['seconds']:,.0f}"]
    assert texts(tree, "//header//dd") == [f"{best['bpb']:.3f}", f"{best['loss']:.4f}", *speed]
    rows = [[cell.text_content() for cell in row] for row in tree.xpath("//table[1]//tr")]
    last = evals[-1]["loss_by_style"]
    least = {style: min(record["loss_by_style"][style] for record in evals) for style in last}
    assert rows[1:3] == [[style, "", f"{last[style]:.3f}", f"{least[style]:.3f}"] for style in ("alpha", "beta")]
    splits = json.loads((books / "meta.json").read_text())["splits"]
    counts = [[name, "2", f"{split['tokens']:,}", f"{split['characters']:,}"] for name, split in splits.items()]
    assert rows[4:] == counts
    facts = dict(zip(texts(tree, "//dl[@class='facts']/dt"), texts(tree, "//dl[@class='facts']/dd"), strict=True))
    assert facts["learning_rate"] == "0.005" and facts["torch"] == torch.__version__ and facts["dtype"] == "float32"
    assert facts["threads"] == str(torch.get_num_threads()) and "seed" not in facts
    (steps,) = [text for text in texts(tree, "//section/p") if text.startswith("40 steps")]
    assert f"of 256 tokens read the text's {splits['train']['tokens']:,} tokens" in steps
    assert "python sample.py" in tree.xpath("string(//footer)") and "Finished after 40 steps." in tree.xpath(
        "string(//p)"
    )


def test_the_lines_are_the_records(small):
    found = [record for record in run(small, max_iters=30, eval_interval=30) if record["kind"] == "train"]
    tree = parsed(Path(small["out_dir"]) / "report.html")
    for block, key in (("by-steps", "iter"), ("by-time", "seconds")):
        last = found[-1][key] if found[-1][key] > 5 else 5
        for nth, value in enumerate(("loss", "lr")):
            places = drawn(tree, block, nth)
            assert places[:, 0] == pytest.approx([record[key] / last for record in found], abs=1e-3)
            above = np.array([record[value] for record in found])
            (scale, _), error, *_ = np.polyfit(above, places[:, 1], 1, full=True)
            assert scale > 0 and error[0] < 1e-5  # some linear scale
    rate = drawn(tree, "by-steps", 1)
    assert rate[:, 1] == pytest.approx([record["lr"] / max(r["lr"] for r in found) for record in found], abs=1e-3)


def test_it_is_there_from_the_first_step_and_renewed_at_each_evaluation(small, monkeypatch):
    path, seen = Path(small["out_dir"]) / "report.html", []
    for step in (0, 2, 3, 5):
        at_step(monkeypatch, step, lambda: seen.append(parsed(path)))
    run(small)
    states = [tree.xpath("string(//header/p)") for tree in (*seen, parsed(path))]
    told = [re.match(r"Step (\d) of 6 at \d\d:\d\d on \d{4}-\d\d-\d\d", state) for state in states[:4]]
    assert [match[1] for match in told] == ["0", "0", "3", "3"] and states[4] == "Finished after 6 steps."
    assert [len(tree.xpath("//meta[@http-equiv='refresh']")) for tree in (*seen, parsed(path))] == [1, 1, 1, 1, 0]
    assert "begin with the first steps" in seen[0].xpath("string(//main)")
    assert not [*path.parent.glob("*.part")]


def test_a_resumed_runs_report_is_that_of_an_unbroken_one(small, tmp_path):
    small |= {"sample_tokens": 20, "lr_decay_iters": 6, "eval_interval": 2}
    run(small, out_dir=str(tmp_path / "whole" / "poet"))
    parts = str(tmp_path / "parts" / "poet")
    run(small, out_dir=parts, max_iters=4)
    assert "Finished after 4 steps." in parsed(Path(parts) / "report.html").xpath("string(//header/p)")
    with open(f"{parts}/metrics.jsonl", "a") as f:  # another run's, and a step that will run again
        for stray in ({"iter": 1, "loss": 99.0, "run": "x"}, {"iter": 5, "loss": 98.0}):
            f.write(json.dumps(records(parts)[0] | stray) + "\n")
    found = run(small, out_dir=parts, init_from="resume")
    pages = [parsed(tmp_path / name / "poet" / "report.html") for name in ("whole", "parts")]
    for block in ("//div[@class='charts by-steps']", "//article", "//table", "//header/p"):
        one, other = ([html.tostring(element) for element in page.xpath(block)] for page in pages)
        assert one == other != []
    assert len(drawn(pages[1], "by-steps")) == len(losses(found)) == 6


def test_it_changes_no_bit_of_a_run(small, tmp_path, monkeypatch):
    shown = run(small, sample_tokens=20, dropout=0.1, out_dir=str(tmp_path / "shown"))
    monkeypatch.setattr(Log, "_renew_report", lambda *_, **__: None)
    hidden = run(small, sample_tokens=20, dropout=0.1, out_dir=str(tmp_path / "hidden"))
    assert losses(shown) == losses(hidden) and not (tmp_path / "hidden" / "report.html").exists()


def test_a_full_disk_and_a_fault_of_ours_cost_a_warning_each(small, monkeypatch, capsys):
    out, renew, page, seen = Path(small["out_dir"]), Log._renew_report, RunReport.page, []

    def cramped(log, **keys):
        with largest_file(1000) if log.report.step == 2 else contextlib.nullcontext():
            renew(log, **keys)

    def faulty(report, *args):
        return page(report, *args) if report.step != 4 else 1 // 0

    monkeypatch.setattr(Log, "_renew_report", cramped)
    monkeypatch.setattr(RunReport, "page", faulty)
    at_step(monkeypatch, 5, lambda: seen.append(parsed(out / "report.html").xpath("string(//header/p)")))
    assert run(small, eval_interval=2)[-1]["iter"] == 6
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the report")]
    assert warnings == [
        f"warning: the report is not renewed: {out}/report.html: File too large",
        "warning: the report is not renewed: integer division or modulo by zero",
    ]
    assert seen[0].startswith("Step 0 of 6") and not (out / "report.html.part").exists()
    assert parsed(out / "report.html").xpath("string(//header/p)") == "Finished after 6 steps."


def test_only_the_first_rank_writes_it(small, tmp_path):
    log = Log(lambda: tmp_path, Progress(), dataclasses.replace(CPU, rank=1, world_size=2), [], report_of(small))
    log.begin(1000, "a line")
    log.evaluation(
        Progress(),
        dict.fromkeys(("loss", "loss_se", "ppl", "bpb", "seconds"), 1.0) | {"tokens": 9, "loss_by_style": {}},
    )
    log.close()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("keys", "since_best", "told"),
    [
        ({"max_iters": 10}, 0, "Finished after 10 steps."),
        ({"max_iters": 20, "patience": 2}, 2, "Stopped at step 10, after 2 evaluations without a better val loss."),
        ({"max_iters": 20, "patience": 3}, 2, "Ended at step 10 of 20; --init_from=auto resumes it."),
        ({"max_iters": 20}, 2, "Ended at step 10 of 20; --init_from=auto resumes it."),
    ],
)
def test_the_end_is_told(small, keys, since_best, told):
    report = report_of(small | keys)
    for loss in (3.0, *[3.5] * since_best):
        for record in shown_at(10, loss):
            report.add(record)
    assert parsed(report.page(ended=True)).xpath("string(//header/p)") == told


def test_why_a_run_of_minutes_takes_what_it_takes(small):
    tokens = report_of(small).meta.splits["train"].tokens
    report = report_of(small | {"minutes": 7, "max_iters": 90, "plans": ("20:100:10", "40:80:8")})
    (told,) = [text for text in texts(parsed(report.page()), "//section/p") if "minutes" in text]
    assert "chosen for 7 minutes, this text and this machine: the largest shape" in told
    assert f"90 steps of 256 tokens read the text's {tokens:,} tokens {90 * 256 / tokens:.2f} times." in told
    assert told.endswith("moved the last step, at first 100: at step 20 to 80, at step 40 to 90.")
    report = report_of(small | {"minutes": 7, "init_from": "smollm2"})
    assert "shape" not in parsed(report.page()).xpath("string(//main)")


# --- what comes from outside

HOSTILE = (
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "$title ${policy} {{about}}",
    "</title></style></svg>",
    "&lt;b>&#60;",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_from_outside_becomes_html(small, text):
    report = report_of(small | {"out_dir": f"out/{text.replace('/', '')}"})
    report.config["dataset"], report.settings = text, {text: text}
    for record in shown_at(1, 3.0, loss_by_style={text: 3.0, "b": 2.0}, text=text, copied_words=3):
        report.add(record)
    tree = parsed(report.page())
    assert texts(tree, "//article/p[@dir]") == [text] and texts(tree, "//dl/dt").count(text) == 1
    assert texts(tree, "//dl/dd").count(text) == 2  # the setting and the dataset
    assert texts(tree, "//td").count(text) == 1
    assert texts(tree, "//h1") == texts(tree, "//head/title") == [text.replace("/", "")]


def test_characters_that_html_has_not_are_replaced(small):
    report = report_of(small | {"out_dir": "out/\udcff"})  # a name that is not UTF-8
    for record in shown_at(1, 3.0, text="a\0b\x1b[2Jc\x85\td\n\u202e‮שלום"):
        report.add(record)
    assert texts(parsed(report.page()), "//article/p[@dir]") == ["a�b�[2Jc�\td\n\u202e‮שלום"]


NUMBERS = st.floats(0, allow_infinity=False) | st.sampled_from([0.0, 5e-324, 1e-9, 1e308])
VALUES = {
    "kind": st.sampled_from(["train", "eval", "plan"]),
    "iter": st.integers(0, 2**53),
    "loss": st.none() | NUMBERS | NUMBERS.map(lambda number: -number),
    "bpb": st.none() | NUMBERS,
    "lr": st.none() | NUMBERS,
    "seconds": st.floats(0, 2**40),
    "tok_per_sec": NUMBERS,
    "loss_by_style": st.dictionaries(st.text(), st.none() | NUMBERS, max_size=3),
    "text": st.text(),
    "copied_words": st.none() | st.integers(0, 2**53),
}


@settings(max_examples=60, deadline=None)
@given(found=st.lists(st.builds(Record, **VALUES), max_size=6), left_s=NUMBERS, ended=st.booleans())
def test_any_records_make_a_page(books, found, left_s, ended):
    report = report_of({"dataset": str(books)})
    for record in found:
        report.add(record)
    parsed(report.page(left_s, ended))


# --- size


def test_a_series_of_any_length_is_a_thousand_means_at_most():
    series, numbers = Series(), np.random.default_rng(0).normal(size=(70_003, 2))
    for count, row in enumerate(numbers, 1):
        series.add(*row)
        assert count > MOST_POINTS or len(series.rows()) <= count
    size = 2 ** math.ceil(math.log2((len(numbers) + 1) / MOST_POINTS))
    means = [numbers[i : i + size].mean(0) for i in range(0, len(numbers), size)]
    assert len(means) <= MOST_POINTS and np.allclose(series.rows(), means)


def test_a_page_has_its_bounds_however_long_the_run_and_its_metrics(small, tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as f:
        for step in range(1, 60_001):
            f.write(f'{{"kind":"train","iter":{step},"loss":{3 + 1 / step},"lr":0.1,"seconds":{step},"run":"a"}}\n')
            if step % 40 == 0:
                styles = {f"style {i} {'x' * 1000}": 3.0 for i in range(60)} if step % 4000 == 0 else {}
                result = {"kind": "eval", "iter": step, "loss": 3.0, "bpb": 2.0, "loss_by_style": styles, "run": "a"}
                f.write(json.dumps(result | {"text": f"{step} {'<' * 9000}"}) + "\n")
    report = report_of(small)
    Log(lambda: tmp_path, Progress(60_000, run_id="a"), CPU, [], report)
    page = report.page()
    tree = parsed(page)
    assert len(page) < 1.5e6
    steps = [int(text.split()[1].replace(",", "")) for text in texts(tree, "//article/h3")]
    assert steps == list(range(60_000, 58_000, -40))
    assert {len(text) for text in texts(tree, "//article/p[@dir]")} == {4001}  # and an ellipsis
    assert len(tree.xpath("//div[@class='charts by-time']//circle[@class='val']")) <= MOST_POINTS
    places = drawn(tree, "by-steps")
    assert MOST_POINTS / 2 < len(places) <= MOST_POINTS and places[-1, 0] == pytest.approx(1, abs=1e-3)
    assert len(tree.xpath("//svg[@class='spark']")) == 40


# --- charts


@settings(max_examples=300, deadline=None)
@given(low=st.integers(-(10**6), 10**6), span=st.integers(1, 10**6), most=st.integers(2, 8))
def test_the_values_beside_a_chart_are_matplotlibs(low, span, most):
    low, span = low / 997, span / 991
    axis = Axis(low, low + span)
    found = axis.ticks(most)
    values = [value for value, _ in found]
    expected = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(axis.low, axis.high)
    expected = [value for value in expected if axis.low <= value <= axis.high]
    if len(values) >= 2:  # it wants two
        assert values == pytest.approx(expected, abs=1e-9 * span)
    assert [float(text.replace(",", "")) for _, text in found] == pytest.approx(values, abs=1e-6 * span)


def test_an_axis_holds_its_values_with_room_around_them():
    assert axis_of([2.0, 4.0, 3.0]) == Axis(2.0, 4.0) and axis_of([2.0, 4.0], 0.1) == Axis(1.8, 4.2)
    for values in ([], [0.0], [5.0, 5.0], [1e9], [1e-300, 2e-300]):
        axis = axis_of(values)
        assert axis.high - axis.low > 1e-5 and all(0 <= axis.share(value) <= 1 for value in values)


@pytest.mark.parametrize(("seconds", "told"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3600, "1:00:00")])
def test_a_duration_is_told_as_on_a_clock(seconds, told):
    assert duration(seconds) == told

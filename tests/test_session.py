"""The interactive session, as called, over a pipe and in a terminal."""

import dataclasses
import io
import json
import os
import re
import types

import pytest
from scripts import Script, run_script

from robopoet.errors import ConfigError
from robopoet.writing import session
from robopoet.writing.passage import Settings
from robopoet.writing.replay import replay
from robopoet.writing.session import Session, key_of


def interact(poet, monkeypatch, lines, settings=Settings(max_new_tokens=5)):  # noqa: B008
    """Run a session on these lines of input; ^C is the key."""
    lines = iter(lines)

    def answer(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", answer)
    Session(poet, settings).run()


def test_commands_change_settings_and_mistakes_end_no_session(poet, monkeypatch, capsys):
    script = ["/temp 0", "/topk 5", "/topp 0.5", "/rep 1.2", "/tokens 7", "/seed 9", "/style alice", "/style bob",
              "/minp 0.25", "/stop \\n\\n", "/ngram 3", "/ngram", "/until line", "/temp cold", "/xyzzy", "/temprature",
              "/top 3", "/maxcopy 1", "/help", "^C", "/settings", "once", "/quit", "never read"]  # fmt: skip
    interact(poet, monkeypatch, script)
    out = capsys.readouterr().out
    for line in (
        "temperature: 0.0",
        "top_k: 5",
        "top_p: 0.5",
        "repetition_penalty: 1.2",
        "max_new_tokens: 7",
        "seed: 9",
        "style: 'alice'",
        "must be one of the model's: alice, bard",
        "found 'cold', must be a number",
        "/xyzzy: no such command; /help lists all",
        "/temprature: no such command; did you mean /temperature?",
        "/top: could be /top_k, /top_p; write more of it",
        "max_copy: found 1, must be at least 3 and at most 100, or 0",
        "min_p: 0.25",
        "until: 'line'",
        "no_repeat_ngram: 0",
        r"stop: ('\n\n',)",
    ):
        assert line in out
    assert "once" in out and "never read" not in out


def test_ctrl_c_stops_the_passage_not_the_session(poet, monkeypatch, capsys):
    calls = []

    def stream(*args, **settings):
        calls.append(args)
        yield [""]
        raise KeyboardInterrupt

    monkeypatch.setattr(poet, "stream", stream)
    interact(poet, monkeypatch, ["one", "two", "/save x.jsonl", "/quit"])
    assert len(calls) == 2 and "/save: the passage was interrupted" in capsys.readouterr().out


def test_each_passage_is_new_until_the_seed_is_set(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, ["once", "once", "/seed 1337", "once"], Settings(max_new_tokens=30))
    first, second, third = (text.split("\n>")[0] for text in capsys.readouterr().out.split("once")[1:])
    assert first.strip() == third.strip() != second.strip()


def test_a_line_break_is_typed_as_backslash_n(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, [r"once\nupon"])
    assert "once\nupon" in capsys.readouterr().out


def test_the_last_passage_is_continued_repeated_checked_and_saved(poet, monkeypatch, capsys, tmp_path):
    file = tmp_path / "kept.jsonl"
    script = [
        "/more",
        "/save x",
        "/check",
        "once",
        "/more",
        "/again",
        f"/save {file}",
        "/save",
        "/save /nowhere/x",
        "/check",
        "/until speech",
    ]
    interact(poet, monkeypatch, [*script, "/settings"], Settings(max_new_tokens=20, until="tokens"))
    out = capsys.readouterr().out
    assert "/more: there is no passage yet" in out and "/save: name a file" in out and "until: 'speech'" in out
    assert "/nowhere/x" in out and "/check: there is no passage yet" in out and "which text it was trained on" in out
    first = poet.write("once", max_new_tokens=20, until="tokens")[0]
    more = poet.begin(first, 1, 1, max_new_tokens=20, until="tokens")
    list(poet.stream(more))
    assert first + "\n" + more[0].text in out
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert record["prompt"] == first and record["number"] == 2 and record["text"] != more[0].text
    replay(file)


@pytest.mark.parametrize("word", ["/quit", "quit", "exit", " exit ", "/exit"])
def test_a_session_ends_with_a_word(poet, monkeypatch, capsys, word):
    interact(poet, monkeypatch, [word, "/settings"])
    assert capsys.readouterr().out == "Type a prompt, or /help.\n"


def test_a_session_whose_input_is_not_utf8_ends_in_one_line(poet, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/settings\n\xff\n"), "utf-8"))
    with pytest.raises(ConfigError, match=r"stdin: byte .* is not UTF-8"):
        Session(poet, Settings()).run()


def test_a_session_over_a_pipe(random_pt):
    command = ["sample.py", random_pt, "--interactive", "--max_new_tokens=10"]
    done = run_script(*command, stdin=b"once\n/more\n/quit\n")
    assert done.returncode == 0 and "> once" in done.stdout and done.stdout.count("> ") == 3 and done.stderr == ""


def test_a_session_in_a_terminal(random_pt, tmp_path):
    command = ["sample.py", random_pt, "--interactive", "--max_new_tokens=10", "--device=cpu"]
    terminal, its = os.openpty()
    process = Script(*command, stdin=its, stdout=its, stderr=its, HOME=str(tmp_path))
    os.close(its)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 1000)
        shown = shown.split(text, 1)[1]

    until(b"> ")
    os.write(terminal, b"once\r")
    until(b"once\r\n")
    until(b"once")
    until(b"\r\n> ")
    os.write(terminal, b"/settings\r")
    until(b"max_new_tokens: 10")
    until(b"> ")
    os.write(terminal, b"/quit\r")
    assert process.wait() == 0
    os.close(terminal)


def test_help_tells_each_setting_and_a_part_of_its_name_is_a_command(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, ["/help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert re.search(rf"^/{field.name}  .*\w", out, re.M) and key_of(f"/{field.name}") == field.name
    assert "[auto tokens line sentence paragraph speech scene]" in out and "\n/more continues" in out
    short = "style temp topk topp minp rep ngram maxcopy tokens until seed stop".split()
    assert [key_of(f"/{word}") for word in short] == [
        *("style", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram"),
        *("max_copy", "max_new_tokens", "until", "seed", "stop"),
    ]


def test_a_terminal_has_a_history_that_lasts_and_completes_commands_and_styles(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(session, "HISTORY", tmp_path / "history")
    for line in ("To be", "/style alice"):
        with session.editing(["/temp", "/tokens", "alice"]):
            readline.add_history(line)
            complete = readline.get_completer()
            assert [complete("/t", i) for i in range(3)] == ["/temp", "/tokens", None]
            assert complete("al", 0) == "alice" and complete("", 0) is None
        readline.clear_history()
    assert [line for line in (tmp_path / "history").read_text().splitlines() if "_HiStOrY" not in line] == [
        "To be",
        r"/style\040alice" if r"\040" in (tmp_path / "history").read_text() else "/style alice",
    ]

"""The interactive session, as called, over a pipe and in a terminal."""

import dataclasses
import io
import json
import os
import re
import resource
import signal

import pytest
from conftest import within
from scripts import Script, run_script

import configurator
from robopoet.errors import ConfigError
from robopoet.writing.passage import Settings
from robopoet.writing.replay import replay
from robopoet.writing.sampler import Sampler
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
    monkeypatch.setattr("robopoet.writing.session.edit_lines", lambda complete: None)  # no one's history is touched
    Session(poet, settings).run()


def test_commands_change_settings_and_mistakes_end_no_session(poet, monkeypatch, capsys):
    script = ["/temp 0", "/topk 5", "/topp 0.5", "/rep 1.2", "/tokens 7", "/seed 9", "/style alice", "/style bob",
              "/minp 0.25", "/stop \\n\\n", '/stop "THE END" "\\n"', '/topk "6" "7"', "/ngram 3", "/ngram",
              "/until line", "/temp cold", "/xyzzy", "/temprature", "/top 3", "/maxcopy 1", "/help", "^C", "/set",
              "once", "/quit", "never read"]  # fmt: skip
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
        r"stop: ('THE END', '\n')",
        "top_k: found a list, must be one value",
    ):
        assert line in out
    assert "once" in out and "never read" not in out


@pytest.mark.parametrize("form", ["/set {} {}", "/set {}={}", "/set --{}={}", "/{} {}", "/{}={}", " /set {} = {} "])
def test_a_setting_is_changed_by_its_name(poet, monkeypatch, capsys, form):
    interact(poet, monkeypatch, [form.strip(" ").format("temperature", "0.5"), "/set"])
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "temperature: 0.5 (default: 0.9)" and len(out) == 2 + len(dataclasses.fields(Settings)) + 1
    differing = [line for line in out[2:] if "default" in line]
    assert differing == ["max_new_tokens: 5 (default: 300)", "temperature: 0.5 (default: 0.9)"]
    assert "top_p: 0.95" in out


@pytest.mark.parametrize(
    "given",
    ["temperature=cold", "temperature=-1", "top_k=1.5", "until=lien", "seed=-1", "min_p=2", "stop=" + "x" * 201],
)
def test_a_wrong_value_is_told_as_on_the_command_line_and_changes_nothing(poet, monkeypatch, capsys, given):
    with pytest.raises(ConfigError) as e:
        configurator.parse(Settings, [f"--{given}"])
    interact(poet, monkeypatch, [f"/set {given}", "/set"], Settings())
    told, *settings, _ = capsys.readouterr().out.splitlines()[1:]
    assert told == str(e.value).removeprefix("--") and not any("default" in line for line in settings)


@pytest.mark.parametrize(
    "line, told",
    [
        ("/set temprature 1", "temprature: no such setting; did you mean temperature?"),
        ("/set xyzzy 1", "xyzzy: no such setting; /help lists all"),
        ("/set top 1", "top: could be top_k, top_p; write more of it"),
        ("/set style bob", "style: found 'bob', must be one of the model's: alice, bard"),
        ("/sve x.txt", "/sve: no such command; did you mean /save?"),
        ("/settings", "/settings: no such command; did you mean /set?"),
        ("/", "/: no such command; /help lists all"),
    ],
)
def test_an_unknown_name_gets_a_hint(poet, monkeypatch, capsys, line, told):
    interact(poet, monkeypatch, [line])
    assert capsys.readouterr().out.splitlines()[1] == told


def test_a_passage_is_taken_back(poet, monkeypatch, capsys):
    settings = Settings(max_new_tokens=20, until="tokens")
    interact(poet, monkeypatch, ["/undo", "once", "/more", "/undo", "/undo", "/more"], settings)
    said = capsys.readouterr().out
    first = poet.write("once", max_new_tokens=20, until="tokens")[0]
    assert "/undo: there is no passage yet; type a prompt\n" in said and said.count(f"{first}\n") == 2
    assert said.endswith("(no passage is left)\n/more: there is no passage yet; type a prompt\n\n")
    monkeypatch.setattr("robopoet.writing.session.TAIL_CHARS", 10)
    session = Session(poet, settings)
    session.do("once")
    session.do("/again")
    capsys.readouterr()
    session.do("/undo")
    assert session.last.prompt + session.last.text == first
    assert capsys.readouterr().out == f"...{first[-10:]}\n"
    session.do("/again")  # another than the one that was taken back
    assert session.last.number == 2


def interrupted_after(steps: int, monkeypatch) -> None:
    """Interrupt whatever generates when it has so many tokens."""
    call, done = Sampler.__call__, []

    def interrupted(self, logits):
        done.append(1)
        if len(done) > steps:
            raise KeyboardInterrupt
        return call(self, logits)

    monkeypatch.setattr(Sampler, "__call__", interrupted)


def test_an_interrupted_passage_is_kept_and_replayed(poet, monkeypatch, capsys, tmp_path):
    session = Session(poet, Settings(max_new_tokens=60))
    for steps in (0, 5, 31):
        with monkeypatch.context() as m:
            interrupted_after(steps, m)
            session.do("once")
        last = session.last
        assert capsys.readouterr().out == f"once{last.text}\n" and (steps == 31 or len(last.text) == steps)
        session.do(f"/save {tmp_path / 'kept.txt'}")
        assert (tmp_path / "kept.txt").read_text().endswith(f"once{last.text}\n")
        if steps:
            session.do(f"/save {tmp_path / 'kept.jsonl'}")
        else:
            with pytest.raises(ConfigError, match="interrupted before its first token"):
                session.do(f"/save {tmp_path / 'kept.jsonl'}")
        session.do("/more")
        assert session.last.prompt == "once" + last.text
        capsys.readouterr()
    replay(tmp_path / "kept.jsonl")
    assert "2 passages, all reproduced exactly" in capsys.readouterr().out


def test_each_passage_is_new_until_the_seed_is_set(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, ["once", "once", "/seed 1337", "once"], Settings(max_new_tokens=30))
    first, second, third = (text.split("\n>")[0] for text in capsys.readouterr().out.split("once")[1:])
    assert first.strip() == third.strip() != second.strip()


def test_a_line_break_is_typed_as_backslash_n(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, [r"once\nupon"])
    assert "once\nupon" in capsys.readouterr().out


def test_the_last_passage_is_continued_repeated_checked_and_saved(poet, monkeypatch, capsys, tmp_path):
    file = tmp_path / "kept.jsonl"
    script = ["/more", "/save x", "/check", "once", "/more", "/again", f"/save {file}", "/save", "/save /nowhere/x"]
    interact(poet, monkeypatch, [*script, "/check", "/until speech"], Settings(max_new_tokens=20, until="tokens"))
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
    interact(poet, monkeypatch, [word, "/set"])
    assert capsys.readouterr().out == "Type a prompt, or /help.\n"


def test_a_session_whose_input_is_not_utf8_ends_in_one_line(poet, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/set\n\xff\n"), "utf-8"))
    with pytest.raises(ConfigError, match=r"stdin: byte .* is not UTF-8"):
        Session(poet, Settings()).run()


def test_a_passage_is_saved_as_text_with_its_prompt(poet, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    interact(poet, monkeypatch, ["o\\nromeo", "/save ~/a poem.txt", "/more", "/save ~/a poem.txt"])
    first = poet.write("o\nromeo", max_new_tokens=5)[0]
    more = poet.begin(first, 1, 1, max_new_tokens=5)
    list(poet.stream(more))
    assert (tmp_path / "a poem.txt").read_text("utf-8") == f"{first}\n\n{first}{more[0].text}\n"
    assert capsys.readouterr().out.count(f"appended to {tmp_path}/a poem.txt\n") == 2


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_full_disk_is_told_and_ends_no_session(poet, monkeypatch, capsys, tmp_path, name):
    file = tmp_path / name
    file.write_text("before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        interact(poet, monkeypatch, ["o romeo", f"/save {file}", "o juliet"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    out = capsys.readouterr().out
    assert f"{file}: File too large\n" in out and "o juliet" in out and "appended" not in out
    assert file.read_text() == "before\n"


@pytest.mark.parametrize(
    "line, found",
    [
        ("", []),
        ("To be /s", []),
        ("/mo", ["/more"]),
        ("/s", ["/save ", "/set ", "/style ", "/stop ", "/seed "]),
        ("/set top", ["/set top_k ", "/set top_p "]),
        ("/set style b", ["/set style bard"]),
        ("/set style=b", ["/set style=bard"]),
        ("/style ", ["/style alice", "/style bard"]),
        ("/style bard:0.7,a", ["/style bard:0.7,alice"]),
        ("/set until s", ["/set until sentence", "/set until speech", "/set until scene"]),
        ("/until p", ["/until paragraph"]),
        ("/temp ", []),
        ("/top ", []),
        ("/nope a", []),
        ("/save p", ["/save poem one.txt", "/save poems/"]),
        ("/save poem o", ["/save poem one.txt"]),
        ("/save poems/", ["/save poems/two.txt"]),
        ("/save ~/poems/t", ["/save ~/poems/two.txt"]),
        ("/save .h", ["/save .hidden"]),
        ("/save nowhere/", []),
    ],
)
def test_tab_completes_what_can_follow(poet, monkeypatch, tmp_path, line, found):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poems").mkdir()
    for name in ("poem one.txt", "poems/two.txt", ".hidden", "x"):
        (tmp_path / name).touch()
    assert sorted(Session(poet, Settings()).complete(line)) == sorted(found)


def test_a_session_over_a_pipe(random_pt, tmp_path):
    command = ["sample.py", random_pt, "--interactive", "--max_new_tokens=10"]
    done = run_script(*command, stdin=b"once\n/more\n/nope\n/set\n/help\n/quit\n", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 0 and "> once" in done.stdout and done.stdout.count("> ") == 6 and done.stderr == ""
    assert "\033" not in done.stdout and "Tab" not in done.stdout and not list(tmp_path.iterdir())


class Terminal:
    """sample.py in a session in a terminal of its own."""

    PROMPT = "\033[?2004h> "  # with what tells a terminal to say where a pasted text begins and ends

    def __init__(self, *keys, **environment):
        self.ours, its = os.openpty()
        command = ["sample.py", *keys, "--interactive", "--device=cpu", "--until=tokens"]
        settings = {"TERM": "xterm", "INPUTRC": os.devnull, "NO_COLOR": ""} | environment
        self.process = Script(*command, stdin=its, stdout=its, stderr=its, controlled=True, **settings)
        os.close(its)
        self.shown = b""

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def type(self, keys: str) -> str:
        """Press keys when the prompt is there; returns what is shown before it."""
        shown = self.until(self.PROMPT)
        self.press(keys)
        return shown

    def until(self, text: str) -> str:
        """What is shown up to `text`."""
        try:
            with within(100):
                while text.encode() not in self.shown:
                    self.shown += os.read(self.ours, 1000)
        except TimeoutError:
            pytest.fail(f"{text!r} does not follow in {self.shown[-1000:]!r}")
        shown, self.shown = self.shown.split(text.encode(), 1)
        return shown.decode()

    def end(self) -> str:
        """End the session as Ctrl-D does; returns what is shown before that."""
        shown = self.type("\x04")
        assert self.process.wait() == 0
        return shown


@pytest.fixture
def open_terminal():
    """Opens a Terminal; those whose session has not ended by then are killed, or they would be waited for."""
    opened = []
    yield lambda *keys, **environment: opened.append(Terminal(*keys, **environment)) or opened[-1]
    for terminal in opened:
        terminal.process.process.kill()
        os.close(terminal.ours)


def test_a_terminal_completes_colours_and_remembers(random_pt, open_terminal, tmp_path):
    state = {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    first = open_terminal(random_pt, "--max_new_tokens=10", **state)
    first.type("/te\t0.5\r")  # completed, with a space behind it
    first.until("\033[1mtemperature: 0.5\033[0m (default: 0.9)")
    first.type("/sty\tba\t\r")
    first.until("\033[1mstyle: 'bard'\033[0m (default: '')")
    first.type("/nope\r")
    first.until("\033[31m/nope: no such command")
    first.type("\033[200~o\nromeo\033[201~\r")  # what a terminal sends for two lines that are pasted
    first.until("\033[1mo\r\nromeo\033[0m")
    first.type("/help\r")
    first.until(str(tmp_path / "robopoet" / "history"))
    first.end()
    typed = ["/temperature 0.5", "/style bard", "/nope", "o\\nromeo", "/help"]
    assert (tmp_path / "robopoet" / "history").read_text().splitlines() == typed

    second = open_terminal(random_pt, "--max_new_tokens=10", NO_COLOR="1", **state)
    second.type("\033[A\033[A\r")  # up, up
    second.until("o\\nromeo")
    assert second.until("romeo").endswith("o\r\n")
    second.type("/nope\r")
    assert "no such command" in (shown := second.end()) and "\033[3" not in shown


def test_ctrl_c_in_a_terminal_stops_the_passage_and_keeps_it(random_pt, open_terminal, tmp_path):
    file = tmp_path / "kept.jsonl"
    terminal = open_terminal(random_pt, "--max_new_tokens=1000000000", XDG_STATE_HOME=str(tmp_path))
    terminal.type("o romeo\r")
    terminal.until("\033[1mo romeo\033[0m")
    terminal.until(" ")  # it has begun
    terminal.press("\x03")
    terminal.type(f"/save {file}\r")
    terminal.until("appended to")
    terminal.end()
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert record["prompt"] == "o romeo" and 1 <= len(record["ids"]) == record["settings"]["max_new_tokens"]
    replay(file)


def test_help_tells_each_setting_and_a_part_of_its_name_is_a_command(poet, monkeypatch, capsys):
    interact(poet, monkeypatch, ["/help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert re.search(rf"^  {field.name}  .*\w", out, re.M) and key_of(f"/{field.name}") == field.name
    assert "[auto tokens line sentence paragraph speech scene]" in out and "\n/more  " in out
    short = "style temp topk topp minp rep ngram maxcopy tokens until seed stop".split()
    for slash in ("/", ""):
        assert [key_of(f"{slash}{word}") for word in short] == [
            *("style", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram"),
            *("max_copy", "max_new_tokens", "until", "seed", "stop"),
        ]

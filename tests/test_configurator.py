"""Configuration: which value wins, what a value may be, and which message a bad one gets."""

import dataclasses
import os
import re
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import pytest
from conftest import within

import configurator
import prepare
import sample
import train
from configurator import parse
from robopoet import VERSION, files
from robopoet.errors import ConfigError, bounds

SCRIPTS = [train.TrainConfig, sample.SampleConfig, prepare.PrepareConfig]


@dataclass(frozen=True)
class Toy:
    """A config with a key of each type."""

    # things
    rate: float = 0.5  # a number
    steps: int = 10  # a whole number
    flag: bool = False  # yes or no
    mode: Literal["off", "on", "fast"] = "off"  # a choice
    name: str = "x"  # any text
    many: tuple[str, ...] = ()  # repeatable
    share: float | None = None  # a number, or chosen
    size: int | None = None  # a whole number, or chosen

    def problems(self) -> list[str]:
        """What is wrong with these values."""
        return bounds(self, "steps", 1) + bounds(self, "share size", 0.5)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "a.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def error(cls: type, *argv: str, positional: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, list(argv), positional)
    return str(caught.value)


# --- which value wins


def test_without_arguments_all_keys_have_their_defaults():
    assert parse(Toy, []) == Toy()


def test_command_line_beats_later_yaml_beats_earlier_yaml_beats_default(write):
    first = write("rate: 1\nsteps: 1\nname: first\n", "first.yaml")
    second = write("rate: 2\nsteps: 2\n", "second.yml")
    # the place of --rate among the files does not matter
    assert parse(Toy, ["--rate=3", first, second]) == Toy(rate=3.0, steps=2, name="first")
    assert parse(Toy, [second, first, "--rate", "3"]) == Toy(rate=3.0, steps=1, name="first")


def test_the_last_of_two_equal_flags_wins():
    assert parse(Toy, ["--steps=3", "--steps", "4"]).steps == 4


def test_positional_argument_goes_to_its_key():
    assert parse(Toy, ["poem", "--steps=2"], "name") == Toy(name="poem", steps=2)
    assert "poem" in error(Toy, "poem")
    assert parse(Toy, ["a", "--steps=2", "b"], "many") == Toy(many=("a", "b"), steps=2)
    assert "b" in error(Toy, "a", "b", positional="name")
    assert parse(Toy, ["-"], "name").name == "-"
    assert parse(Toy, ["-", "a"], "many").many == ("-", "a")


@pytest.mark.parametrize(
    "argv, advice",
    [
        (["config/demo.ymal"], "; did you mean config/demo.yaml?"),
        (["config/dmo.yaml"], "; did you mean config/demo.yaml?"),
        (["confg/demo.yaml"], "; did you mean config/demo.yaml?"),
        (["nothing/of/the.yaml"], "No such file or directory"),
        (["-x.txt"], "-x.txt: is one argument too many; if this is a file, write ./-x.txt"),
        (["x", "y"], "x y: are 2 arguments too many; write --key=value, or name a .yaml file"),
    ],
)
def test_a_path_that_is_missing_names_the_nearest_one_from_any_folder(tmp_path, monkeypatch, argv, advice):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.txt").write_text("It was late.")
    assert error(train.TrainConfig, *argv).endswith(advice)


def test_bare_words_for_sample_py_may_be_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").touch()
    for argv, prompt in (
        (["To", "be", "or"], "'To be or'"),
        (["a.pt", "To", "be"], "'To be'"),
        (["model.bin", "To"], "To"),
        (["To be"], "'To be'"),
    ):
        assert error(sample.SampleConfig, *argv, positional="checkpoint").endswith(f"--prompt={prompt}")


def test_the_nearest_path_is_looked_for_in_the_first_folder_that_is_missing(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demon").mkdir()
    (tmp_path / "demon" / "best.pt").touch()
    assert files.did_you_mean_path(tmp_path / "demos/best.pt") == f"; did you mean {tmp_path}/demon/best.pt?"
    assert files.did_you_mean_path(tmp_path / "demo/best.pt") == ""
    assert files.did_you_mean_path("x" * 5000) == files.did_you_mean_path("a\0/b") == ""


# --- what a value may be


@pytest.mark.parametrize("text, value", [("6e-4", 6e-4), ("1", 1.0), ("-2", -2.0), (".5", 0.5), ("1E3", 1000.0)])
def test_numbers_become_floats_in_yaml_and_on_the_command_line(write, text, value):
    for cfg in (parse(Toy, [write(f"rate: {text}")]), parse(Toy, [f"--rate={text}"]), parse(Toy, ["--rate", text])):
        assert cfg.rate == value
        assert type(cfg.rate) is float


@pytest.mark.parametrize("text, value", [("7", 7), ("5e3", 5000), ("3.0", 3)])
def test_whole_numbers_become_ints_however_written(write, text, value):
    for cfg in (parse(Toy, [write(f"steps: {text}")]), parse(Toy, [f"--steps={text}"])):
        assert cfg.steps == value
        assert type(cfg.steps) is int


def test_none_is_written_auto(write):
    for argv in ([write("share: auto\nsize: Auto\n")], ["--share=auto", "--size", "AUTO"], []):
        cfg = parse(Toy, argv)
        assert (cfg.share, cfg.size) == (None, None)
    cfg = parse(Toy, ["--share=2", "--size=3e3"])
    assert (cfg.share, cfg.size) == (2.0, 3000) and type(cfg.share) is float and type(cfg.size) is int
    assert "--share                        auto           a number, or chosen" in configurator.usage(Toy)
    assert error(Toy, "--share=x") == "--share: found 'x', must be a number, or auto"
    assert error(Toy, "--size=1.5") == "--size: found '1.5', must be a whole number, or auto"
    assert error(Toy, "--share=0", "--size=-1").splitlines() == [
        "share: found 0.0, must be at least 0.5, or auto",
        "  size: found -1, must be at least 0.5, or auto",
    ]
    assert error(Toy, "--rate=auto") == "--rate: found 'auto', must be a number"
    assert [configurator.written(value) for value in (None, ("a", "b"), 0)] == ["auto", ["a", "b"], 0]


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1])
def test_large_whole_numbers_keep_every_digit(number):
    assert parse(Toy, [f"--steps={number}"]).steps == number


def test_off_and_on_stay_words_for_a_key_of_words(write):
    assert parse(Toy, [write("mode: on")]).mode == "on"
    assert parse(Toy, [write("mode: off"), "--name=y"]).mode == "off"
    assert parse(Toy, [write("name: no")]).name == "no"
    assert parse(train.TrainConfig, [write("wandb: off")]).wandb == "off"


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "TRUE"])
def test_true_has_many_spellings(write, text):
    assert parse(Toy, [f"--flag={text}"]).flag is True
    assert parse(Toy, ["--flag", text]).flag is True
    assert parse(Toy, [write(f"flag: {text}")]).flag is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off"])
def test_false_has_many_spellings(write, text):
    yes = write("flag: true")
    assert parse(Toy, [yes, f"--flag={text}"]).flag is False
    assert parse(Toy, [yes, "--flag", text]).flag is False
    assert parse(Toy, [yes, write(f"flag: {text}", "no.yaml")]).flag is False


def test_a_bare_bool_is_true_and_takes_no_argument_after_it(write):
    assert parse(Toy, ["--flag"]).flag is True
    assert parse(Toy, ["--flag", "--steps=3"]) == Toy(flag=True, steps=3)
    assert parse(Toy, ["--flag", write("steps: 4")]) == Toy(flag=True, steps=4)
    assert parse(Toy, ["--flag", "poem"], "name") == Toy(flag=True, name="poem")


def test_values_may_hold_equals_signs_spaces_dashes_and_nothing():
    assert parse(Toy, ["--name=a=b==c"]).name == "a=b==c"
    assert parse(Toy, ["--name", "a=b"]).name == "a=b"
    assert parse(Toy, ["--name=--steps=3"]).name == "--steps=3"
    assert parse(Toy, ["--name= two words "]).name == " two words "
    assert parse(Toy, ["--name="]).name == ""


def test_repeatable_keys_collect(write):
    assert parse(Toy, ["--many=a", "--many", "b,c"]).many == ("a", "b,c")
    listed = write("many: [a, 1e3, off]")
    assert parse(Toy, [listed]).many == ("a", "1e3", "off")
    assert parse(Toy, [write("many: one", "one.yaml")]).many == ("one",)
    assert parse(Toy, [listed, "--many=z"]).many == ("z",)  # and win over YAML as any key does


def test_empty_yaml_changes_nothing(write):
    assert parse(Toy, [write("")]) == parse(Toy, [write("# only a comment\n")]) == Toy()


# --- which message a bad one gets


def test_unknown_key_names_the_nearest(write):
    for message in (error(Toy, "--stepz=3"), error(Toy, write("stepz: 3"))):
        assert "stepz" in message
        assert "did you mean steps" in message
    assert "did you mean" not in error(Toy, "--qqqqqqqqq=3")


def test_unknown_key_without_a_value_names_the_nearest_too():
    assert "did you mean flag" in error(Toy, "--flags")


def test_a_flag_is_not_taken_as_the_value_of_the_flag_before_it():
    assert "--name" in error(Toy, "--name", "--steps=3")


@pytest.mark.parametrize(
    "key, text",
    [
        ("rate", "fast"),
        ("rate", "nan"),
        ("rate", "inf"),
        ("rate", ""),
        ("steps", "1.5"),
        ("steps", "ten"),
        ("steps", "1e400"),
        ("steps", "0"),
        ("flag", "maybe"),
        ("flag", "2"),
        ("mode", "offline"),
        ("mode", "slow"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_and_value(write, key, text):
    assert key in error(Toy, f"--{key}={text}")
    message = error(Toy, write(f'{key}: "{text}"'))
    assert key in message
    assert text in message


@pytest.mark.parametrize("key", ["name", "many"])
def test_bytes_that_are_not_utf_8_are_refused(key):
    assert error(Toy, os.fsdecode(b"--%s=out/\xff" % key.encode())).startswith(
        rf"--{key}: found 'out/\udcff', which is"
    )


def test_a_wrong_choice_lists_all_choices():
    assert all(word in error(Toy, "--mode=slow") for word in ("off", "on", "fast"))
    assert error(Toy, "--mode=fats").endswith("; did you mean fast?")


@pytest.mark.parametrize("value", ["[1, 2]", "{a: 1}"])
@pytest.mark.parametrize("key", ["rate", "steps", "flag", "mode", "name"])
def test_a_list_or_mapping_for_a_single_value_is_refused(write, key, value):
    assert f"a.yaml: {key}" in error(Toy, write(f"{key}: {value}"))


@pytest.mark.parametrize("value", ["{a: b}", "[[a, b]]", "[a, {b: c}]"])
def test_a_repeatable_key_takes_nothing_but_words(write, value):
    assert "many" in error(Toy, write(f"many: {value}"))


@pytest.mark.parametrize("argv", [["--steps"], ["--flag=1", "--name"]])
def test_a_missing_value_is_named(argv):
    assert argv[-1] in error(Toy, *argv)


@pytest.mark.parametrize("value", ["--", "---", "--[JULIET]--", "--Oh!"])
@pytest.mark.parametrize("key", ["name", "many"])
def test_a_value_that_begins_with_dashes_is_refused_with_how_to_write_it(key, value):
    message = error(Toy, f"--{key}", value)
    assert message == f"--{key}: has no value; if that is {value}, write --{key}={value}"
    assert getattr(parse(Toy, [message.rsplit(" ", 1)[1]]), key) in (value, (value,))


@pytest.mark.parametrize("argv", [["--name", "--stepz=3"], ["--steps", "--"], ["--name", "--mode", "on"]])
def test_other_missing_values_are_refused_with_the_general_advice(argv):
    assert f"{argv[0]}: has no value; write {argv[0]}=VALUE" in error(Toy, *argv)


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "rate: 1: 2",
        "- rate",
        "just words",
        "rate: 1\n---\nrate: 2",
        "a: *b",
        "{[a]: b}",
        "\trate: 1",
        b"rate: \xff\xfe",
        b"\x00\x01",
    ],
)
def test_a_broken_yaml_file_is_one_line_with_its_name(write, content):
    message = error(Toy, write(content))
    assert "a.yaml" in message
    assert "\n" not in message


def test_a_missing_yaml_file_is_named(tmp_path):
    assert "none.yaml" in error(Toy, str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in error(Toy, str(tmp_path / "folder.yaml"))


def test_all_problems_are_reported_together(write, tmp_path):
    files = [write("rate: quick\nmany: [a]\ncolour: red"), write("a: [", "b.yaml"), str(tmp_path / "none.yaml")]
    message = error(Toy, *files, "--steps=-1", "--flag=perhaps", "--nam=x", "stray", "--mode")
    for culprit in ("rate", "colour", "b.yaml", "none.yaml", "steps", "flag", "nam", "stray", "mode"):
        assert culprit in message
    assert len(message.splitlines()) == 9


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_yaml_runs_no_code(write, tmp_path, tag):
    mark = tmp_path / "mark"
    error(Toy, write(f"rate: {tag} ['touch {mark}']"))
    error(Toy, write(f"{tag} ['touch {mark}']"))
    assert not mark.exists()


def test_change_gives_a_checked_copy():
    before = sample.Settings()
    after = configurator.change(before, "temperature", "1")
    assert (after.temperature, before.temperature) == (1.0, sample.Settings.temperature)
    assert dataclasses.replace(after, temperature=before.temperature) == before
    for key, text in [("temperature", "hot"), ("temperature", "-1"), ("top_k", "1.5"), ("top_p", ""), ("seed", "x")]:
        with pytest.raises(ConfigError, match=key):
            configurator.change(before, key, text)


def test_version_prints_what_a_bug_report_needs(capsys):
    with pytest.raises(SystemExit) as end:
        parse(train.TrainConfig, ["config/nope.yaml", "--version"])
    assert end.value.code == 0
    assert re.fullmatch(rf"RoboPoet {re.escape(VERSION)}, torch \S+, Python \S+\n", capsys.readouterr().out)
    project = tomllib.loads((files.HOME / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "robopoet.VERSION"}}


@pytest.mark.parametrize(
    ("cls", "choices"),
    [
        (train.TrainConfig, "[muon adamw adafactor]"),
        (sample.SampleConfig, "[auto tokens line sentence paragraph speech scene]"),
    ],
)
def test_help_prints_the_choices_of_a_key(cls, choices):
    assert choices in configurator.usage(cls)


def test_the_keys_that_were_given_are_known(write):
    cfg = parse(train.TrainConfig, [write("n_layer: 3"), "--seed=1337"])
    assert cfg.given == {"n_layer", "seed"} and train.TrainConfig().given == frozenset()
    assert "given" in error(train.TrainConfig, "--given=seed") and "no such key" in error(
        train.TrainConfig, "--given=x"
    )


def test_a_config_that_would_fill_memory_or_never_end_is_refused_in_one_line(write, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
    for name, content, message in (
        ("many.yaml", "".join(f"key{i}: 1\n" for i in range(10**6)), "at most 1,048,576"),
        ("some.yaml", "".join(f"{i}: 1\n" for i in range(90_000)), "holds over 100,000 values"),
        ("few.yaml", "".join(f"{i}: 1\n" for i in range(40_000)), "and 39,980 more"),
        ("laughs.yaml", laughs, "has an alias"),
        ("deep.yaml", "a: " + "[" * 5000, "nests over 20 deep"),
        ("long.yaml", f"n_layer: {'x' * 10**5}", "n_layer"),
        ("pipe.yaml", None, "not a regular file"),
    ):
        path = str(tmp_path / "pipe.yaml") if content is None else write(content, name)
        with within(30):
            found = error(train.TrainConfig, path)
        assert message in found and len(found) < 10_000

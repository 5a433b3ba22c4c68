"""What few need, a logger or a sorter of suffixes, is imported by those who ask for it; the rest runs without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
OPTIONAL = "wandb tensorboard rustbpe pydivsufsort lxml pyarrow gguf transformers matplotlib huggingface_hub".split()

# runs command lines one after another in this process; after each, prints which of OPTIONAL are imported
RUN = """
import json, runpy, sys
optional, blocked, commands = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))  # to import one raises ImportError
for command in commands:
    sys.argv, code = command, 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    print("\\nended:", json.dumps([code, [name for name in optional if sys.modules.get(name)]]))
"""


def run(*commands: list[str], blocked: list[str]) -> tuple[list[list], str]:
    """Each command's exit code and the optional modules imported by then; and what all of them print on stderr."""
    arguments = map(json.dumps, (OPTIONAL, blocked, commands))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(line[7:]) for line in lines if line.startswith("ended: ")], done.stderr


@pytest.fixture
def poem(small, tmp_path):
    """The commands that prepare with characters, train, evaluate and sample."""
    keys = small | {"dataset": tmp_path / "bins", "max_iters": 2, "eval_interval": 2}
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question.\n\n" * 200)
    prepare = ["prepare.py", f"--input={tmp_path}/book.txt", f"--out={tmp_path}/bins", "--tokenizer=char"]
    train = ["train.py", *(f"--{key}={value}" for key, value in keys.items())]
    sample = ["sample.py", f"{tmp_path}/out/best.pt", "--max_new_tokens=4", "--device=cpu", "--dtype=float32"]
    return prepare, train, sample


def test_without_what_is_optional_all_runs_but_what_needs_it(poem, tmp_path):
    prepare, train, sample = poem
    bpe = [*prepare[:2], f"--out={tmp_path}/bpe", "--tokenizer=bpe", "--vocab_size=270"]
    ends, said = run(*poem, bpe, [*sample, "--check"], [*train, "--wandb=offline"], blocked=OPTIONAL)
    assert [code for code, _ in ends] == [0, 0, 0, 2, 2, 0]
    assert "prepare.py: tokenizer: bpe needs rustbpe: pip install rustbpe" in said
    assert "sample.py: originality: needs pydivsufsort: pip install pydivsufsort" in said
    assert "warning: wandb is left out: " in said and "pip install wandb" in said and "Traceback" not in said


@pytest.mark.slow
def test_what_is_optional_is_imported_by_those_who_ask_for_it(poem):
    pytest.importorskip("tensorboard")
    ends, _ = run(*poem, [*poem[1], "--tensorboard=true", "--sample_tokens=4"], blocked=[])
    assert ends == [[0, []]] * 3 + [[0, ["tensorboard", "pydivsufsort"]]]  # for the sample and what it copies


def test_sampling_does_not_import_torchs_compiler(random_pt):
    code = (
        "import sys\nfrom sample import Poet\n"
        f"Poet({str(random_pt)!r}, 'cpu', 'float32').write('a', max_new_tokens=3)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr

"""Windows lacks fcntl, resource and most signals: all scripts run in a process where these are absent."""

import json
import subprocess
import sys
from pathlib import Path

from robopoet import portable

REPO = Path(__file__).parents[1]
HIDDEN = "fcntl resource termios pty pwd grp".split()

# runs command lines one after another in this process, with what Windows lacks hidden from all but torch
RUN = """
import json, os, runpy, signal, subprocess, sys, tempfile
import torch, tqdm
hidden, commands = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(hidden))
for name in [name for name in dir(signal) if name.startswith("SIG") and not name.startswith("SIG_")]:
    if name not in ("SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV"):
        delattr(signal, name)
del signal.setitimer, signal.getitimer, signal.alarm, signal.pause, signal.ITIMER_REAL, os.O_DIRECTORY, os.pread
for module in [name for name in sys.modules if name.split(".")[0] == "filelock"]:
    del sys.modules[module]  # torch has imported it with fcntl
for command in commands:
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        print("ended:", end.code)
        break
"""


def test_all_scripts_run_where_windows_lacks_what_unix_has(small, tmp_path):
    (tmp_path / "book.txt").write_text("Être ou ne pas être — 存在 — that is the question.\n\n" * 200, "utf-8")
    prepare = ["prepare.py", f"--input={tmp_path}/book.txt", f"--out={tmp_path}/bins", "--vocab_size=290"]
    keys = small | {"dataset": tmp_path / "bins", "sample_tokens": 9}
    train = ["train.py", *(f"--{key}={value}" for key, value in keys.items())]
    resume = [*train, "--init_from=auto", "--max_iters=9"]
    sample = ["sample.py", f"{tmp_path}/out/best.pt", "--max_new_tokens=9", "--prompt=存在", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(HIDDEN), json.dumps([prepare, train, resume, sample])],
        cwd=REPO,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    said = done.stdout.decode("cp1252")
    assert done.returncode == 0 and "ended" not in said and b"Traceback" not in done.stderr, done.stderr.decode()
    assert "resuming from" in said and "step 6" in said and "\n??" in said
    assert not (tmp_path / "out" / ".lock").exists()  # without fcntl, filelock's lock is the file itself


def test_what_the_system_has_is_used():
    assert portable.peak_resident_mb() > 10
    assert None not in (portable.SIGUSR1, portable.SIGHUP, portable.SIGALRM)


def test_a_process_does_not_count_the_memory_of_the_one_that_started_it():
    child = "from robopoet import portable; print(portable.peak_resident_mb())"
    start = f"import subprocess, sys; kept = b'1' * 2**29; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", start], cwd=REPO, capture_output=True, text=True)
    assert 1 < float(done.stdout) < 256

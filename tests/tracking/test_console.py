"""The console as a user meets it: the real rich, in another process, on a real pseudo-terminal and through a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_train.tracking import json_lines
from skyrl_train.tracking.console import Status
from skyrl_train.tracking.run_folder import RunFolder
from tracking.conftest import clean_environment

RUN = """
import logging, sys, time
from skyrl_train.tracking.logs import setup_logging
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo
from skyrl_train.tracking.tracker import Tracker
folder = RunFolder(sys.argv[1])
setup_logging(folder=folder.path)
with Tracker(folder, "console", RunInfo(project="p", name="r", total_steps=4)) as tracker:
    for step in range(1, 5):
        with tracker.step(step) as log:
            with tracker.phase("generate", tokens=100):
                time.sleep(float(sys.argv[2]))
                logging.getLogger("skyrl.test").warning("a warning in step %d", step)
                print("a print in step", step)
            log({"reward/mean": step / 4, "eval/größe/accuracy": 0.5, "eval/[b]x/accuracy": 0.25})
            if step == 3 and "raise" in sys.argv:
                raise RuntimeError("broken")
"""
LINE = re.compile(
    r"step (\d)/4  reward [01]\.\d\d  gen 0\.\d\ds [\d,]+ tok/s  eval 0\.38 \(größe 0\.50, \[b\]x 0\.25\)"
)
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def on_a_terminal(script: str, *args: str | Path, stderr: Path | None = None, **environment: str) -> tuple[int, str]:
    """Runs a script with a pseudo-terminal as its stdin, stdout and stderr; its status and what it printed."""
    ours, theirs = pty.openpty()
    errors = open(stderr, "wb") if stderr else theirs  # noqa: SIM115 - closed below, or the terminal's
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdin=theirs, stdout=theirs, stderr=errors, env=clean_environment(**environment), start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    if stderr:
        errors.close()  # type: ignore[union-attr]
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that the last writer left
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    return process.wait(60), seen.decode()


def final_screen(output: str) -> str:
    """What is left after carriage returns and line erasures, colours removed."""
    output = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]", "", output)
    rows, row = [""], 0
    for token in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token.endswith("A") and token.startswith("\x1b["):
            row -= int(token[2:-1] or 1)
        elif token != "\r":
            rows[row] += token
    return "\n".join(rows)


def test_a_pipe_gets_plain_lines(python, tmp_path: Path):
    done = python(RUN, tmp_path / "run", "0")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith(f"p/r: 4 steps, into {tmp_path / 'run'}\n")
    assert LINE.findall(done.stdout) == ["1", "2", "3", "4"]
    assert done.stderr.splitlines() == [f"WARNING skyrl.test: a warning in step {n}" for n in range(1, 5)]
    console_log = (tmp_path / "run" / "console.log").read_text().splitlines()
    assert console_log == [line for line in done.stdout.splitlines() if not line.startswith("a print")]
    assert "a warning in step 4" in (tmp_path / "run" / "logs" / "trainer.log").read_text()


def test_a_pipe_stays_plain_where_colour_is_forced(python, tmp_path: Path):
    done = python(RUN, tmp_path / "run", "0", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b" not in done.stdout and len(LINE.findall(done.stdout)) == 4


def test_a_terminal_shows_the_lines_and_what_goes_on(tmp_path: Path):
    status, output = on_a_terminal(RUN, tmp_path / "run", "0.35", TERM="xterm-256color")
    assert status == 0, output
    assert HIDE_CURSOR in output and output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert "generate 0s" in output and "ETA" in output and "━" in output and "▁" in output
    screen = final_screen(output).splitlines()
    assert [m[1] for m in map(LINE.fullmatch, screen) if m] == ["1", "2", "3", "4"]
    for text in ("a print in step {}", "WARNING skyrl.test: a warning in step {}"):
        assert all(text.format(n) in screen for n in range(1, 5))
    assert not [line for line in screen if "ETA" in line]  # the display is gone at the end


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path):
    status, output = on_a_terminal(RUN, tmp_path / "run", "0", TERM="dumb")
    assert status == 0 and "\x1b" not in output and len(LINE.findall(output)) == 4


def test_an_error_gives_the_terminal_back(tmp_path: Path):
    status, output = on_a_terminal(RUN, tmp_path / "run", "0", "raise", TERM="xterm")
    assert status == 1
    assert output.rindex(SHOW_CURSOR) < output.index("Traceback") and "RuntimeError: broken" in output
    assert [row["step"] for row in json_lines.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_stderr_in_a_file_stays_there_while_the_display_is_on(tmp_path: Path):
    errors = tmp_path / "errors.txt"
    _, output = on_a_terminal(RUN, tmp_path / "run", "0", stderr=errors, TERM="xterm")
    assert errors.read_text().count("WARNING skyrl.test: a warning in step") == 4
    assert "a warning" not in output and HIDE_CURSOR in output


@pytest.mark.parametrize("terminal", ["xterm", ""])
def test_an_ascii_console_prints_what_it_can(tmp_path: Path, python, terminal: str):
    if terminal:
        status, output = on_a_terminal(RUN, tmp_path / "run", "0.3", TERM=terminal, PYTHONIOENCODING="ascii")
        assert "#" in output and "▁" not in output
    else:
        done = python(RUN, tmp_path / "run", "0", PYTHONIOENCODING="ascii")
        status, output = done.returncode, done.stdout
    assert status == 0 and "gr??e 0.50" in output and output.isascii()
    assert not [e for e in json_lines.read(tmp_path / "run" / "events.jsonl") if e["event"] == "sink_failed"]


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.replace('print("a print in step", step)', "pass"), str(tmp_path / "run"), "0.05"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(), text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and "BrokenPipe" not in errors
    assert len(list(json_lines.read(tmp_path / "run" / "metrics.jsonl"))) == 4


@pytest.mark.parametrize("width", [1, 10, 40, 80, 200])
def test_the_display_never_wraps(width: int):
    status = Status(1000)
    status.running(3, ["update", "a phase with quite a long name"])
    status.ended(3, {"reward/mean": 0.5, "tokens_per_s/generate": 123456.0})
    assert 0 < len(status.text(width)) <= width


def test_time_left_is_the_mean_step_times_the_steps_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr("skyrl_train.tracking.console.time.monotonic", lambda: now)
    status = Status(10)
    assert status.seconds_left() is None
    for step in range(1, 4):
        now += 2.0
        status.ended(step, {})
    assert status.seconds_left() == pytest.approx(7 * 2.0)
    now += 0.5
    assert status.seconds_left() == pytest.approx(7 * 2.0 - 0.5)


def test_a_resumed_run_goes_on_counting(folder: RunFolder, capsys):
    from skyrl_train.tracking.console import ConsoleSink
    from skyrl_train.tracking.sink import RunInfo

    sink = ConsoleSink(RunInfo(project="p", name="r", total_steps=20), folder)
    sink.open(12)
    sink.log(13, {})
    sink.close(failed=False)
    assert capsys.readouterr().out == f"p/r: 20 steps, after step 12, into {folder.path}\nstep 13/20\n"

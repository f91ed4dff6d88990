from __future__ import annotations

import math
from pathlib import Path

import pytest

from skyrl_train.errors import DataError
from skyrl_train.tracking.report import ends, main, read_metrics, summarize
from skyrl_train.tracking.run_folder import RunFolder


def span(folder: RunFolder, event: str, start: float, end: float, **fields) -> None:
    folder.append_event(event, start=start, end=end, **({"step": 1} | fields))


def a_run(folder: RunFolder) -> None:
    """Twenty steps, reward 0.05 to 1; one step of 10 s on the timeline."""
    folder.append_event("run_start")
    folder.append_metrics(0, {"eval/all/avg_score": 0.25, "eval/add/avg_score": 0.25})
    for step in range(1, 21):
        folder.append_metrics(step, {"reward/mean": step / 20, "time/step": 0.5})
    folder.append_metrics(21, {"reward/mean": math.nan, "eval/all/avg_score": 0.75, "eval/add/avg_score": 0.75})
    span(folder, "phase", 0, 3, name="load", parent=None, step=None)
    span(folder, "phase", 10, 16, name="generate", parent=None)
    span(folder, "phase", 11, 15, name="decode", parent="generate")
    span(folder, "phase", 16, 19, name="update", parent=None)
    span(folder, "step", 10, 20)


def test_the_summary(folder: RunFolder):
    a_run(folder)
    folder.append_event("run_end")
    assert summarize(folder.path).splitlines() == [
        "steps 1 to 21 in 10.0s (0.50s a step)",
        # the first 4 of 21: (1 + 2 + 3 + 4) / 20 / 4 = 0.125; the last 4, one of them NaN: (18 + 19 + 20) / 20 / 3
        "reward rose from 0.12 to 0.95   ▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██    (means of the first and last 4 steps)",
        "eval add rose from 0.25 to 0.75   ▁█",
        "time generate 60 % (6.00s), update 30 % (3.00s), other 10 % (1.00s)",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([math.nan], None),
        ([1.0], (1.0, 1.0, 1)),
        ([1.0, 3.0, 2.0], (1.0, 2.0, 1)),
        ([0.0] * 10 + [5.0] * 80 + [1.0] * 10, (0.0, 1.0, 10)),
    ],
)
def test_ends(values, expected):
    assert ends(values) == expected


def test_a_killed_run_says_in_what(folder: RunFolder):
    a_run(folder)
    phase = {"who": "trainer", "step": 2, "parent": None}
    folder.append_event("phase_start", name="generate", **phase)
    folder.append_event("phase", name="generate", start=20, end=21, **phase)
    folder.append_event("phase_start", name="update", **phase)
    folder.append_event("phase_start", name="backward", **(phase | {"parent": "update"}))
    with folder.metrics.open("a") as file:
        file.write('{"step": 22, "rew')  # still being written: read, not repaired
    assert summarize(folder.path).splitlines()[-1] == "the run is not over, or was killed, in update > backward"
    assert folder.metrics.read_text().endswith('"rew')


def test_trouble_is_told(folder: RunFolder):
    folder.append_event("run_start")
    folder.append_metrics(1, {"trajectories/failed": 2.0, "reward/mean": 0.5})
    span(folder, "step", 0, 1, step=2, error="EngineError: gone")
    folder.append_event("run_end")
    text = summarize(folder.path)
    assert '2 trajectories failed: see "cause" in trajectories/' in text
    assert "step 2 failed: EngineError: gone" in text


def test_metrics_are_read_as_numbers_in_order(folder: RunFolder):
    for step in (2, 1):
        folder.append_metrics(step, {"x": math.inf})
    assert [(row["step"], row["x"]) for row in read_metrics(folder.metrics)] == [(1, math.inf), (2, math.inf)]


def test_a_folder_of_something_else(tmp_path: Path, capsys):
    with pytest.raises(DataError, match="not the folder of a run"):
        summarize(tmp_path)
    assert main([str(tmp_path)]) == 2 and "error: " in capsys.readouterr().err
    assert main([]) == 2 and "usage" in capsys.readouterr().err


def test_the_command(folder: RunFolder, capsys):
    a_run(folder)
    assert main([str(folder.path)]) == 0
    assert "reward rose from 0.12" in capsys.readouterr().out

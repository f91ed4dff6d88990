from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from pathlib import Path

import pytest

from skyrl_train.config.load import from_mapping
from skyrl_train.tracking import json_lines
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo, Sink
from skyrl_train.tracking.tracker import Tracker


class Recorder(Sink):
    """A sink that keeps what it is told."""

    def __init__(self, run, folder):
        super().__init__(run, folder)
        self.told = []

    def open(self, resumed_after):
        self.told.append(("open", resumed_after))

    def log(self, step, metrics):
        self.told.append(("log", step, dict(metrics)))

    def summary(self, values):
        self.told.append(("summary", dict(values)))

    def close(self, failed):
        self.told.append(("close", failed))


class Faulty(Recorder):
    def log(self, step, metrics):
        super().log(step, metrics)
        raise ConnectionError("the dashboard is down")


def a_tracker(folder: RunFolder, *sinks: str) -> Tracker:
    return Tracker(folder, [f"{__name__}:{name}" for name in sinks], RunInfo(total_steps=3))


def events(folder: RunFolder, kind: str) -> list[dict]:
    return [row for row in json_lines.read(folder.events) if row["event"] == kind]


def recorder(tracker: Tracker) -> Recorder:
    return next(sink for sink in tracker._sinks if isinstance(sink, Recorder))


def test_a_step_goes_out_once_with_all_its_metrics(folder: RunFolder):
    with a_tracker(folder, "Recorder") as tracker:
        sink = recorder(tracker)
        with tracker.step(1) as log:
            log({"policy/loss": 1.0, "policy/kl": 0.5})
            with tracker.phase("generate", tokens=7) as phase:
                time.sleep(0.01)
                phase.tokens = 1000
            log({"policy/loss": 2.0})
            assert not folder.metrics.exists()
        tracker.summary({"best": 3})
    (row,) = json_lines.read(folder.metrics)
    assert row["step"] == 1 and row["policy/loss"] == 2.0 and row["policy/kl"] == 0.5
    assert 0.01 <= row["time/generate"] <= row["time/step"]
    assert row["tokens_per_s/generate"] == pytest.approx(1000 / row["time/generate"])
    logged = {k: v for k, v in row.items() if k not in ("step", "time")}
    assert sink.told == [("open", 0), ("log", 1, logged), ("summary", {"best": 3}), ("close", False)]
    assert json.loads((folder.path / "summary.json").read_text()) == {"best": 3}


def test_the_timeline(folder: RunFolder):
    with a_tracker(folder) as tracker:
        with tracker.phase("load"):
            pass
        with tracker.step(1), tracker.phase("update"), tracker.phase("backward", who="policy/0") as inner:
            inner.tokens = 5
        tracker.event("note", name="mine", text="hello")
    load, backward, update = events(folder, "phase")
    assert (load["name"], load["step"], load["parent"]) == ("load", None, None)
    assert (update["name"], update["step"], update["who"], update["parent"]) == ("update", 1, "trainer", None)
    assert (backward["who"], backward["parent"], backward["tokens"]) == ("policy/0", "update", 5)
    assert update["start"] <= backward["start"] <= backward["end"] <= update["end"]
    (step,) = events(folder, "step")
    assert step["start"] <= update["start"] and update["end"] <= step["end"] and step["step"] == 1
    assert abs(step["end"] - time.time()) < 60
    assert [e["name"] for e in events(folder, "phase_start")] == ["load", "update", "backward"]
    assert events(folder, "note")[0]["text"] == "hello" and events(folder, "note")[0]["name"] == "mine"
    assert len(events(folder, "run_start")) == len(events(folder, "run_end")) == 1


def test_phases_of_tasks_side_by_side_keep_their_own_parents(folder: RunFolder):
    async def worker(tracker: Tracker, name: str, seconds: float) -> None:
        with tracker.phase(name):
            await asyncio.sleep(seconds)
            with tracker.phase("inner"):
                await asyncio.sleep(seconds)

    async def main(tracker: Tracker) -> None:
        with tracker.step(1), tracker.phase("generate"):
            await asyncio.gather(worker(tracker, "a", 0.02), worker(tracker, "b", 0.03))

    with a_tracker(folder) as tracker:
        asyncio.run(main(tracker))
    parents = {(e["name"], e["parent"]) for e in events(folder, "phase")}
    assert parents == {("generate", None), ("a", "generate"), ("b", "generate"), ("inner", "a"), ("inner", "b")}
    (row,) = json_lines.read(folder.metrics)
    assert row["time/inner"] < row["time/a"] + row["time/b"]  # "inner" ran from 0.02 to 0.06, counted once
    assert max(row["time/a"], row["time/b"]) <= row["time/generate"] <= row["time/step"]


def test_threads_may_time_phases_and_log(folder: RunFolder):
    with a_tracker(folder) as tracker, tracker.step(1) as log:

        def work(index: int) -> None:
            for n in range(20):
                with tracker.phase("score", tokens=1):
                    log({f"thread/{index}": n})

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    (row,) = json_lines.read(folder.metrics)
    assert [row[f"thread/{i}"] for i in range(4)] == [19.0] * 4
    assert len(events(folder, "phase")) == len(events(folder, "phase_start")) == 80


def test_an_exception_in_a_step_leaves_an_event_and_closes_the_sinks(folder: RunFolder):
    with pytest.raises(ZeroDivisionError), a_tracker(folder, "Recorder") as tracker:
        sink = recorder(tracker)
        with tracker.step(1) as log:
            log({"x": 1.0})
        with tracker.step(2) as log, tracker.phase("update"):
            log({"x": 2.0})
            raise ZeroDivisionError("by zero")
    assert [row["step"] for row in json_lines.read(folder.metrics)] == [1]
    good, failed = events(folder, "step")
    assert "error" not in good
    assert failed["step"] == 2 and failed["error"] == "ZeroDivisionError: by zero" and failed["metrics"]["x"] == 2.0
    assert events(folder, "phase")[0]["error"] == events(folder, "run_end")[0]["error"] == "ZeroDivisionError: by zero"
    assert [told for told in sink.told if told[0] == "close"] == [("close", True)]


def test_a_cancelled_step_is_closed_as_well(folder: RunFolder):
    async def main() -> None:
        with a_tracker(folder) as tracker, tracker.step(1), tracker.phase("generate"):
            await asyncio.sleep(30)

    async def cancel() -> None:
        task = asyncio.create_task(main())
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    assert events(folder, "run_end")[0]["error"].startswith("CancelledError")


def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(folder: RunFolder, caplog):
    with a_tracker(folder, "Faulty") as tracker:
        sink = recorder(tracker)
        for step in (1, 2):
            with tracker.step(step) as log:
                log({"x": 1.0})
    assert [row["step"] for row in json_lines.read(folder.metrics)] == [1, 2]
    assert [told[0] for told in sink.told] == ["open", "log"]
    assert "Faulty is left out from now on: ConnectionError: the dashboard is down" in caplog.text
    assert events(folder, "sink_failed")[0]["sink"] == "Faulty"


def test_numbers_of_any_kind(folder: RunFolder, caplog):
    import numpy as np
    import torch

    with a_tracker(folder) as tracker, tracker.step(1) as log:
        log({"int": 3, "bool": True, "numpy": np.float32(0.5), "tensor": torch.tensor(2), "nan": math.nan})
        log({"inf": -math.inf, "text/odd": "many", "vector/odd": torch.ones(3)})
    (row,) = json_lines.read(folder.metrics)
    assert (row["int"], row["bool"], row["numpy"], row["tensor"]) == (3.0, 1.0, 0.5, 2.0)
    assert (row["nan"], row["inf"]) == ("NaN", "-Infinity")
    assert "text/odd" not in row and "vector/odd" not in row
    assert "metric text/odd is left out: str is not a number" in caplog.text


def test_resuming_gives_each_step_once(folder: RunFolder, caplog):
    for done, last in ((0, 5), (3, 7)):
        with a_tracker(RunFolder(folder.path), "Recorder") as tracker:
            sink = recorder(tracker)
            tracker.resume_after(done)
            for step in range(done + 1, last + 1):
                with tracker.step(step) as log:
                    log({"run": float(done)})
    rows = list(json_lines.read(folder.metrics))
    assert [(row["step"], row["run"]) for row in rows] == [(n, 0.0 if n <= 3 else 3.0) for n in range(1, 8)]
    assert sink.told[0] == ("open", 3)
    assert "2 steps after step 3 are done again" in caplog.text
    (resume,) = events(folder, "resume")
    assert (resume["after"], resume["removed"]) == (3, 2)


def test_misuse_is_told(folder: RunFolder):
    with a_tracker(folder) as tracker:
        with tracker.step(1) as log:
            pass
        with pytest.raises(RuntimeError, match="step 1 has ended"):
            log({"x": 1.0})
    with pytest.raises(RuntimeError, match="is closed"), tracker.step(2):
        pass
    tracker.close()  # a second time does nothing
    assert len(events(folder, "run_end")) == 1


def test_a_step_inside_a_step_is_refused(folder: RunFolder):
    tracker = a_tracker(folder)
    with pytest.raises(RuntimeError, match="step 2 starts inside step 1"), tracker.step(1), tracker.step(2):
        pass
    assert events(folder, "run_end")


def test_open_reads_the_config(folder: RunFolder):
    config = from_mapping(
        {"trainer": {"policy": {"model": {"path": "org/m"}}, "logger": [f"{__name__}:Recorder", "jsonl"],
                     "project_name": "p", "run_name": "r"}}
    )  # fmt: skip
    with Tracker.open(config, folder, total_steps=9) as tracker:
        run = recorder(tracker).run
    assert (run.project, run.name, run.total_steps) == ("p", "r", 9)
    assert run.config["trainer"]["policy"]["model"]["path"] == "org/m"
    assert "run_name: r" in folder.config.read_text()


def test_tracking_loads_without_torch(python, tmp_path: Path):
    done = python(
        "import sys, skyrl_train.tracking.tracker, skyrl_train.tracking.console, skyrl_train.tracking.report\n"
        "import skyrl_train.tracking.tensorboard as t\n"
        "from skyrl_train.tracking.run_folder import RunFolder\n"
        "from skyrl_train.tracking.sink import RunInfo\n"
        "t.TensorBoardSink(RunInfo(), RunFolder(sys.argv[1])).open(0)\n"
        "print([m for m in ('torch', 'transformers', 'tensorflow', 'wandb', 'matplotlib') if m in sys.modules])",
        tmp_path / "run",
    )
    assert (done.stdout, done.stderr) == ("[]\n", ""), done.stderr

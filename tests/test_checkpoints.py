"""Checkpoints: whole or not there, the right one found, the old ones forgotten, another run's refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.checkpoints import Checkpoints, Intervals
from skyrl_train.errors import CheckpointError
from skyrl_train.storage.step_folders import LATEST

sys.path.insert(0, str(Path(__file__).parent))
from killed_saves import Files, checkpoints, restore, save

SCRIPT = Path(__file__).with_name("killed_saves.py")


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("global_step_")) for p in folder.glob("global_step_*"))


@pytest.mark.parametrize("how", ["next", "again", "remote", "remote-again"])
def test_a_kill_between_any_two_operations_leaves_a_whole_checkpoint(how: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "ckpts"), how]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 3, "three", -1)
    assert restore(tmp_path) == (3, "three")
    assert (tmp_path / LATEST).read_text() == "3"
    assert json.loads((tmp_path / "global_step_3" / "trainer.json").read_text())["prompts"]["position"] == 6


def test_nothing_to_resume_is_a_new_run(tmp_path: Path) -> None:
    assert restore(tmp_path / "absent") == (0, "nothing")
    save(tmp_path, 3, "three", -1)
    fresh = checkpoints(tmp_path, "mine")
    assert asyncio.run(fresh.restore("none", None)) == 0
    assert fresh.policy.value == "mine"  # type: ignore[attr-defined]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, str(step), keep=2)
    assert steps(tmp_path) == [4, 5]
    save(tmp_path, 6, "6", keep=-1)
    assert steps(tmp_path) == [4, 5, 6]
    save(tmp_path, 7, "7", keep=1)
    assert steps(tmp_path) == [7]


def test_step_10_is_newer_than_step_9(tmp_path: Path) -> None:
    for step in (9, 10):
        save(tmp_path, step, str(step), keep=-1)
    (tmp_path / LATEST).unlink()
    assert restore(tmp_path) == (10, "10")


def test_a_run_that_went_back_goes_on_from_its_own_branch(tmp_path: Path) -> None:
    """Resumed from step 2 although 4 and 6 exist: what it saves as 3 is the latest, and is not the one forgotten."""
    for step in (2, 4, 6):
        save(tmp_path, step, f"first {step}", keep=-1)
    one = checkpoints(tmp_path, "nothing", keep=2)
    assert asyncio.run(one.restore("from_path", str(tmp_path / "global_step_2"))) == 2
    save(tmp_path, 3, "second 3", keep=2)
    assert steps(tmp_path) == [2, 3]
    assert restore(tmp_path) == (3, "second 3")


def test_the_pointer_decides_and_a_bad_one_gives_way_to_what_is_there(tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, step, str(step), keep=-1)
    (tmp_path / LATEST).write_text("2\n")
    assert restore(tmp_path) == (2, "2")
    for text in ("99", "", "newest", "-1"):
        (tmp_path / LATEST).write_text(text)
        assert restore(tmp_path) == (4, "4")


def test_half_made_folders_never_count(tmp_path: Path) -> None:
    save(tmp_path, 2, "two", -1)
    for name in (
        "global_step_9.partial",
        "global_step_8.removed",
        "global_step_7.replaced/x",
        "global_step_",
        "exports",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "global_step_11").write_text("a file")
    (tmp_path / LATEST).unlink()
    assert checkpoints(tmp_path, "").folders.steps() == [2]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"step": 2}', '{"step": "2", "prompts": {}, "identity": {}}',
     '{"step": 2, "prompts": [], "identity": {}}', '{"step": true, "prompts": {}, "identity": {}}', "\x00\x00"],
)  # fmt: skip
def test_a_corrupt_trainer_json_is_named_with_the_way_out(text: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, str(step), -1)
    (tmp_path / "global_step_2" / "trainer.json").write_text(text)
    with pytest.raises(CheckpointError, match="global_step_2 is no whole checkpoint") as raised:
        restore(tmp_path)
    assert "resume_mode=from_path" in str(raised.value) and str(tmp_path / "global_step_1") in str(raised.value)


def test_a_trainer_json_that_is_no_text_or_lacks_the_place_in_the_data(tmp_path: Path) -> None:
    save(tmp_path, 2, "2", -1)
    file = tmp_path / "global_step_2" / "trainer.json"
    state = json.loads(file.read_text())
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        restore(tmp_path)
    del state["prompts"]["position"]
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="position"):
        restore(tmp_path)


@pytest.mark.parametrize("path", ["absent", ".", "global_step_9", ""])
def test_from_path_needs_a_whole_checkpoint(path: str, tmp_path: Path) -> None:
    save(tmp_path, 2, "2", -1)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*trainer\.resume_path"):
        asyncio.run(checkpoints(tmp_path, "").restore("from_path", str(tmp_path / path) if path else None))


def test_from_path_takes_one_from_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "a", 2, "two", -1)
    one = checkpoints(tmp_path / "b", "")
    assert asyncio.run(one.restore("from_path", str(tmp_path / "a" / "global_step_2"))) == 2
    assert one.policy.value == "two"  # type: ignore[attr-defined]
    assert not (tmp_path / "b").exists()


def test_another_runs_checkpoint_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 2, "2", -1)
    other = checkpoints(tmp_path, "mine", seed=7, model="n")
    with pytest.raises(CheckpointError, match="written by another run") as raised:
        asyncio.run(other.restore("latest", None))
    for part in ("seed: 1 there, 7 here", "model: 'm' there, 'n' here", "trainer.ckpt_path", "resume_mode=none"):
        assert part in str(raised.value)
    assert other.policy.value == "mine" and other.sampler.step == 0  # type: ignore[attr-defined]


def test_a_checkpoint_of_other_data_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    save(tmp_path, 2, "2", -1)
    other = checkpoints(tmp_path, "mine")
    other.sampler.fingerprint = "other"
    with pytest.raises(CheckpointError, match="data changed"):
        asyncio.run(other.restore("latest", None))
    assert other.policy.value == "mine"  # type: ignore[attr-defined]


class Fails(Files):
    async def save(self, folder: str) -> None:
        await super().save(folder)
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_error_and_costs_nothing_saved(tmp_path: Path) -> None:
    save(tmp_path, 1, "1", keep=1)
    one = checkpoints(tmp_path, "", keep=1)
    one.policy = Fails("2")  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written to .*global_step_2.*No space left"):
        asyncio.run(one.save(2))
    assert restore(tmp_path) == (1, "1")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file", 1, "1", -1)


class Notes(Files):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__("")
        self.calls: list[str] = []

    async def save(self, folder: str) -> None:
        self.calls.append(Path(folder).parent.stem)
        await super().save(folder)

    async def export(self, folder: str) -> None:
        self.calls.append("/".join(Path(folder).parts[-3:]))


@pytest.mark.parametrize(
    ("intervals", "calls"),
    [
        ((2, -1), ["global_step_2", "global_step_4", "global_step_5"]),
        ((-1, 3), ["exports/global_step_3/policy", "exports/global_step_5/policy"]),
        ((0, -1), []),
        ((5, 5), ["exports/global_step_5/policy", "global_step_5"]),
    ],
)
def test_saves_and_exports_come_at_their_intervals_and_after_the_last_step(
    intervals: tuple[int, int], calls: list[str], tmp_path: Path
) -> None:
    notes = Notes()
    one: Any = checkpoints(tmp_path, "")
    one.policy = notes
    one.intervals = Intervals(checkpoint=intervals[0], export=intervals[1], total_steps=5)

    async def run() -> None:
        for step in range(1, 6):
            await one.save_if_due(step)

    asyncio.run(run())
    assert notes.calls == calls
    assert isinstance(one, Checkpoints)
    shutil.rmtree(tmp_path)


class Counter:
    """Remembers a number from step to step."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def with_more(folder: Path, value: str, count: int) -> Checkpoints:
    one: Any = checkpoints(folder, value)
    one.critic, one.memory = Files(value), {"counter": Counter(count)}
    return one


def test_the_critic_and_what_the_driver_remembers_come_back(tmp_path: Path) -> None:
    first: Any = with_more(tmp_path, "three", 7)
    first.sampler.step, first.sampler.position = 3, 6
    asyncio.run(first.save(3))
    assert sorted(p.name for p in (tmp_path / "global_step_3").iterdir()) == ["critic", "policy", "trainer.json"]
    second: Any = with_more(tmp_path, "nothing", 0)
    assert asyncio.run(second.restore("latest", None)) == 3
    assert second.critic.value == second.policy.value == "three" and second.memory["counter"].value == 7


def test_what_an_older_checkpoint_does_not_hold_stays(tmp_path: Path) -> None:
    save(tmp_path, 3, "three", -1)
    other: Any = checkpoints(tmp_path, "nothing")
    other.memory = {"counter": Counter(5)}
    asyncio.run(other.restore("latest", None))
    assert other.memory["counter"].value == 5


class Slow(Files):
    """Writes on when it is let to."""

    def __init__(self, value: str, error: Exception | None = None) -> None:
        super().__init__(value)
        self.gate, self.error = asyncio.Event(), error

    async def saved(self) -> None:
        await self.gate.wait()
        if self.error:
            raise self.error


def in_background(folder: Path, policy: Slow, **options: Any) -> Checkpoints:
    one: Any = checkpoints(folder, "", keep=1)
    one.policy, one.background, one.timeout = policy, True, options.get("timeout", 30.0)
    return one


def test_a_background_save_counts_when_it_is_written(tmp_path: Path) -> None:
    save(tmp_path, 1, "1", keep=1)
    policy = Slow("2")

    async def run() -> None:
        one = in_background(tmp_path, policy)
        one.sampler.step, one.sampler.position = 2, 4
        await one.save(2)
        one.sampler.step, one.sampler.position = 3, 6  # the run goes on
        assert steps(tmp_path / "nothing") == [] and (tmp_path / LATEST).read_text() == "1"
        assert restore_in_thread(tmp_path) == (1, "1")
        policy.gate.set()
        await one.finish()

    asyncio.run(run())
    assert restore(tmp_path) == (2, "2") and steps(tmp_path) == [2]


def restore_in_thread(folder: Path) -> tuple[int, str]:
    """As ``restore``, where an event loop runs already."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(restore, folder).result()


def test_what_went_wrong_in_the_background_ends_the_next_step(tmp_path: Path) -> None:
    policy = Slow("2", OSError(28, "No space left on device"))

    async def run() -> None:
        one = in_background(tmp_path, policy)
        await one.save_if_due(2)
        await one.save_if_due(3)  # not yet known, and nothing is due
        policy.gate.set()
        await asyncio.sleep(0.01)
        with pytest.raises(CheckpointError, match=r"step 2 cannot be written to .*No space left"):
            await one.save_if_due(3)
        await one.close()

    asyncio.run(run())
    assert restore(tmp_path) == (0, "nothing")


def test_a_disk_that_does_not_answer_has_a_deadline(tmp_path: Path) -> None:
    async def run() -> None:
        one = in_background(tmp_path, Slow("2"), timeout=0.05)
        await one.save(2)
        with pytest.raises(CheckpointError, match=r"step 2 .*global_step_2: .*0\.05 s \(trainer\.ckpt_timeout\)"):
            await one.save(4)

    asyncio.run(run())


def test_when_a_run_ends_with_an_error_what_was_being_written_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = Slow("2"), Slow("4", OSError(5, "Input/output error"))

    async def run() -> None:
        for step, policy in ((2, good), (4, bad)):
            policy.gate.set()
            one = in_background(tmp_path, policy)
            await one.save(step)
            await one.close()

    asyncio.run(run())
    assert (tmp_path / LATEST).read_text() == "2" and "Input/output error" in caplog.text


class Lost(Files):
    """Writes on another machine."""

    async def save(self, folder: str) -> None:
        Path(folder).mkdir()


def test_workers_that_write_elsewhere_are_noticed(tmp_path: Path) -> None:
    one: Any = checkpoints(tmp_path, "")
    one.policy = Lost("")
    with pytest.raises(CheckpointError, match="need a folder that all share"):
        asyncio.run(one.save(2))


def test_remote_folders_are_kept_found_and_forgotten_alike(tmp_path: Path) -> None:
    far = f"file://{tmp_path}/deep/er"
    for step in range(1, 5):
        save(far, step, str(step), keep=2)
    assert restore(far) == (4, "4") and steps(tmp_path / "deep" / "er") == [3, 4]
    one = checkpoints(far, "nothing", keep=2)
    assert asyncio.run(one.restore("from_path", f"{far}/global_step_3")) == 3
    with pytest.raises(CheckpointError, match=f"no whole checkpoint.*{far}/global_step_3"):
        asyncio.run(one.restore("from_path", f"{far}/global_step_9"))
    (tmp_path / "deep" / "er" / "global_step_4" / "trainer.json").unlink()
    assert restore(far) == (3, "3")
    save(far, 4, "again", keep=2)
    assert restore(far) == (4, "again")
    (tmp_path / "deep" / "er" / "global_step_4" / "of_a_third_worker").write_text("old")
    save(far, 4, "once more", keep=2)
    assert restore(far) == (4, "once more")
    left = sorted(p.name for p in (tmp_path / "deep" / "er" / "global_step_4").rglob("*") if p.is_file())
    assert left == ["optimizer", "trainer.json", "weights"]

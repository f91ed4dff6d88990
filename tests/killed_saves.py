"""Saves that are killed before each of their file operations in turn. test_checkpoints.py runs this in its own process.

python killed_saves.py FOLDER next|again|remote|remote-again      prints how many operations a save has
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

from skyrl_train.checkpoints import Checkpoints, Intervals
from skyrl_train.data.sampler import PromptSampler

TOUCHES_FILES = ("open", "os.", "shutil.")
KILLED = 9


class Files:
    """A policy that is two files and a folder; whoever restores it sees whether they belong together."""

    def __init__(self, value: str) -> None:
        self.value = value

    async def save(self, folder: str) -> None:
        here = local(folder)
        (here / "deep").mkdir(parents=True)
        for name in ("weights", "deep/optimizer"):
            (here / name).write_text(self.value)

    async def saved(self) -> None:
        """Nothing is written in the background."""

    async def restore(self, folder: str) -> None:
        (self.value,) = {(local(folder) / name).read_text() for name in ("weights", "deep/optimizer")}


def local(folder: str) -> Path:
    return Path(folder.removeprefix("file://"))


def checkpoints(folder: Path | str, value: str, keep: int = -1, **identity: object) -> Checkpoints:
    return Checkpoints(
        folder=folder,
        exports=f"{folder}/exports",
        keep=keep,
        intervals=Intervals(checkpoint=2, export=-1, total_steps=5),
        identity={"model": "m", "seed": 1} | identity,
        policy=Files(value),  # type: ignore[arg-type]
        sampler=PromptSampler(20, 2, seed=1),
    )


def save(folder: Path | str, step: int, value: str, keep: int) -> None:
    one = checkpoints(folder, value, keep)
    one.sampler.step, one.sampler.position = step, 2 * step
    asyncio.run(one.save(step))


def restore(folder: Path | str) -> tuple[int, str]:
    one = checkpoints(folder, "nothing")
    step = asyncio.run(one.restore("latest", None))
    assert one.sampler.step == step
    return step, one.policy.value  # type: ignore[attr-defined]


def killed_before(operation: int, folder: Path | str, step: int, keep: int) -> bool:
    """Saves in a child that is killed before its n-th operation on files; False if the save has fewer."""
    child = os.fork()
    if child == 0:
        left = operation

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(TOUCHES_FILES):
                left -= 1
                if left < 0:
                    os._exit(KILLED)  # at once: no buffer is flushed, no finally runs

        asyncio.get_event_loop_policy()  # loaded before counting begins
        sys.addaudithook(hook)
        save(folder, step, "new", keep)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED)
    return os.waitstatus_to_exitcode(status) == KILLED


def main(here: Path, how: str) -> int:
    """``next``: step 3 after 1 and 2, keeping two. ``again``: step 2 once more, keeping that alone. ``remote``: as
    ``next``, by way of fsspec; ``remote-again``: as ``again``."""
    step, keep = (2, 1) if how.endswith("again") else (3, 2)
    folder = f"file://{here}" if how.startswith("remote") else here
    operation = 0
    while True:
        shutil.rmtree(here, ignore_errors=True)
        for earlier in (1, 2):
            save(folder, earlier, f"old {earlier}", keep)
        killed = killed_before(operation, folder, step, keep)
        found = restore(folder)
        assert found in ((2, "old 2"), (step, "new")), (operation, found)
        for any_step in checkpoints(folder, "").folders.steps():
            path = f"{folder}/global_step_{any_step}"
            assert asyncio.run(checkpoints(folder, "").restore("from_path", path)) == any_step
        save(folder, 4, "after", keep)
        assert restore(folder) == (4, "after")
        left = sorted(p.name for p in here.iterdir())
        whole = [name for name in left if name.startswith("global_step_")]
        assert whole[-1] == "global_step_4" and len(whole) == keep, (operation, left)
        assert len(left) == keep + 1, (operation, left)  # and the pointer: nothing half-made is left
        if not killed:
            assert found == (step, "new")
            return operation
        operation += 1


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))

"""The learner's side of a broadcast group."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from skyrl_train.weight_sync.group import NCCL_OF_SERVERS, agree_with_servers


def test_nccl_is_set_as_in_the_servers_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NCCL_OF_SERVERS:
        monkeypatch.setenv(name, "1")  # restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    agree_with_servers()
    assert (os.environ["NCCL_CUMEM_ENABLE"], os.environ["NCCL_NVLS_ENABLE"]) == ("0", "1")
    asked = "import os; print(os.environ['NCCL_CUMEM_ENABLE'])"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "0\n"


LEFT_ALONE = """
import asyncio
from torch.distributed import TCPStore
from skyrl_train.runtime.background import beside
from skyrl_train.weight_sync.group import EngineGroup

async def main():
    group = EngineGroup("skyrl", "gloo", 2, timeout=60.0)
    port = group.open("127.0.0.1")
    server = TCPStore("127.0.0.1", port, 2, is_master=False)
    server.set("came", "and went")
    meeting = asyncio.create_task(beside("meeting", group.join))
    await asyncio.sleep(1)
    assert not meeting.done()
    group.give_up()
    meeting.cancel()
    await asyncio.gather(meeting, return_exceptions=True)

asyncio.run(main())
"""


def test_a_meeting_with_an_engine_that_is_gone_does_not_keep_the_run_from_ending() -> None:
    subprocess.run([sys.executable, "-c", LEFT_ALONE], check=True, timeout=40)

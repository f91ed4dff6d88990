"""TensorBoard, through tensorboard's own event writer: torch and TensorFlow stay out of this file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from skyrl_train.errors import MissingPackageError
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo, Sink


class TensorBoardSink(Sink):
    """Writes scalars to ``tensorboard/`` in the run folder: ``tensorboard --logdir outputs``."""

    def __init__(self, run: RunInfo, folder: RunFolder) -> None:
        super().__init__(run, folder)
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise MissingPackageError(
                "tensorboard", "trainer.logger=tensorboard", 'pip install "skyrl-train[tensorboard]"'
            ) from error
        self._events, self._summaries, self._new_writer = event_pb2, summary_pb2, EventFileWriter
        self._writer: Any = None

    def open(self, resumed_after: int) -> None:
        self._writer = self._new_writer(str(self.folder.path / "tensorboard"))
        if resumed_after:
            # Readers drop what an earlier file holds from this step on: those steps are done again.
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(resumed_after + 1, session_log=start)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._add(step, summary=self._summaries.Summary(value=values))

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()  # once a step: a kill loses nothing

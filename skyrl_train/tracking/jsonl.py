"""``metrics.jsonl``: one line a step, in the run folder. Always on."""

from __future__ import annotations

from collections.abc import Mapping

from skyrl_train.tracking import json_lines
from skyrl_train.tracking.sink import Sink


class JsonlSink(Sink):
    """Appends the metrics of a step to ``metrics.jsonl``; final values go to ``summary.json``."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.folder.append_metrics(step, metrics)

    def summary(self, values: Mapping[str, object]) -> None:
        json_lines.replace_with(self.folder.path / "summary.json", [json_lines.dumps(dict(values)) + "\n"])

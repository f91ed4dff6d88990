"""Weights & Biases. ``WANDB_MODE=offline`` and the other variables of wandb mean what they mean everywhere."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from skyrl_train.errors import ConfigError, MissingPackageError
from skyrl_train.tracking import json_lines
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo, Sink

LIMITS = {"login_timeout": 60, "init_timeout": 90, "finish_timeout": 120}
"""Seconds to wait for the server, each unless ``WANDB_<NAME>`` says otherwise. wandb's own finish waits for ever."""


class WandbSink(Sink):
    """Logs to one wandb run. Its id is kept in ``wandb_id.txt``, so a resumed run folder goes on in the same run."""

    def __init__(self, run: RunInfo, folder: RunFolder) -> None:
        super().__init__(run, folder)
        try:
            self._wandb: Any = importlib.import_module("wandb")  # optional, so no type checker may need it
        except ImportError as error:
            raise MissingPackageError("wandb", "trainer.logger=wandb", 'pip install "skyrl-train[wandb]"') from error
        self._run: Any = None

    def open(self, resumed_after: int) -> None:
        id_file = self.folder.path / "wandb_id.txt"
        # A run that starts from the beginning is a new one, whatever the folder holds of an earlier.
        known = id_file.read_text().strip() if resumed_after and id_file.exists() else None
        limits = {name: value for name, value in LIMITS.items() if f"WANDB_{name.upper()}" not in os.environ}
        try:
            self._run = self._wandb.init(
                project=self.run.project,
                name=self.run.name,
                config=dict(self.run.config),
                dir=str(self.folder.path),
                id=known,
                resume="allow",
                # Our console already redraws the terminal, and the run folder keeps its lines.
                settings={"console": "off", "silent": True, **limits},
            )
        except (self._wandb.Error, TimeoutError) as error:
            raise ConfigError(
                "trainer.logger", "wandb", f"the run cannot be started: {error}",
                "Run `wandb login`, or set WANDB_MODE=offline and upload later with `wandb sync`.",
            ) from error  # fmt: skip
        # Steps are a metric of their own: wandb's counter refuses to go back, and a resumed run does.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        json_lines.replace_with(id_file, [f"{self._run.id}\n"])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

"""Logging: our loggers are below ``skyrl``; each process writes ``logs/<role>.log`` into the run folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from skyrl_train.config.environ import read_environment

OURS = ("skyrl", "skyrl_train")
THEIRS = ("transformers", "")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_warned: set[tuple[str, str]] = set()


def setup_logging(*, folder: Path | str | None, role: str = "trainer", level: str | None = None) -> None:
    """Sends our log lines to stderr and to the run folder. Calling it again replaces what it set before.

    Args:
        folder: the run folder; None logs to stderr only, which Ray collects per worker.
        role: of this process, the name of its file.
        level: of our loggers; None takes ``SKYRL_LOG_LEVEL``, or ``info``. Other libraries are kept at warnings.

    Raises:
        ConfigError: ``SKYRL_LOG_LEVEL`` is no level.
    """
    level = level or read_environment().skyrl_log_level
    handlers: list[logging.Handler] = [_Stderr()]
    if folder is not None:
        logs = Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        handlers.append(_File(logs / f"{role}.log"))
    for name in (*OURS, *THEIRS):
        log = logging.getLogger(name)
        for old in [h for h in log.handlers if isinstance(h, _Stderr | _File)]:
            log.removeHandler(old)
            old.close()
        if name in OURS:
            log.setLevel(level.upper())
            log.propagate = False  # the root's handlers, Hydra's among them, would print each line once more
            for handler in handlers:
                log.addHandler(handler)
        elif folder is not None:
            log.propagate = False  # of the root this means nothing, and transformers does it by itself once imported
            others = _File(handlers[1].path)  # type: ignore[attr-defined]
            others.setLevel(logging.WARNING)
            log.addHandler(others)


def warn_once(log: logging.Logger, message: str, *args: object) -> None:
    """Warns, unless this very text was already given by this logger in this process."""
    text = message % args if args else message
    if (log.name, text) not in _warned:
        _warned.add((log.name, text))
        log.warning("%s", text, stacklevel=2)


class _Stderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is now: while the progress display is on, that is the display's own proxy."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(_Short())

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        """Given by the base class; the property decides."""


class _File(logging.FileHandler):
    """Appends to a log file; text that is no UTF-8 never stops a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self.setFormatter(logging.Formatter(_FORMAT))


class _Short(logging.Formatter):
    """Plain for news, with the level for anything worse."""

    def format(self, record: logging.LogRecord) -> str:
        self._style._fmt = "%(message)s" if record.levelno == logging.INFO else "%(levelname)s %(name)s: %(message)s"
        return super().format(record)

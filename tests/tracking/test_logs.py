from __future__ import annotations

import logging
import sys

import pytest

from skyrl_train.errors import ConfigError
from skyrl_train.tracking.logs import setup_logging, warn_once
from skyrl_train.tracking.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("clean_logging")


def log_file(folder: RunFolder, role: str = "trainer") -> str:
    return (folder.path / "logs" / f"{role}.log").read_text()


def test_each_process_has_its_file(folder: RunFolder, capsys, monkeypatch):
    monkeypatch.delenv("SKYRL_LOG_LEVEL", raising=False)
    setup_logging(folder=folder.path, role="policy-0")
    logging.getLogger("skyrl.trainer").info("a step")
    logging.getLogger("skyrl_train.x").warning("100 %% of %s", "it")
    logging.getLogger("skyrl.trainer").debug("a detail")
    assert capsys.readouterr().err == "a step\nWARNING skyrl_train.x: 100 % of it\n"
    written = log_file(folder, "policy-0")
    assert "INFO skyrl.trainer: a step\n" in written and "WARNING skyrl_train.x: 100 % of it\n" in written
    assert "detail" not in written


def test_the_environment_sets_the_level(folder: RunFolder, capsys, monkeypatch):
    monkeypatch.setenv("SKYRL_LOG_LEVEL", "Debug")
    setup_logging(folder=folder.path)
    logging.getLogger("skyrl.trainer").debug("a detail")
    assert capsys.readouterr().err == "DEBUG skyrl.trainer: a detail\n" and "a detail" in log_file(folder)
    monkeypatch.setenv("SKYRL_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="SKYRL_LOG_LEVEL='loud'"):
        setup_logging(folder=folder.path)


def test_setting_up_again_replaces(folder: RunFolder, capsys):
    setup_logging(folder=None, level="info")
    logging.getLogger("skyrl.a").info("early")
    setup_logging(folder=folder.path, level="warning")
    setup_logging(folder=folder.path, level="info")
    logging.getLogger("skyrl.a").info("late")
    assert capsys.readouterr().err == "early\nlate\n"
    assert log_file(folder).count("late") == 1 and "early" not in log_file(folder)


def test_warnings_of_other_libraries_are_kept_in_the_file_alone(folder: RunFolder, capsys):
    setup_logging(folder=folder.path, level="info")
    logging.getLogger("transformers").warning("theirs")
    logging.getLogger("transformers").info("their chatter")
    logging.getLogger("skyrl.a").warning("ours")
    assert capsys.readouterr().err == "WARNING skyrl.a: ours\n"
    assert log_file(folder).count("theirs") == log_file(folder).count("ours") == 1
    assert "chatter" not in log_file(folder)


def test_the_line_goes_where_stderr_is_now(folder: RunFolder, monkeypatch, capsys):
    setup_logging(folder=folder.path, level="info")
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    logging.getLogger("skyrl.a").info("moved")
    assert capsys.readouterr().out == "moved\n"


def test_text_that_is_no_unicode_does_not_break_the_file(folder: RunFolder, capsys):
    setup_logging(folder=folder.path, level="info")
    logging.getLogger("skyrl.a").info("half \ud83d a pair")
    assert "half \\ud83d a pair" in log_file(folder)


def test_warn_once(caplog):
    log, other = logging.getLogger("skyrl.once"), logging.getLogger("skyrl.other")
    for value in (1, 2, 1, 2):
        warn_once(log, "value %d of 100%%", value)
    warn_once(other, "value %d of 100%%", 1)
    warn_once(log, "50% plain")
    assert caplog.messages == ["value 1 of 100%", "value 2 of 100%", "value 1 of 100%", "50% plain"]
    assert {record.filename for record in caplog.records} == {"test_logs.py"}


def test_transformers_keeps_no_warning_to_itself(folder: RunFolder):
    """Once imported, it stops its logger from reaching the root's handlers."""
    from transformers.utils import logging as theirs

    theirs.get_logger("transformers.models")
    setup_logging(folder=folder.path, level="info")
    theirs.get_logger("transformers.models").warning("of a model")
    assert log_file(folder).count("of a model") == 1

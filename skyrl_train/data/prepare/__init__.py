"""``skyrl data``: one function a task, imported when it is asked for."""

from skyrl_train.data.prepare.command import add_arguments, prepare_data, run
from skyrl_train.data.prepare.table import PREPARERS

__all__ = ["PREPARERS", "add_arguments", "prepare_data", "run"]

"""Prompts: read from files and data sets, drawn in a resumable order, and prepared by ``skyrl data``."""

from skyrl_train.data.dataset import PromptDataset, load_prompts
from skyrl_train.data.sampler import PromptSampler

__all__ = ["PromptDataset", "PromptSampler", "load_prompts"]

"""The section ``data``: what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.config.fields import key


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Training and validation data: Parquet or JSON-lines files, folders of them, or Hugging Face data set names."""

    train_data: list[str] = key(["~/data/gsm8k/train.parquet"], "Data to train on.", path=True)
    val_data: list[str] = key(["~/data/gsm8k/validation.parquet"], "Data to evaluate on; [] for none.", path=True)
    shuffle: bool = key(True, "Shuffle the training data anew in each epoch, from trainer.seed.")

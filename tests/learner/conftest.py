"""A tiny model folder, a config for it, and a batch with advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from skyrl_train.batch import TrainBatch, collate
from skyrl_train.config.door import load_config
from skyrl_train.config.schema import Config
from skyrl_train.types import Prompt, Trajectory


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 model of random weights."""
    from skyrl_train.models.folders import save_pretrained
    from skyrl_train.models.tiny import make_model
    from skyrl_train.models.tokenizers import make_tokenizer

    folder = tmp_path_factory.mktemp("learner")
    (folder / "small.yaml").write_text(
        "{model_type: qwen3, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, "
        "head_dim: 16, intermediate_size: 48, max_position_embeddings: 128, initializer_range: 0.2}"
    )
    torch.manual_seed(0)
    tokenizer = make_tokenizer("char")
    save_pretrained(make_model(str(folder / "small.yaml"), tokenizer, longest=100), tokenizer, folder / "model")
    return folder / "model"


@pytest.fixture
def config(model_folder: Path) -> Callable[..., Config]:
    """Makes configs: ``config("trainer.seed=1")``."""

    def make(*overrides: str) -> Config:
        return load_config([
            f"trainer.policy.model.path={model_folder}", "trainer.num_threads=1", "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=4", "trainer.algorithm.use_kl_loss=false",
            "generator.n_samples_per_prompt=2", "trainer.policy.optimizer_config.lr=1e-3",
            "trainer.policy.optimizer_config.weight_decay=0.1", *overrides,
        ])  # fmt: skip

    return make


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """A worker sets threads and determinism for its whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def batch() -> TrainBatch:
    """Four prompts of two ragged samples each, some of several turns, some with advantage 0; not yet scored."""
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 95, (count,), generator=draw).tolist()

    made = []
    for group, size in enumerate((3, 9, 1, 6)):
        asked = tokens(size)
        for sample in range(2):
            prompt = Prompt(uid=str(group), messages=(), env_class="x")
            one = Trajectory(prompt=prompt, sample=sample, prompt_ids=asked)
            one.append_sampled(tokens(1 + 5 * sample + group), [-1.0] * (1 + 5 * sample + group), "stop", 0)
            if group == 1:
                one.append_observed(tokens(3))
                one.append_sampled(tokens(4), [-1.0] * 4, "stop", 0)
            made.append(one)
    ready = collate(made, 0)
    per_row = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 2.0, -0.25])
    ready.advantages = torch.where(ready.response_mask, per_row[:, None], 0.0)
    ready.returns = ready.advantages
    return ready

"""One side of ``cpu_vs_trl.py``, in a process of its own: ``python -m benchmarks.cpu_vs_trl_side FOLDER``.

Reads ``FOLDER/job.json``; writes ``FOLDER/steps.json``, a record for each step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import skyrl_train  # noqa: F401 - sets GOMP_SPINCOUNT, for both sides, before torch loads
from benchmarks.cpu_vs_trl import LR, PROMPTS, SAMPLES, Job
from skyrl_train.envs.base import StepResult
from skyrl_train.tracking.sink import Sink
from skyrl_train.types import Prompt

PHASES: tuple[str, ...] = ("generate", "update")


class Stopwatch(Sink):
    """CPU and wall seconds of each step, and of its phases; given as ``trainer.logger``."""

    steps: list[dict[str, float]]

    def open(self, resumed_after: int) -> None:
        self.steps, self._phases = [], dict.fromkeys(PHASES, 0.0)
        self._start = self._mark = (time.process_time(), time.perf_counter())
        self._now: str | None = None

    def running(self, step: int | None, phases: Sequence[str]) -> None:
        now = time.process_time()
        if self._now is not None:
            self._phases[self._now] += now - self._since
        self._now = phases[0] if phases and phases[0] in PHASES else None
        self._since = now

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        tokens = metrics["response/length_mean"] * metrics["trajectories/started"]
        self._mark = lap(self.steps, self._mark, self._phases, tokens, metrics["reward/mean"])
        self._phases = dict.fromkeys(PHASES, 0.0)

    def close(self, failed: bool) -> None:
        if not failed:
            write(self.folder.path, self.steps)


def lap(
    steps: list[dict[str, float]], since: tuple[float, float], phases: dict[str, float], tokens: float, reward: float
) -> tuple[float, float]:
    """Adds the record of a step that has just ended; returns the clocks."""
    now = time.process_time(), time.perf_counter()
    cpu, wall = now[0] - since[0], now[1] - since[1]
    parts = {f"{name}_cpu_s": seconds for name, seconds in phases.items()}
    parts["rest_cpu_s"] = cpu - sum(phases.values())
    steps.append({"cpu_s": cpu, "wall_s": wall, **parts, "tokens": tokens, "reward": reward})
    return now


def write(folder: Path, steps: list[dict[str, float]]) -> None:
    """Leaves the records for the parent process."""
    (folder / "steps.json").write_text(json.dumps(steps))


def ours(job: Job) -> None:
    """Our side, as the real command would run it; nothing but the options that are matched is changed."""
    from skyrl_train.build import train
    from skyrl_train.config.door import load_config
    from skyrl_train.config.preflight import preflight

    config = load_config(
        [
            "+experiment=quickstart",
            f"data.train_data=[{job.data}/train.parquet]",
            "data.val_data=[]",
            f"trainer.policy.model.path={job.model}",
            f"trainer.policy.optimizer_config.lr={LR}",
            f"trainer.num_threads={job.threads}",
            f"trainer.max_steps={job.steps}",
            f"trainer.train_batch_size={PROMPTS}",
            f"trainer.policy_mini_batch_size={PROMPTS // job.updates}",
            f"generator.n_samples_per_prompt={SAMPLES}",
            f"generator.sampling_params.max_generate_length={job.max_tokens}",
            "trainer.eval_interval=-1",
            "trainer.eval_before_train=false",
            "trainer.ckpt_interval=-1",
            "trainer.hf_save_interval=-1",
            "trainer.logger=benchmarks.cpu_vs_trl_side:Stopwatch",
        ]
    )
    preflight(config, "train")
    train(config, Path(job.folder))


def trl(job: Job) -> None:
    """TRL's side: no reference model, no checkpointing of activations, fused optimizer, nothing logged or saved."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from skyrl_train.data.dataset import load_prompts

    torch.set_num_threads(job.threads)
    prompts = list(load_prompts([f"{job.data}/train.parquet"], env_class_default="addition"))
    clocks = Clocks()
    trainer_class, callback = timed(job, clocks)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa"),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        reward_funcs=judge(prompts, clocks),
        args=trl_config(job),
        train_dataset=Dataset.from_list([{"prompt": list(p.messages), "uid": p.uid} for p in prompts]),
        callbacks=[callback],
    )
    trainer.train()
    write(Path(job.folder), clocks.steps)


@dataclass(slots=True)
class Clocks:
    """What TRL's hooks gather."""

    steps: list[dict[str, float]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    mark: tuple[float, float] = (0.0, 0.0)
    tokens: float = 0.0
    reward: float = 0.0


def judge(prompts: Sequence[Prompt], clocks: Clocks) -> Callable[..., Any]:
    """The same judge as a reward function: our env, once for each completion."""
    from skyrl_train.config.environment import EnvironmentConfig
    from skyrl_train.envs.registry import make_env

    settings, by_uid = EnvironmentConfig(), {prompt.uid: prompt for prompt in prompts}

    def score(uid: str, text: str) -> float:
        result = make_env(by_uid[uid], settings).step(text)
        assert isinstance(result, StepResult)
        return result.reward

    def reward(completions: list[Any], uid: list[str], completion_ids: list[list[int]], **_: Any) -> Any:
        rewards = [score(u, completion[0]["content"]) for u, completion in zip(uid, completions, strict=True)]
        clocks.reward, clocks.tokens = sum(rewards) / len(rewards), float(sum(map(len, completion_ids)))
        return rewards

    return reward


def timed(job: Job, clocks: Clocks) -> tuple[Any, Any]:
    """TRL's trainer with clocks around generation and training steps, and a callback that closes a step of ours."""
    from transformers import TrainerCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Timed(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return super()._generate(*args, **kwargs)
            finally:
                clocks.phases["generate"] += time.process_time() - start

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            start, generated = time.process_time(), clocks.phases["generate"]
            try:
                return super().training_step(*args, **kwargs)
            finally:
                clocks.phases["update"] += time.process_time() - start - (clocks.phases["generate"] - generated)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clocks.mark = time.process_time(), time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % job.updates == 0:  # a step of ours is ``updates`` of TRL's
                clocks.mark = lap(clocks.steps, clocks.mark, clocks.phases, clocks.tokens, clocks.reward)
                clocks.phases.update(dict.fromkeys(PHASES, 0.0))

    return Timed, Clock()


def trl_config(job: Job) -> Any:
    """TRL's options, those that are matched with ours and those that make it fast."""
    from trl.trainer.grpo_config import GRPOConfig

    each = PROMPTS * SAMPLES // job.updates
    rows = min(job.trl_rows, each)
    return GRPOConfig(
        output_dir=f"{job.folder}/trl",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=each // rows,
        generation_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=job.max_tokens,
        max_steps=job.steps * job.updates,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        num_iterations=1,
        loss_type="dapo",
        learning_rate=LR,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        logging_steps=job.steps * job.updates,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main() -> None:
    """Runs the job of the folder given."""
    job = Job(**json.loads((Path(sys.argv[1]) / "job.json").read_text()))
    {"ours": ours, "trl": trl}[job.side](job)


if __name__ == "__main__":
    main()

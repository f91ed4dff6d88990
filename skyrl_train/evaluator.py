"""Evaluation on held-out prompts: per data source, average score and pass@k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import comb

from skyrl_train.generator.generator import Generator, require_usable
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.tracker import Tracker
from skyrl_train.types import Prompt, Trajectory


class Evaluator:
    """Generates with the eval sampling parameters every ``interval`` steps and after the last.

    Args:
        generator: shared with training.
        prompts: the validation set.
        interval: steps between evaluations; not positive turns evaluation off.
        batch_size: prompts in flight at once.
        total_steps: the last step is always evaluated.
        folder: where the trajectories go; None keeps none (``trainer.dump_eval_results``).
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        *,
        interval: int,
        batch_size: int,
        total_steps: int,
        tracker: Tracker,
        folder: RunFolder | None,
    ) -> None:
        self.generator, self.prompts, self.interval, self.batch_size = generator, prompts, interval, batch_size
        self.total_steps, self.tracker, self.folder = total_steps, tracker, folder

    async def run_if_due(self, step: int) -> dict[str, float]:
        """Metrics of an evaluation, or nothing when none is due."""
        return await self.run(step) if self.due(step) else {}

    def due(self, step: int) -> bool:
        """Whether ``step`` (0: before the first) is to be evaluated."""
        wanted = self.interval > 0 and len(self.prompts) > 0
        return wanted and (step % self.interval == 0 or step == self.total_steps)

    async def run(self, step: int) -> dict[str, float]:
        """Evaluates now. Failed trajectories count as not passed, and are counted.

        Raises:
            GenerationError: every trajectory failed, so there is no score.
        """
        trajectories: list[Trajectory] = []
        with self.tracker.phase("eval") as phase:
            for first in range(0, len(self.prompts), self.batch_size):
                batch = self.prompts[first : first + self.batch_size]
                trajectories += await self.generator.generate(batch, step, "eval")
            phase.tokens = sum(t.sampled for t in trajectories)
        if self.folder is not None:
            self.folder.write_trajectories(step, trajectories, kind="eval")
        require_usable(trajectories, step)
        return eval_metrics(trajectories)


def eval_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """``eval/<source>/avg_score``, ``pass_at_<k>`` (k = 1, 2, 4, ... n), the failed; ``all`` over every source."""
    by_source: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_source[trajectory.prompt.data_source].append(trajectory)
    metrics: dict[str, float] = {}
    for source, members in ({"all": list(trajectories)} | by_source).items():
        groups: dict[str, list[float]] = defaultdict(list)
        for t in members:
            groups[t.prompt.uid].append(t.reward if t.usable else 0.0)
        samples = max(map(len, groups.values()))
        scores = [score for group in groups.values() for score in group]
        metrics[f"eval/{source}/avg_score"] = sum(scores) / len(scores)
        for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
            metrics[f"eval/{source}/pass_at_{k}"] = sum(pass_at_k(g, k) for g in groups.values()) / len(groups)
        metrics[f"eval/{source}/failed"] = float(sum(not t.usable for t in members))
    return metrics


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """The unbiased estimate that one of k samples passes, from n >= k samples of which c have a positive reward.

    1 - C(n - c, k) / C(n, k), equation 1 of Chen et al. 2021 (arXiv 2107.03374). With n < k, whether any passed.
    """
    n, c = len(scores), sum(score > 0 for score in scores)
    if n < k:
        return float(c > 0)
    return 1.0 - comb(n - c, k) / comb(n, k)

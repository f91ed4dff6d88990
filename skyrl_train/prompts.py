"""Which prompts belong to which step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from skyrl_train.data.sampler import PromptSampler
from skyrl_train.types import Prompt


class PromptSource:
    """Walks the sampler, step by step, from where it stands to the end of the run.

    Args:
        prompts: the data set.
        sampler: picks each step's rows; its state is the run's place in the data.
        max_steps: where the run ends if the epochs do not end it before (``trainer.max_steps``).
    """

    def __init__(self, prompts: Sequence[Prompt], sampler: PromptSampler, max_steps: int | None) -> None:
        self.prompts, self.sampler, self.max_steps = prompts, sampler, max_steps

    @property
    def step(self) -> int:
        """Steps whose prompts were taken: during step 3, and in its checkpoint, this is 3."""
        return self.sampler.step

    @property
    def total_steps(self) -> int:
        """The number of the last step."""
        total = self.sampler.total_steps
        return total if self.max_steps is None else min(total, self.max_steps)

    def steps(self) -> Iterator[tuple[int, list[Prompt]]]:
        """(step number from 1, its prompts), for the steps that are left."""
        while self.step < self.total_steps:
            yield next(self.sampler.steps(self.prompts))

    def more(self, taken: Collection[str]) -> list[Prompt]:
        """Further prompts for the running step, at most a train batch; none is left if the step has had them all.

        Args:
            taken: ``uid`` of those that the step has had: no prompt is asked twice in one step.
        """
        for _ in range(self.sampler.steps_per_epoch + 1 if len(taken) < len(self.prompts) else 0):
            fresh = [p for p in (self.prompts[i] for i in self.sampler.more()) if p.uid not in taken]
            if fresh:
                return fresh
        return []

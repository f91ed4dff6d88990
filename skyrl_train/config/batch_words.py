"""The one line at start that says what the batch sizes amount to. ``docs/batch_words.md`` explains the words."""

from __future__ import annotations

from skyrl_train.config.schema import Config


def describe(config: Config) -> str:
    """Prompts, trajectories, updates, micro-batches and token budgets of one step, as one sentence."""
    trainer, generator = config.trainer, config.generator
    prompts, samples = trainer.train_batch_size, generator.n_samples_per_prompt
    minis, passes = prompts // trainer.policy_mini_batch_size, trainer.update_epochs_per_batch
    sequences = trainer.policy_mini_batch_size * samples
    micro, tokens = trainer.micro_train_batch_size_per_gpu or 1, trainer.max_tokens_per_microbatch
    micros = -(-sequences // micro) * minis * passes
    parts = f"{_n(micros, 'micro-batch')} of {micro:,}" if tokens is None else f"micro-batches of {_n(tokens, 'token')}"
    again = f" ({passes} passes)" if passes > 1 else ""
    budget = generator.sampling_params.max_generate_length
    turns = f" in each of at most {generator.max_turns} turns" if generator.max_turns > 1 else ""
    return (
        f"{_n(prompts, 'prompt')} x {_n(samples, 'sample')} = {_n(prompts * samples, 'trajectory')} a step, "
        f"{_n(minis * passes, 'update')} of {sequences:,}{again}, {parts}; "
        f"prompts of at most {_n(trainer.max_prompt_length, 'token')}, "
        f"completions of at most {_n(budget, 'token')}{turns}"
    )


def _n(count: int, word: str) -> str:
    plural = {"trajectory": "trajectories", "micro-batch": "micro-batches"}.get(word, word + "s")
    return f"{count:,} {word if count == 1 else plural}"

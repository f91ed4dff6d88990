"""``skyrl warmup``: makes a tiny model and trains it on worked answers until it is right now and then.

Reinforcement learning needs some success to begin with. This is the supervised start: cross-entropy on the assistant's
messages of rows that carry ``extra_info.worked``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.errors import ConfigError
from skyrl_train.models.worked import Example, load_worked, worked_example

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECK_EVERY = 3
"""Steps between two looks at the held-out rows: accuracy rises by some 10 points in that time."""
LR_WARMUP = 50
"""Steps in which the learning rate rises from 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``skyrl warmup``."""
    add = parser.add_argument
    add("--data", required=True, help="folder that `skyrl data` wrote, or one file, with worked answers")
    add("--out", required=True, help="folder of the model; an older model there is replaced")
    add("--model-config", help="YAML of transformers config fields (default: Qwen3 of 0.42 million parameters)")
    add("--tokenizer", choices=("char", "byte"), default="char", help="one token a printable character, or a byte")
    add("--steps", type=int, default=400, help="optimizer steps at most")
    add("--until-accuracy", type=float, default=0.4, help="stop when this share of held-out answers is exact, greedy")
    add("--batch-size", type=int, default=64, help="conversations a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--eval-rows", type=int, default=128, help="held-out rows looked at")
    add("--seed", type=int, default=0, help="of the weights and the order of the rows")
    add("--threads", type=int, help="CPU threads (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Makes the model. Raises DataError, ConfigError or ModelError for what cannot be used."""
    _check(args)
    from skyrl_train.models.folders import save_pretrained
    from skyrl_train.models.tiny import make_model
    from skyrl_train.models.tokenizers import make_tokenizer
    from skyrl_train.storage.whole_folder import check_replaceable

    out = Path(args.out).expanduser()
    check_replaceable(out)
    train, held_out = load_worked(args.data, args.eval_rows)
    _set_up_torch(args.seed, args.threads)
    tokenizer = make_tokenizer(args.tokenizer)
    examples, checks = ([worked_example(tokenizer, prompt) for prompt in rows] for rows in (train, held_out))
    _warn_of_unknown(examples, tokenizer)
    model = make_model(args.model_config, tokenizer, longest=max(len(e.ids) for e in (*examples, *checks)))
    started = time.monotonic()
    done = _train(model, examples, checks, args, tokenizer)
    done |= {"seconds": round(time.monotonic() - started, 1), "parameters": sum(p.numel() for p in model.parameters())}
    save_pretrained(model, tokenizer, out)
    (out / "warmup.json").write_text(json.dumps(done | {"options": vars(args)}, indent=1) + "\n", encoding="utf-8")
    short = "" if done["accuracy"] >= args.until_accuracy else f", short of {args.until_accuracy:.0%}: more --steps?"
    print(
        f"{args.out}: {done['parameters']:,} parameters, {done['steps']} steps, {done['seconds']} s, "
        f"held-out accuracy {done['accuracy']:.0%}{short}"
    )
    return 0


def exact_match(model: PreTrainedModel, checks: list[Example], pad_token_id: int) -> float:
    """Share of examples whose first answer the model writes exactly, greedily."""
    import torch

    model.eval()
    prompts, answers = [e.prompt for e in checks], [e.answer for e in checks]
    with torch.no_grad():
        output: Tensor = model.generate(  # pyright: ignore[reportCallIssue, reportAssignmentType]
            _padded(prompts, pad_token_id, left=True),
            attention_mask=_padded([[1] * len(p) for p in prompts], left=True),
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            pad_token_id=pad_token_id,
        )
    new = output[:, max(map(len, prompts)) :].tolist()
    return sum(row[: len(answer)] == answer for row, answer in zip(new, answers, strict=True)) / len(checks)


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "eval_rows", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be 1 or more.")
    if not 0 <= args.seed < 2**63:
        raise ConfigError("--seed", args.seed, "must be 0 or more.")
    if not 0 < args.lr < 1:
        raise ConfigError("--lr", args.lr, "must be between 0 and 1.", "3e-3 suits the default model.")
    if not 0 < args.until_accuracy <= 1:
        raise ConfigError("--until-accuracy", args.until_accuracy, "is a share: above 0, at most 1.")


def _set_up_torch(seed: int, threads: int | None) -> None:
    import os

    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or cores or 1)
    torch.manual_seed(seed)


def _warn_of_unknown(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    unknown = tokenizer.unk_token_id
    count = sum(unknown in e.ids for e in examples) if unknown is not None else 0
    if count:
        print(
            f"warning: {count:,} of {len(examples):,} rows hold characters that --tokenizer char does not have; each "
            "becomes <unk>. --tokenizer byte has them all.",
            file=sys.stderr,
        )


def _train(
    model: PreTrainedModel,
    examples: list[Example],
    checks: list[Example],
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Steps until the accuracy is reached. Returns how many, the last loss and the last accuracy."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / LR_WARMUP))
    accuracy, loss, step = 0.0, torch.zeros(()), 0
    for step, batch in enumerate(_batches(examples, args), 1):
        model.train()
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0 or step == args.steps:
            accuracy = exact_match(model, checks, int(str(tokenizer.pad_token_id)))
            print(f"warm-up step {step}/{args.steps}  loss {loss.item():.3f}  held-out accuracy {accuracy:.0%}")
            sys.stdout.flush()
            if accuracy >= args.until_accuracy:
                break
    return {"steps": step, "loss": loss.item(), "accuracy": accuracy}


def _batches(examples: list[Example], args: argparse.Namespace) -> Iterator[list[Example]]:
    draw = random.Random(f"warmup/{args.seed}")
    for _ in range(args.steps):
        yield draw.choices(examples, k=args.batch_size)


def _padded(rows: Sequence[Sequence[int]], fill: int = 0, left: bool = False) -> Tensor:
    import torch

    width = max(map(len, rows))
    blanks = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([b + list(r) if left else list(r) + b for r, b in zip(rows, blanks, strict=True)])


def _loss(model: PreTrainedModel, batch: list[Example]) -> Tensor:
    """Cross-entropy of the assistant's tokens, mean over all of the batch."""
    import torch

    ids, mask = _padded([e.ids for e in batch]), _padded([e.mask for e in batch])
    real = _padded([[1] * len(e.ids) for e in batch])
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1]
    targets = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

"""Sequences in one row without padding; a prompt that several responses share stands there once.

    row        p p p | a a | b b b | q q | c          three responses to two prompts
    position   0 1 2   3 4   3 4 5   0 1   2
    sees               p,a   p,b           q,c

Linear layers then compute each token once. For attention, responses are gathered into blocks of similar length whose
keys are the shared prompt and the response's own tokens, so its work too follows the real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skyrl_train.batch import onto
from skyrl_train.models.recompute import kept
from skyrl_train.models.sequence_parallel import SequenceSplit
from skyrl_train.models.varlen import Run, VarlenPlan, gpu_kernel, takes

SHORT = 16
"""Segments up to this length count as equally long."""
WASTE = 1.25
"""In a block, queries and keys are padded to at most this many times the least (together: its square)."""


@dataclass(slots=True)
class Block:
    """``n`` segments attended together, padded to ``R`` queries and ``K`` keys each."""

    queries: Tensor
    """``[n, R]``: positions in the row; a padded one repeats its segment's first."""
    keys: Tensor
    """``[n, K]``: likewise."""
    distance: Tensor
    """``[n, 1, R, K]`` int: how many tokens the key lies before the query; negative where it must not be seen."""
    real: Tensor
    """``[n, R]`` bool: the query is no padding."""


class PackedPlan:
    """The attention of one packed row: by blocks and masks, which runs everywhere, or on a GPU in half precision by
    ``varlen.py``. Either is prepared when it is first used.

    Args:
        segments: in the order of the row, which they cover.
        length: tokens of the row.
        split: the workers that have the row together; None: one has all of it.
    """

    def __init__(
        self, segments: list[_Segment], length: int, device: torch.device | str, split: SequenceSplit | None = None
    ) -> None:
        self.length, self._segments, self._device, self._split = length, segments, device, split
        self._masks: dict[tuple[int | None, torch.dtype], list[Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """See ``models.attention.AttentionPlan``; ``q`` is ``[1, heads, N, head_dim]``."""
        if self._split is None:
            return self._attend(q, k, v, scale, window)
        q, k, v = self._split.by_heads(q, k, v)
        return self._split.by_tokens(self._attend(q, k, v, scale, window))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        if takes(q, window):
            return self._varlen.attend(q, k, v, scale=scale, window=window)
        blocks = self._blocks
        queries = _gather(q, blocks.queries, blocks.query_shapes)
        keys, values = (_gather(x, blocks.keys, blocks.key_shapes) for x in (k, v))
        outputs = []
        attend = partial(scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        # On a GPU this is the way without a kernel of half precision, whose gradients may need all weights of all keys.
        keep = kept if not q.is_cuda else _once
        for block in zip(queries, keys, values, self._masks_of(window, q.dtype), strict=True):
            outputs.append(keep(attend, *block).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, blocks.back)[None]

    @cached_property
    def _varlen(self) -> VarlenPlan:
        kernel = gpu_kernel()
        assert kernel is not None
        return VarlenPlan([Run(s.start, s.length, s.prefix) for s in self._segments], self._device, kernel)

    @cached_property
    def _blocks(self) -> _Blocks:
        return _Blocks([_block(group) for group in _grouped(self._segments)], self.length, self._device)

    def _masks_of(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """``[n, 1, R, K]`` for each block, to be added: 0 where a query sees a key, else -inf.

        Made once for each window; of a mask of bools, every call would make such a tensor for its backward pass.
        """
        if (window, dtype) not in self._masks:
            reach = self.length if window is None else window
            seen = [(d >= 0) & (d < reach) for d in self._blocks.distances]
            self._masks[window, dtype] = [torch.zeros_like(m, dtype=dtype).masked_fill_(~m, -math.inf) for m in seen]
        return self._masks[window, dtype]


class _Blocks:
    """Blocks on their device; each token of the row is a real query of exactly one."""

    def __init__(self, blocks: list[Block], length: int, device: torch.device | str) -> None:
        self.query_shapes = [tuple(block.queries.shape) for block in blocks]
        self.key_shapes = [tuple(block.keys.shape) for block in blocks]
        queries = torch.cat([block.queries.flatten() for block in blocks])
        real = torch.cat([block.real.flatten() for block in blocks])
        back = torch.empty(length, dtype=torch.long)
        back[queries[real]] = real.nonzero().squeeze(1)
        self.queries, self.back = onto(queries, device), onto(back, device)
        self.keys = onto(torch.cat([block.keys.flatten() for block in blocks]), device)
        self.distances = [onto(block.distance, device) for block in blocks]


def _once(attention: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return attention(*inputs)


def _gather(x: Tensor, positions: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Each block's ``[n, heads, R, head_dim]`` of ``x``. One gather serves all blocks, as its backward costs a row."""
    taken = x[0].transpose(0, 1).index_select(0, positions)
    parts = taken.split([rows * width for rows, width in shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(slots=True)
class Packed:
    """Sequences packed for one forward pass; of a row that several workers have together, one worker's tokens."""

    input_ids: Tensor
    """``[1, N]``."""
    position_ids: Tensor
    """``[1, N]``: each token's place in its own sequence."""
    plan: PackedPlan
    score_index: Tensor
    """``[M]``: the positions whose logits predict a response token."""
    targets: Tensor
    """``[M]``: those response tokens."""
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]
    split: SequenceSplit | None = None

    def unpack(self, values: Tensor) -> Tensor:
        """``[M]`` values of response tokens as ``[B, T]``, 0 where there is no token. Every worker gets everyone's."""
        own = values.new_zeros(self.shape).index_put((self.rows, self.columns), values)
        return own if self.split is None else self.split.added(own)


@dataclass(slots=True)
class _Segment:
    """``start:start + length`` in the row; it also sees ``prefix`` (start, length), which comes before it."""

    start: int
    length: int
    prefix: tuple[int, int]


class _Row:
    """Grows sequence by sequence."""

    def __init__(self) -> None:
        self.length = 0
        self.segments: list[_Segment] = []
        self.ids, self.positions, self.index, self.targets = ([np.empty(0, np.int64)] for _ in range(4))
        self._known: dict[bytes | int, _Segment] = {}

    def add(self, prompt: np.ndarray, response: np.ndarray, name: bytes | int) -> None:
        """Sequences of one name share the prompt."""
        head = self._known.get(name)
        if head is None:
            head = self._known[name] = self.append(prompt)
        if len(response):
            own = self.append(response, (head.start, head.length))
            self.index += [[head.start + head.length - 1], np.arange(own.start, own.start + own.length - 1)]
            self.targets.append(response)

    def append(self, ids: np.ndarray, prefix: tuple[int, int] = (0, 0)) -> _Segment:
        segment = _Segment(self.length, len(ids), prefix)
        self.segments.append(segment)
        self.ids.append(ids)
        self.positions.append(np.arange(prefix[1], prefix[1] + len(ids)))
        self.length += len(ids)
        return segment


def pack(
    prompts: Sequence[Sequence[int] | np.ndarray],
    responses: Sequence[Sequence[int] | np.ndarray],
    *,
    share_prompts: bool = True,
    device: torch.device | str = "cpu",
    split: SequenceSplit | None = None,
) -> Packed:
    """Packs ``B`` sequences, each a prompt (at least one token) and a response, into one row.

    Args:
        share_prompts: equal prompts stand in the row once.
        split: the workers that have the row together. It is filled up so that each has as many tokens.
    """
    row = _Row()
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = np.asarray(prompt, np.int64)
        row.add(ids, np.asarray(response, np.int64), ids.tobytes() if share_prompts else number)
    if split is not None and row.length % split.parts:
        row.append(np.zeros(-row.length % split.parts, np.int64))
    lengths = torch.tensor([len(response) for response in responses])
    width = max(1, int(lengths.max()))
    ids, positions, index, targets = (
        torch.from_numpy(np.concatenate(parts)) for parts in (row.ids, row.positions, row.index, row.targets)
    )
    scored = index, targets, *(torch.arange(width) < lengths[:, None]).nonzero(as_tuple=True)
    if split is not None:
        mine = split.tokens(row.length)
        ids, positions = ids[mine], positions[mine]
        own = (index >= mine.start) & (index < mine.stop)
        scored = index[own] - mine.start, *(x[own] for x in scored[1:])
    ids, positions, index, targets, rows, columns = (onto(x, device) for x in (ids[None], positions[None], *scored))
    return Packed(
        input_ids=ids,
        position_ids=positions,
        plan=PackedPlan(row.segments, row.length, device, split),
        score_index=index,
        targets=targets,
        rows=rows,
        columns=columns,
        shape=(len(responses), width),
        split=split,
    )


def _grouped(segments: list[_Segment]) -> list[list[_Segment]]:
    """Segments of similar length, then of similar prefix, side by side, so that little is padded."""

    def order(s: _Segment) -> tuple[bool, int, int]:
        return s.prefix[1] > 0, int(math.log(max(s.length, SHORT), WASTE)), s.prefix[1]

    groups: list[list[_Segment]] = []
    rows = keys = least = 0  # of the open group: its padded widths, and the smallest area of one of its segments
    for segment in sorted(segments, key=order):
        length, seen = max(segment.length, SHORT), max(segment.length + segment.prefix[1], SHORT)
        rows, keys, least = max(rows, length), max(keys, seen), min(least, length * seen)
        alike = groups and (segment.prefix[1] > 0) == (groups[-1][0].prefix[1] > 0)
        if alike and rows * keys <= WASTE**2 * least:
            groups[-1].append(segment)
        else:
            groups.append([segment])
            rows, keys, least = length, seen, length * seen
    return groups


def _block(segments: list[_Segment]) -> Block:
    start = torch.tensor([[s.start] for s in segments])
    length = torch.tensor([[s.length] for s in segments])
    head = torch.tensor([[s.prefix[0]] for s in segments])
    seen = torch.tensor([[s.prefix[1]] for s in segments])
    r = torch.arange(int(length.max()))[None]
    c = torch.arange(int((seen + length).max()))[None]
    real, exists = r < length, c < seen + length
    keys = torch.where(c < seen, head + c, start + c - seen)
    distance = (seen + r)[:, :, None] - c[:, None, :]  # seen + r is a query's position in its own sequence
    distance.masked_fill_(~exists[:, None, :], -1)
    # A padded query sees one key, since a softmax over nothing is nan; its output is not taken.
    distance.masked_fill_(~real[:, :, None] & (c == 0)[:, None, :], 0)
    return Block(
        queries=torch.where(real, start + r, start),
        keys=torch.where(exists, keys, start),
        distance=distance[:, None],
        real=real,
    )

"""Layers whose forward pass is recorded once as a CUDA graph and then replayed.

The kernels of a few short sequences take microseconds, and launching them from Python takes ten times as long. A graph
is launched at once. It reads and writes the memory that it was recorded with: the weights must lie where they lay then,
or be copied there, and inputs of one name must be the same but for the hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("skyrl.models")


@dataclass(slots=True)
class _Recording:
    others: Any
    """Inputs beside the hidden states, of the first pass: its tensors are there before anything is recorded."""
    graph: Any = None
    hidden: Any = None
    output: Any = None


class Replayed:
    """Records the layers of a body. One name: the first pass runs as ever, the second is recorded, others are replayed.

    Args:
        layers: they are changed in place; what cannot be recorded runs as ever, and is told once.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = [_Layer(layer.forward, self) for layer in layers]
        for layer, replayed in zip(layers, self._layers, strict=True):
            layer.forward = replayed
        self._places: list[int] = []
        self.name: Hashable | None = None
        self.stream: Any = None
        self.pool: Any = None

    @contextmanager
    def inputs(self, name: Hashable | None, weights: Sequence[Tensor]) -> Iterator[None]:
        """Passes inside have the inputs of this name; None: any, so that nothing is recorded.

        Args:
            weights: all that the layers read and that is not copied to one place before; if they have moved, what was
                recorded is worth nothing.
        """
        places = [tensor.data_ptr() for tensor in weights]
        if places != self._places:
            self.forget()
            self._places = places
        self.name = name
        try:
            yield
        finally:
            self.name = None

    def forget(self) -> None:
        for layer in self._layers:
            layer.recordings.clear()
        self.pool = None  # one that no graph uses any more cannot be used again

    def give_up(self, error: Exception) -> None:
        log.warning("Layers cannot be recorded as CUDA graphs, and are launched kernel by kernel: %s", error)
        for layer in self._layers:
            layer.records = False
        self.forget()


class _Layer:
    def __init__(self, forward: Callable[..., Any], shared: Replayed) -> None:
        self.forward, self.shared, self.records = forward, shared, True
        self.recordings: dict[Hashable, _Recording] = {}

    def __call__(self, hidden: Tensor, *others: Any, **more: Any) -> Any:
        name = self.shared.name
        if name is None or not self.records or torch.is_grad_enabled():
            return self.forward(hidden, *others, **more)
        recording = self.recordings.get(name)
        if recording is None:  # the first pass prepares libraries and layouts, neither of which can be recorded
            self.recordings[name] = _Recording((others, more))
            return self.forward(hidden, *others, **more)
        try:
            graph = recording.graph or self._record(recording, hidden)
        except RuntimeError as error:
            self.shared.give_up(error)
            return self.forward(hidden, *others, **more)
        recording.hidden.copy_(hidden)
        graph.replay()
        return recording.output

    def _record(self, recording: _Recording, hidden: Tensor) -> Any:
        shared, graph, own = self.shared, torch.cuda.CUDAGraph(), hidden.clone()
        others, more = recording.others
        shared.stream = shared.stream or torch.cuda.Stream(hidden.device)
        shared.pool = shared.pool or torch.cuda.graph_pool_handle()
        shared.stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(shared.stream):
            # Other threads of this process (digests) go on meanwhile.
            graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
            try:
                output = self.forward(own, *others, **more)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(hidden.device).wait_stream(shared.stream)
        recording.graph, recording.hidden, recording.output = graph, own, output
        return graph

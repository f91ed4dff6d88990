"""Runs inside SGLang: its processes load buckets of weights by ``--custom-weight-loader skyrl_loader.load``.

SGLang's own loader looks for the place of each tensor anew, name by name, which for a small model takes longer than all
the copying. Here the message tells the places, the views are made once, and a bucket is one call of copies.

    {"tensors": [[name, dtype, shape, first byte], ...],        what the bucket holds
     "pieces":  [[tensor, held name, first, size, stride, start, zeros], ...],      in elements
     "held":    {held name: elements},                          what this rank must hold, if the places are right
     "tied":    whether the output embedding is the input's,
     "hold":    whether the memory, the sender's own, is to stay mapped until the next time, since opening it takes
                about as long as the copying}

After the last bucket it may be asked what the model holds then. It answers into the sender's memory, ``[N]`` int64:

    {"report": [held name, ...],        the digests that SGLang's weights checker would tell, in this order
     "hold":   as above}

A message is JSON, compressed by zlib.
What does not fit what the model holds goes through the model's own ``load_weights``. Needs torch alone, and Triton for
the digests of what lies on a GPU.
"""

import hashlib
import json
import logging
import math
import weakref
import zlib

import torch

log = logging.getLogger("skyrl_loader")
_READY = weakref.WeakKeyDictionary()
"""By model: the buckets that were seen, by their messages."""
LIMIT = 1024
"""Messages kept for a model."""


def load(model, named_tensors):
    """Loads buckets: pairs of a message and its ``[N]`` uint8 tensor."""
    ready, wait = _READY.setdefault(model, {}), False
    for message, flat in named_tensors:
        part = ready.get(message)
        if part is None or part.moved():
            if len(ready) >= LIMIT:
                ready.clear()
            told = json.loads(zlib.decompress(message))
            if "report" in told:
                part = _Report(told)
            else:
                for other in ready.values():  # the sender's memory may be another
                    other.let_go()
                part = _Bucket(model, told)
            ready[message] = part
        with torch.no_grad():
            part.load(model, flat)
        wait |= part.waits and flat.is_cuda
    if wait:
        torch.cuda.current_stream().synchronize()


class _Bucket:
    """Views of the model where a bucket's pieces go."""

    def __init__(self, model, message):
        self.tensors = [(name, getattr(torch, dtype), shape, at) for name, dtype, shape, at in message["tensors"]]
        self.sources, self.targets, self.padding, self.addresses = [], [], [], []
        self.hold = self.waits = message["hold"]  # letting go of the memory would wait for the GPU by itself
        self.let_go()
        self.misfit = self._find(dict(model.named_parameters()), message)
        if self.misfit:
            log.warning("skyrl_loader: %s; the bucket goes through the model's own loader", self.misfit)

    def moved(self):
        """The model's memory is another than when the views were made."""
        return any(parameter.data_ptr() != address for parameter, address in self.addresses)

    def load(self, model, flat):
        if self.misfit:
            model.load_weights([(n, _view(flat, dtype, shape, at)) for n, dtype, shape, at in self.tensors])
            return
        if self.held is not None and self.held.data_ptr() == flat.data_ptr():
            sources = self.held_sources
        else:
            typed = {dtype: flat.view(dtype) for dtype in {source[0] for source in self.sources}}
            sources = [torch.as_strided(typed[dtype], *where) for dtype, *where in self.sources]
        torch._foreach_copy_(self.targets, sources)  # pyright: ignore[reportPrivateImportUsage]
        if self.padding:
            torch._foreach_zero_(self.padding)  # pyright: ignore[reportPrivateImportUsage]
        if self.hold and sources is not self.held_sources:
            self.held, self.held_sources = flat, sources

    def let_go(self):
        """Of memory that was to stay mapped."""
        self.held, self.held_sources = None, []

    def _find(self, parameters, message):
        """Makes the views; returns what does not fit."""
        held = {}
        if message["tied"] and "lm_head.weight" in parameters:
            return "lm_head.weight is a copy of the tied embedding"
        for name, elements in message["held"].items():
            parameter = parameters.get(name, parameters.get(_inside_adapter(name)))
            if parameter is None:
                return f"{name} is not held"
            if parameter.numel() != elements or not parameter.is_contiguous():
                return f"{name} has {tuple(parameter.shape)} elements, not {elements} in one run"
            held[name] = parameter.data.view(-1)
            self.addresses.append((parameter, parameter.data_ptr()))
        for index, name, first, size, stride, start, zeros in message["pieces"]:
            _, dtype, _, at = self.tensors[index]
            target, count = held[name], math.prod(size)
            if target.dtype != dtype and not (target.is_floating_point() and dtype.is_floating_point):
                return f"{name} is {target.dtype}, not {dtype}"
            self.sources.append((dtype, size, stride, at // dtype.itemsize + start))
            self.targets.append(target[first : first + count].view(size))
            if zeros:
                self.padding.append(target[first + count : first + count + zeros])
        return None


class _Report:
    """Tells what the model holds. It looks for that anew each time, apart from what the buckets were told."""

    waits = True  # the answer must be there when the server answers

    def __init__(self, message):
        self.names, self.hold, self.held = message["report"], message["hold"], None
        self.broken = False

    def moved(self):
        return False

    def let_go(self):
        self.held = None

    def load(self, model, out):
        """Writes nothing where the model holds something else than what is asked for: the sender then asks SGLang."""
        held = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
        if held.keys() == set(self.names) and not self.broken:
            try:
                out.copy_((_tiles if out.is_cuda else _sha256)([held[name].detach() for name in self.names]))
            except Exception as error:  # whatever a compiler may raise: the weights have arrived all the same
                log.warning(
                    "skyrl_loader: no digests, so SGLang is asked for them: %s: %s", type(error).__name__, error
                )
                self.broken = True
        if self.hold:
            self.held = out


def _tiles(tensors):
    from skyrl_tiles.kernel import sums_of_runs

    return sums_of_runs(tensors)


def _sha256(tensors):
    hashes = [hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()) for tensor in tensors]
    return torch.tensor([int.from_bytes(each.digest()[:8], "big", signed=True) for each in hashes])


def _view(flat, dtype, shape, at):
    return flat[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _inside_adapter(name):
    """SGLang's name for a weight that a LoRA adapter may change."""
    head, _, last = name.rpartition(".")
    return f"{head}.base_layer.{last}"

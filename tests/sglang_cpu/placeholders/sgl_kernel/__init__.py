"""Stands for SGLang's kernels, which exist for GPUs only. On the CPU they are imported by name and never called.

In SGLang's child processes it also takes two requests back that a torch without CUDA refuses: pinned memory (asked for
by LoRA and by routed experts) and a CUDA synchronization (asked for by the weights checker). A child is known by being
unpickled at this moment. In the parent, which builds transformers models, torch stays as it is: with wrapped factories
their rotary buffers would come out uninitialised.
"""

import functools
import multiprocessing

import torch


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    missing.__name__ = name
    return missing


def without_pinning(factory):
    @functools.wraps(factory)
    def make(*args, pin_memory=False, **kwargs):
        return factory(*args, **kwargs)

    return make


if getattr(multiprocessing.current_process(), "_inheriting", False) and not torch.accelerator.is_available():
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args, **kwargs: None

"""Which attention backend an SGLang server is started with: a function of the GPU and of what is installed."""

from __future__ import annotations

from collections.abc import Collection

from skyrl_train.errors import ConfigError

KEY = "generator.engine_init_kwargs.attention_backend"
USE_FLASHINFER = (
    "Use FlashInfer: +generator.engine_init_kwargs.attention_backend=flashinfer "
    "+generator.engine_init_kwargs.mm_attention_backend=flashinfer. Or remove the key: the backend is then chosen."
)
Capability = tuple[int, int]


def choose_attention(capability: Capability | None, installed: Collection[str]) -> str | None:
    """The backend to name on the command line.

    Args:
        capability: of the GPU, such as (9, 0) for an H100; None on a CPU.
        installed: of "fa3" (FlashAttention 3 inside SGLang's kernels) and "flashinfer", those that can be loaded.

    Returns:
        None leaves the choice to SGLang: on GPUs newer than Hopper it knows better.
    """
    if capability is None:
        return "torch_native"
    if capability[0] == 9 and "fa3" in installed:
        return "fa3"
    if capability[0] in (10, 11):
        return None
    return "flashinfer" if "flashinfer" in installed and capability >= (7, 5) else "triton"


def check_attention(backend: str | None, capability: Capability | None) -> None:
    """Refuses FlashAttention 3 where it cannot run, before a server takes a minute to say so.

    Raises:
        ConfigError: with SGLang's own words and the way out.
    """
    if backend != "fa3" or (capability is not None and 8 <= capability[0] <= 9):
        return
    here = "there is no GPU" if capability is None else f"this GPU has SM{capability[0]}{capability[1]}"
    raise ConfigError(
        KEY, backend, f"FlashAttention v3 Backend requires SM>=80 and SM<=90, and {here}.", USE_FLASHINFER
    )

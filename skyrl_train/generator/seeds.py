"""Sampling seeds that depend on what is sampled and on nothing else: not on timing, engine, or worker count."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, purpose, step, prompt, sample, turn) or any such tuple."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""``EmbeddedEngine``: the core behind asyncio.

The event loop writes orders into an inbox; one executor thread carries them out and takes steps, in bursts, and posts
the ended requests back. The executor is the learner's, so only one thread computes at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train.engines.base import Capabilities, Completion, Engine, Request, SamplingParams
from skyrl_train.engines.embedded.core import Core
from skyrl_train.engines.embedded.kv_cache import KVCache
from skyrl_train.engines.embedded.runner import Runner
from skyrl_train.engines.embedded.sample import Decode, Ended
from skyrl_train.engines.embedded.selfcheck import check_model
from skyrl_train.errors import EngineError, EngineTimeoutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BURST = 0.25
"""Seconds after which the executor thread is offered to whoever else waits for it."""

Order = tuple[Callable[[], None], "asyncio.Future[None] | None"]


class EmbeddedEngine(Engine):
    """Samples from the learner's own module, in this process, on its device.

    Args:
        model: any transformers causal LM loaded with ``attn_implementation="skyrl"``. Nothing is copied.
        tokenizer: needed for stop strings, and read for the end-of-sequence token.
        executor: one thread, shared with the learner. Without it the engine starts a thread of its own.
        max_num_seqs: rows that run together; more requests wait.
        max_num_batched_tokens: prompt tokens, padding included, in one forward pass.
        max_length: prompt and answer together, in tokens; at most what the model was made for.
        deterministic: see ``sessions.py``. Requests without a session are never waited for.
        autocast_dtype: compute under autocast in this type; None is the parameters' own.
        request_timeout: seconds for one call of ``generate``, waiting included.
        eos_token_ids: instead of the model's and the tokenizer's.

    Raises:
        ModelError: the model cannot be run over a KV cache; the message names another backend.
    """

    capabilities = Capabilities(
        name="embedded",
        sampling=frozenset(f.name for f in fields(SamplingParams)) - {"extra"},
        shares_parameters=True,
    )

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        executor: Executor | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        max_length: int | None = None,
        deterministic: bool = True,
        autocast_dtype: torch.dtype | None = None,
        request_timeout: float = 600.0,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        runner = Runner(model, KVCache(max_num_seqs, _limit(model, max_length)), autocast_dtype=autocast_dtype)
        check_model(runner)
        self.core = Core(
            runner,
            eos=frozenset(_eos(model, tokenizer) if eos_token_ids is None else eos_token_ids),
            decode=None if tokenizer is None else _decoder(tokenizer),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            deterministic=deterministic,
        )
        self.request_timeout = request_timeout
        self._own = ThreadPoolExecutor(1, thread_name_prefix="embedded-engine") if executor is None else None
        self._executor: Executor = executor or self._own  # pyright: ignore[reportAttributeAccessIssue]
        self._computing = Lock()
        self._inbox: deque[Order] = deque()
        self._waiting: dict[str, tuple[Request, asyncio.Future[list[Completion]]]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def generate(self, request: Request) -> list[Completion]:
        if request.id in self._waiting:
            raise EngineError(f"embedded engine: a request with the id {request.id!r} is already in flight.")
        future: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._order(partial(self._submit, request))
        self._waiting[request.id] = (request, future)
        try:
            async with asyncio.timeout(self.request_timeout):
                return await future
        except EngineError:
            raise
        except TimeoutError:
            self._order(partial(self.core.abort, [request.id]))
            raise EngineTimeoutError(self._late(request)) from None
        except asyncio.CancelledError:
            if not self._closed:
                self._order(partial(self.core.abort, [request.id]))
            raise
        finally:
            del self._waiting[request.id]

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        await self._carry_out(partial(self.core.abort, request_ids))

    async def commit_weights(self, version: int) -> None:
        """See ``Engine.commit_weights``.

        Raises:
            EngineError: requests are in flight.
        """
        await self._carry_out(partial(self.core.commit, version))

    async def open_sessions(self, sessions: Sequence[str]) -> None:
        self._order(partial(self.core.sessions.open, list(sessions)))

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        self._order(partial(self.core.sessions.close, list(sessions)))

    async def close(self) -> None:
        if self._closed:
            return
        with suppress(EngineError):  # the executor may have gone first
            await self._carry_out(self.core.abort)
        self._closed = True
        self.core.cache.release()
        if self._own is not None:
            self._own.shutdown(wait=False)

    # The loop's side.

    def _order(self, action: Callable[[], None], done: asyncio.Future[None] | None = None) -> None:
        """Puts an order into the inbox and sees to it that somebody reads it."""
        if self._closed:
            raise EngineError("embedded engine: it has been closed.")
        loop = asyncio.get_running_loop()
        moved, self._loop = self._loop is not loop, loop
        self._inbox.append((action, done))
        if self._driver is None or self._driver.done() or moved:
            self._driver = loop.create_task(self._drive(loop))

    async def _carry_out(self, action: Callable[[], None]) -> None:
        """Gives an order and waits until it has been carried out. Raises what it raised."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._order(action, done)
        try:
            async with asyncio.timeout(self.request_timeout):
                await done
        except TimeoutError:
            raise EngineTimeoutError(
                f"embedded engine: the thread that computes did not answer within {self.request_timeout:g} s."
            ) from None

    async def _drive(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs bursts until there is nothing left to do; the next order starts it again."""
        try:
            while self._inbox or self.core.ready:
                await loop.run_in_executor(self._executor, self._burst)
        except Exception as error:  # the executor is gone, or a fault of ours: whoever waits must hear of it
            while self._inbox:
                _, done = self._inbox.popleft()
                if done is not None and not done.done():
                    done.set_exception(_failure(error))
            for _, future in self._waiting.values():
                if not future.done():
                    future.set_exception(_failure(error))

    def _settle(self, ended: Sequence[Ended]) -> None:
        for end in ended:
            request, future = self._waiting.get(end.request.id, (None, None))
            if future is None or request is not end.request or future.done():
                continue
            if end.error is None:
                future.set_result(end.completions)
            else:
                future.set_exception(end.error)

    def _late(self, request: Request) -> str:
        absent = tuple(self.core.sessions.absent)
        blame = ""
        if self.core.deterministic and absent:
            shown = ", ".join(sorted(absent)[:3])
            blame = f" It waits for a request of {len(absent)} open sessions ({shown}); close those that are over."
        return f"embedded engine, request {request.id!r}: no answer within {self.request_timeout:g} s.{blame}"

    # The computing thread's side.

    def _submit(self, request: Request) -> None:
        try:
            self.core.submit(request)
        except EngineError as error:
            self.core.refuse(request, error)
        except (TypeError, ValueError, AttributeError) as error:  # ids that are no integers, parameters of a wrong type
            self.core.refuse(request, _failure(error))

    def _burst(self) -> None:
        """Carries out orders and takes steps until nothing is ready or the time is up."""
        until = time.monotonic() + BURST
        with self._computing:
            self._read_inbox()
            if self.core.ready:
                try:
                    with self.core.runner.computing():
                        while self.core.ready and time.monotonic() < until:
                            self.core.step()
                            self._post()
                            self._read_inbox()
                except Exception as error:  # whatever the model raised: everyone hears of it, and the engine goes on
                    self.core.fail_all(error)
            self._post()

    def _read_inbox(self) -> None:
        while self._inbox:
            action, done = self._inbox.popleft()
            error: Exception | None = None
            try:
                action()
            except Exception as raised:  # whoever gave the order gets it
                error = raised
            self._post()
            if done is not None:
                self._tell(partial(_resolve, done, error))

    def _post(self) -> None:
        ended = self.core.take_ended()
        if ended:
            self._tell(partial(self._settle, ended))

    def _tell(self, call: Callable[[], None]) -> None:
        """Calls back in the loop that gave the newest order: a burst may outlive the loop that started it."""
        loop = self._loop
        if loop is not None and not loop.is_closed():  # else the callers are gone, and nobody waits
            with suppress(RuntimeError):  # closed in this very moment
                loop.call_soon_threadsafe(call)


def _resolve(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _failure(error: Exception) -> EngineError:
    failure = EngineError(f"embedded engine: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _limit(model: PreTrainedModel, wanted: int | None) -> int:
    config: Any = model.config.get_text_config()
    made_for = getattr(config, "max_position_embeddings", None)
    limits = [n for n in (made_for, wanted) if n is not None]
    return min(limits) if limits else 4096


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The end-of-sequence ids of the model's generation config and of the tokenizer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = set(named if isinstance(named, list) else [named])
    found.add(getattr(tokenizer, "eos_token_id", None))
    return {int(token) for token in found if token is not None}


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Text as it is: special tokens shown, so that they can be stop strings, and no spaces tidied away."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode

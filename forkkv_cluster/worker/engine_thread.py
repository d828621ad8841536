"""An engine in a thread of its own, between an inbox of commands and one output stream for each request.

    event loop                                     engine thread
    ----------                                     -------------
    submit / abort / call ---> inbox (deque) --->  run the commands, then one step; again while there is work
    streams, on_events    <--- one call_soon_threadsafe for each step <--- StepOutput

Between steps the loop's side may run any closure on the engine's thread (``call``). After commands a step always
follows, so that what they left to say (a cancellation, events of a loaded adapter) comes out at once.

When ``step`` raises, what it had done to the cache by then is not known, and serving wrong KV is worse than not
serving. So every request fails with ``WorkerStopped``, upon which the gateway goes on elsewhere, the thread ends,
``on_failure`` is called and ``check`` raises: this worker is replaced, and the next one starts from an empty cache.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.errors import AlreadyExists, ForkKVError, Internal, WorkerStopped
from forkkv_cluster.core.events import CacheEvent
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.placement import WorkerLoad
from forkkv_cluster.core.request import AdapterInfo, Sharing, TokenChunk
from forkkv_cluster.engine.outputs import StepOutput
from forkkv_cluster.worker.engine_port import EnginePort, WorkRequest
from forkkv_cluster.worker.output_stream import OutputStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

Command = Callable[[], None]
OnEvents = Callable[[int, tuple[CacheEvent, ...]], None]
"""(number of the first event, events), on the loop, in order, after each step that changed the cache."""

LOAD_INTERVAL_S = 0.05
"""The load is computed at most this often while the engine is busy, and once whenever it falls idle."""


class EngineThread:
    """Made and used on one event loop; ``start`` before, ``close`` after."""

    def __init__(
        self,
        engine: EnginePort,
        *,
        flush_interval_s: float,
        on_events: OnEvents,
        on_failure: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        """``on_failure`` is called on the loop, once, after all requests have been told that the engine failed."""
        self._engine = engine
        self._on_failure = on_failure
        self._flush_interval_s = flush_interval_s
        self._on_events = on_events
        self._clock = clock or SystemClock()
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Command] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._failure: BaseException | None = None
        self._streams: dict[str, OutputStream] = {}
        self._calls: set[asyncio.Future[Any]] = set()
        self._num_events = 0
        self._load, self._load_s = engine.load(), self._clock.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # On the event loop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the present step; requests in flight fail with ``WorkerStopped``. Harmless when repeated."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._fail_all(WorkerStopped("the worker is shutting down. Send the request again.", is_fault=False))

    def check(self) -> None:
        """Raise ``Internal`` unless the engine's thread is running."""
        if self._failure is not None:
            raise Internal(f"the engine failed: {type(self._failure).__name__}: {self._failure}. The worker must be replaced.")
        if not self._thread.is_alive():
            raise Internal("the engine's thread is not running. The worker must be replaced.")

    @property
    def load(self) -> WorkerLoad:
        """As of the last steps; see ``LOAD_INTERVAL_S``."""
        return self._load

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests without a terminal result yet, cancelled ones included until the engine has let go of them."""
        return tuple(self._streams)

    async def generate(self, request: WorkRequest) -> AsyncGenerator[TokenChunk, None]:
        """Run ``request``: its chunks, the last one with a ``finish_reason``; errors are raised as ForkKVError.

        Closing the generator early, or cancelling its consumer, aborts the request.
        """
        stream = self._open_stream(request)
        is_over = False
        try:
            while not is_over:
                try:
                    chunk = await stream.next_chunk()
                except ForkKVError:
                    is_over = True
                    raise
                is_over = chunk.finish_reason is not None
                yield chunk
        finally:
            if not is_over:
                self._abort(request.request_id)

    async def call(self, function: Callable[[EnginePort], T]) -> T:
        """Run ``function(engine)`` on the engine's thread between steps; its result or exception."""
        future: asyncio.Future[T] = self._loop.create_future()

        def command() -> None:
            try:
                result = function(self._engine)
            except Exception as error:  # Whatever it is, it belongs to the caller.
                self._post(_set_exception, future, error)
            else:
                self._post(_set_result, future, result)

        self._send(command)
        self._calls.add(future)
        try:
            return await future
        finally:
            self._calls.discard(future)

    async def load_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> AdapterInfo:
        """Read an adapter beside the engine's thread, so that no step waits for it, then register it on that thread.

        Raises InvalidArgument or AlreadyExists.
        """
        weights = await asyncio.to_thread(self._engine.read_adapter, name, path, sharing)
        return await self.call(lambda engine: engine.register_adapter(name, weights, sharing))

    async def snapshot(self) -> tuple[int, tuple[CacheEvent, ...]]:
        """The whole cache as events, as of before the event of the returned number."""
        return await self.call(lambda engine: (self._num_events, engine.snapshot_events()))

    def _open_stream(self, request: WorkRequest) -> OutputStream:
        request_id = request.request_id
        if request_id in self._streams:
            raise AlreadyExists("request", request_id, "It is running; give each request an id of its own.")
        self._send(lambda: self._add(request))
        stream = self._streams[request_id] = OutputStream(self._clock, self._flush_interval_s)
        return stream

    def _abort(self, request_id: RequestId) -> None:
        # Its stream stays until the engine confirms: until then it holds pages, and status must show it.
        if request_id in self._streams and self._is_running:
            self._send(lambda: self._engine.abort(request_id))

    @property
    def _is_running(self) -> bool:
        return self._failure is None and not self._is_closing

    def _send(self, command: Command) -> None:
        with self._wake:
            if not self._is_running:
                # The engine's failure was another request's, so this one is no suspect.
                raise WorkerStopped("the worker has stopped. Send the request again.", is_fault=False)
            self._inbox.append(command)
            self._wake.notify()

    def _deliver(self, output: StepOutput, first_event: int) -> None:
        for chunk in output.chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is not None:
                stream.put(chunk)
                if chunk.finish_reason is not None:
                    del self._streams[chunk.request_id]
        for failure in output.failures:
            self._fail(failure.request_id, failure.error)
        if output.events:
            self._on_events(first_event, output.events)

    def _fail(self, request_id: str, error: ForkKVError) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.fail(error)

    def _fail_all(self, error: ForkKVError) -> None:
        for request_id in tuple(self._streams):
            self._fail(request_id, error)
        for future in tuple(self._calls):
            _set_exception(future, error)

    # On the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                self._run_commands()
                output = self._engine.step()
                first_event, self._num_events = self._num_events, self._num_events + len(output.events)
                self._refresh_load()
                if output.chunks or output.failures or output.events:
                    self._post(self._deliver, output, first_event)
        except Exception as error:
            logger.exception("the engine failed; this worker must be replaced")
            with self._wake:
                self._failure = error
            message = f"the engine failed ({type(error).__name__}: {error}). See the worker's log."
            self._post(self._fail_all, WorkerStopped(message, is_fault=True))
            self._post(self._on_failure)

    def _await_work(self) -> bool:
        """Sleep until there is something to do. False: close."""
        with self._wake:
            while not (self._is_closing or self._inbox or self._engine.has_work):
                self._wake.wait()
            return not self._is_closing

    def _run_commands(self) -> None:
        # Only those that are here now: a steady stream of commands must not starve the steps.
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()

    def _add(self, request: WorkRequest) -> None:
        try:
            self._engine.add_request(request)
        except ForkKVError as error:
            self._post(self._fail, request.request_id, error)
        except Exception as error:
            # Nothing was queued, so the cache is as it was: this request fails alone.
            logger.exception("request %s could not be queued", request.request_id)
            self._post(self._fail, request.request_id, Internal(f"the engine refused the request: {error!r}."))

    def _refresh_load(self) -> None:
        now = self._clock.monotonic()
        if now - self._load_s >= LOAD_INTERVAL_S or not self._engine.has_work:
            self._load, self._load_s = self._engine.load(), now

    def _post(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.warning("the event loop has closed before the engine's thread; nobody waits for %s", function.__name__)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)

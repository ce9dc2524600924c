"""The served models by name: loaded on demand, and unloaded after a time without requests."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from ollama_forge.errors import ForgeError, MemoryTooSmall
from ollama_forge.progress import say
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
KEEP_ALIVE = 300.0  # seconds; Ollama's
LONGEST = 292 * 365 * 86400.0  # seconds; the longest duration of Go
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_MODEL = _TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True)
class ModelName:
    """A model name as Ollama reads it: ``[host/][namespace/]model[:tag]``, in any case."""

    model: str
    namespace: str = NAMESPACE
    tag: str = TAG
    host: str = HOST

    @classmethod
    def parse(cls, text: str) -> ModelName | None:
        """Parse a name; None if ``text`` is not a valid name."""
        parts = text.partition("://")[2].split("/") if "://" in text else text.split("/")
        model, colon, tag = parts[-1].partition(":")
        namespace = parts[-2] if len(parts) > 1 else NAMESPACE
        host = parts[-3] if len(parts) > 2 else HOST
        name = cls(model, namespace, tag if colon else TAG, host)
        valid = (
            len(parts) <= 3
            and _MODEL.fullmatch(model)
            and _TAG.fullmatch(name.tag)
            and _NAMESPACE.fullmatch(namespace)
            and _HOST.fullmatch(host)
        )
        return name if valid else None

    @classmethod
    def of(cls, model: ServedModel) -> ModelName:
        """The name that a model is served under."""
        return cls.parse(model.name) or cls(model.name)

    @property
    def full(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """The name in lists: always with the tag, with host and namespace only if they are not the default."""
        host = "" if self.host.lower() == HOST else f"{self.host}/"
        namespace = "" if not host and self.namespace.lower() == NAMESPACE else f"{self.namespace}/"
        return f"{host}{namespace}{self.model}:{self.tag}"

    def is_same(self, other: ModelName) -> bool:
        return self.full.lower() == other.full.lower()


def servable_name(label: str) -> str:
    """A valid model name from any label; characters that a name cannot contain become ``-``."""
    if ModelName.parse(label):
        return label
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", label.rstrip("/").rsplit("/", 1)[-1]).lstrip(".-")[:80]
    return last or "model"


@dataclass(eq=False)
class _Place:
    """A model of the registry: whether it is loaded, and how long it stays.

    Attributes:
        keep_alive: seconds for which it stays loaded after its last request.
        users: how many requests use it now; ``waiting``: how many wait until it is loaded.
        used_at, expires_at: when its last request began or ended, and when it is unloaded (both ``time.time()``).
        leaving: whether it takes no more requests, because it is unloaded as soon as it has none.
        idle: set while no request uses it.
    """

    model: ServedModel
    keep_alive: float
    loaded: bool
    expires_at: float = math.inf
    used_at: float = 0.0
    users: int = 0
    waiting: int = 0
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    loading: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.idle.set()

    def add_users(self, count: int) -> None:
        self.users += count
        self.used_at = time.time()
        if self.users:
            self.idle.clear()
            self.stop_timer()

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Lease:
    """The use of a loaded model by one request; the model stays loaded until ``release``."""

    def __init__(self, release: Callable[[float | None], None]) -> None:
        self._release: Callable[[float | None], None] | None = release

    def release(self, keep_alive: float | None = None) -> None:
        """End the use; further calls do nothing.

        Args:
            keep_alive: seconds for which the model stays loaded if nobody uses it; None: as long as before.
        """
        release, self._release = self._release, None
        if release is not None:
            release(keep_alive)


class ModelRegistry:
    """The models of one server. They are loaded when they are needed, and unloaded when they have been idle.

    A model without a loader stays in memory, and is only listed as unloaded.

    Args:
        max_loaded: how many models may be loaded at a time; for one more, the least recently used one is unloaded, an
            idle one if there is one, else as soon as its requests have ended.
        keep_alive: seconds for which a model stays loaded after its last request; None: without end if there is one
            model, else as long as Ollama keeps models.
    """

    def __init__(self, *models: ServedModel, max_loaded: int = 3, keep_alive: float | None = None) -> None:
        self.models, self.max_loaded = models, max_loaded
        usual = math.inf if len(models) == 1 else KEEP_ALIVE
        self._keep_alive = usual if keep_alive is None else keep_alive
        self._places = {id(model): _Place(model, self._keep_alive, model.is_loaded) for model in models}
        self._lock = asyncio.Lock()  # held while a model is loaded or unloaded
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, name: str, *, refusal: str) -> ServedModel:
        """The model that a client calls ``name``.

        Raises:
            BadRequest: there is none (status 404, with ``refusal`` as the message), or it is not a valid name.
        """
        parsed = ModelName.parse(name)
        if parsed is None:
            raise BadRequest("invalid model name") if name else BadRequest(refusal, 404)
        for model in self.models:
            if parsed.is_same(ModelName.of(model)):
                return model
        raise BadRequest(refusal, 404)

    def is_loaded(self, model: ServedModel) -> bool:
        place = self._places[id(model)]
        return place.loaded and (place.users > 0 or time.time() < place.expires_at)

    def expires_at(self, model: ServedModel) -> datetime:
        """When the model is unloaded if no more requests come."""
        place, now = self._places[id(model)], time.time()
        seconds = place.keep_alive if place.users else place.expires_at - now
        return datetime.fromtimestamp(now + min(seconds, LONGEST), UTC)

    async def acquire(self, model: ServedModel) -> Lease:
        """Load a model if it is not loaded, and keep it loaded until the lease is released.

        Raises:
            EngineError: it cannot be loaded.
        """
        place = self._places[id(model)]
        if place.loaded and not place.leaving:
            place.add_users(1)
        else:
            await self._wait_for(place)
        return Lease(partial(self._release, place))

    async def touch(self, model: ServedModel, keep_alive: float | None) -> None:
        """Load a model, or unload it if ``keep_alive`` is 0.

        Raises:
            EngineError: it cannot be loaded.
        """
        place = self._places[id(model)]
        if keep_alive != 0:
            (await self.acquire(model)).release(keep_alive)
        elif place.loaded:
            place.keep_alive = 0.0
            if not place.users:
                self._begin_timer(place)

    async def close(self) -> None:
        """End all answers and free the engines."""
        for place in self._places.values():
            place.stop_timer()
        for task in self._tasks:
            task.cancel()
        for model in self.models:
            await model.close()

    # -- loading --------------------------------------------------------------------------------------------------

    async def _wait_for(self, place: _Place) -> None:
        """Wait until a model is loaded, and become one of its users."""
        place.waiting += 1
        if place.loading is None:
            place.loading = self._start(self._load(place))
        loading = place.loading
        try:
            await asyncio.shield(loading)  # who leaves does not end the load that others wait for
        except asyncio.CancelledError:
            if not loading.done():
                place.waiting -= 1
            elif not loading.cancelled() and loading.exception() is None:
                self._release(place, None)
            raise

    async def _load(self, place: _Place) -> None:
        try:
            async with self._lock:
                await self._make_room(place)
                await self._load_engine(place)
                place.loaded, place.keep_alive = True, self._keep_alive
        finally:
            waiting, place.waiting, place.loading = place.waiting, 0, None
        place.add_users(waiting)
        if not waiting:  # all have left
            self._begin_timer(place)

    async def _load_engine(self, place: _Place) -> None:
        model = place.model
        while not model.is_loaded:
            try:
                model.attach(await _in_thread(model.make_engine))
                if len(self.models) > 1:
                    say(f"{model.name} is loaded" + (f": {model.limits}" if model.limits else ""))
            except MemoryTooSmall as error:
                idle = [other for other in self._others(place) if not other.users]
                if not idle:
                    raise _load_error(model, error) from error
                await self._unload(idle[0])
            except Exception as error:  # one request's error, whatever it is
                raise _load_error(model, error) from error

    async def _make_room(self, place: _Place) -> None:
        while place.model.can_unload and len(others := self._others(place)) >= self.max_loaded:
            await self._unload(next((other for other in others if not other.users), others[0]))

    def _others(self, place: _Place) -> list[_Place]:
        """The other models in memory that can be unloaded, least recently used first."""
        others = [
            other
            for other in self._places.values()
            if other is not place and other.loaded and other.model.can_unload and other.model.is_loaded
        ]
        return sorted(others, key=lambda other: other.used_at)

    async def _unload(self, place: _Place) -> None:
        """Unload a model as soon as it has no requests; the lock is held."""
        place.leaving = True
        try:
            await place.idle.wait()
            place.stop_timer()
            place.loaded = False
            if place.model.can_unload:
                await _in_thread(place.model.unload)
        finally:
            place.leaving = False

    # -- the time of keep_alive -----------------------------------------------------------------------------------

    def _release(self, place: _Place, keep_alive: float | None) -> None:
        place.add_users(-1)
        if keep_alive is not None:
            place.keep_alive = keep_alive
        if not place.users:
            self._begin_timer(place)
            place.idle.set()

    def _begin_timer(self, place: _Place) -> None:
        place.stop_timer()
        place.expires_at = time.time() + place.keep_alive
        if place.keep_alive < LONGEST:
            loop = asyncio.get_running_loop()
            place.timer = loop.call_later(place.keep_alive, lambda: self._start(self._expire(place, place.timer)))

    async def _expire(self, place: _Place, timer: asyncio.TimerHandle | None) -> None:
        async with self._lock:
            if place.loaded and place.timer is timer:  # else a request came
                await self._unload(place)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # those who wait get it, if they have not left


def _load_error(model: ServedModel, error: Exception) -> EngineError:
    if not isinstance(error, ForgeError):
        _LOG.error("%s cannot be loaded", model.name, exc_info=error)
        return EngineError(f"{model.name} cannot be loaded ({type(error).__name__})")
    return EngineError(f"{model.name} cannot be loaded: {error.message}" + (f"; {error.hint}" if error.hint else ""))


async def _in_thread(work: Callable[[], T]) -> T:
    """The result of slow ``work`` from a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:
            failed = error
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(finish, result, failed)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future

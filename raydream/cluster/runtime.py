"""Where actors live: in this process, or each in a Ray process of its own. The loop above sees no difference.

``call`` never blocks and never raises: it returns references. A failed call fails every call that its references are
passed to, and ``get`` raises an ``ActorFailed`` for the first of them. The calls to one actor run in the order they
were made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from raydream.config.cluster import Budget

Reference = Any
BUILD = "build"  # the call that puts an object into an actor


@dataclass(eq=False)
class Actor:
    """A handle: what the actor is, and the runtime's own word for where it is."""

    role: str
    index: int
    place: Any = None

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


class ActorFailed(Exception):
    """A call did not give a result.

    ``kind`` is "actor_died", "timeout" or "application_error"; ``actor`` is known where the runtime can tell which
    one it was.
    """

    def __init__(self, kind: str, message: str, error_type: str = "", actor: Actor | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.error_type, self.actor = kind, message, error_type, actor


class Withdrawn(Exception):
    """A run was stopped while it still waited for places of its actors."""


@runtime_checkable
class Runtime(Protocol):
    """What the loop asks of a cluster. ``budget`` is what it has decided, for as long as it is there, about that which
    the settings leave open; None where it knows of no reason to.
    """

    budget: Budget | None

    def spawn(self, role: str, index: int) -> Actor:
        """A new actor in a place of its own, with nothing in it yet."""
        ...

    def build(self, actor: Actor, factory: Callable[[], object]) -> Reference:
        """Puts ``factory()``, made where the actor is, in place of whatever it held; the reference says when."""
        ...

    def respawn(self, actor: Actor) -> None:
        """Ends what is left of an actor and starts it anew in its old place, empty."""
        ...

    def call(self, actor: Actor, method: str, *args: Any, num_returns: int = 1) -> Any:
        """A reference to the result, or a tuple of ``num_returns`` of them; arguments may be references."""
        ...

    def get(self, references: Sequence[Reference], timeout_s: float) -> list[Any]:
        """The values; raises ``ActorFailed`` for the first that has none."""
        ...

    def failing(self, actors: Sequence[Actor], busy_limit_s: float) -> list[Actor]:
        """Those that are dead, do not answer, or have been busy with one call for longer than the limit."""
        ...

    def close(self) -> None:
        """Ends all actors."""
        ...


class Place:
    """What an actor holds: one object, once it is built."""

    def __init__(self) -> None:
        self._target: object = None

    def build(self, factory: Callable[[], object]) -> None:
        """What was there before is let go first: two may not fit."""
        self._target = None
        self._target = factory()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the object, or ``BUILD`` with a factory of one."""
        return getattr(self if method == BUILD else self._target, method)(*args)


class LocalRuntime:
    """Everything in this process, at once and in order; bitwise equal to ``RayRuntime`` on a CPU."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget

    def spawn(self, role: str, index: int) -> Actor:
        return Actor(role, index, Place())

    def build(self, actor: Actor, factory: Callable[[], object]) -> Reference:
        return self._run(actor, BUILD, (factory,))

    def respawn(self, actor: Actor) -> None:
        actor.place = Place()

    def kill(self, actor: Actor) -> None:
        """What a crash does to an actor: its state is gone and its calls fail."""
        actor.place = None

    def call(self, actor: Actor, method: str, *args: Any, num_returns: int = 1) -> Any:
        result = self._run(actor, method, args)
        if num_returns == 1:
            return result
        return tuple(result if isinstance(result, ActorFailed) else part for part in _parts(result, num_returns))

    def get(self, references: Sequence[Reference], timeout_s: float) -> list[Any]:
        for reference in references:
            if isinstance(reference, ActorFailed):
                raise reference
        return list(references)

    def failing(self, actors: Sequence[Actor], busy_limit_s: float) -> list[Actor]:
        return [actor for actor in actors if actor.place is None]

    def close(self) -> None:
        """Nothing outlives this process anyway."""

    def _run(self, actor: Actor, method: str, args: tuple[Any, ...]) -> Any:
        failed = next((arg for arg in args if isinstance(arg, ActorFailed)), None)
        if failed is not None:
            return failed
        if actor.place is None:
            return ActorFailed("actor_died", f"{actor} is gone", actor=actor)
        try:
            return actor.place.call(method, *args)
        except Exception as error:  # what a process boundary would do: the caller learns of it from the reference
            failure = ActorFailed("application_error", f"{actor}: {error}", type(error).__name__, actor)
            failure.__cause__ = error
            return failure


def _parts(result: Any, num_returns: int) -> Sequence[Any]:
    if isinstance(result, ActorFailed):
        return [result] * num_returns
    assert len(result) == num_returns, f"expected {num_returns} results, got {len(result)}"
    return result

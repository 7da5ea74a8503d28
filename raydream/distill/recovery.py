"""What to do when an actor fails: a failure in, a decision out. Nothing here acts, waits or reads a clock.

A dead or hanging actor is worth a restart: machines are pre-empted, memory runs out, a driver stumbles. An exception
is not when it must come again: a wrong argument, or the same error from the same actor at the same step after it was
rolled back. Restarts are paid for from the run's budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raydream.config.cluster import ClusterConfig

_BACKOFF_LIMIT_S = 60.0
# Mistakes in the code or its arguments, and a full disk: the same call fails the same way on every machine.
_DETERMINISTIC = frozenset(
    {"ValueError", "TypeError", "AssertionError", "AttributeError", "NameError", "KeyError", "IndexError"}
    | {"ImportError", "ModuleNotFoundError", "NotImplementedError", "TypeCheckError", "BeartypeCallHintParamViolation"}
    # numbers that are not finite end a run after many steps in a row, a vanished surface stays away: no accidents
    | {"NoSpaceError", "FloatingPointError", "EmptyMeshError"}
)


@dataclass(frozen=True)
class Failure:
    """What the controller saw of one failed call.

    ``kind``: the actor is gone (``actor_died``), did not answer in time (``timeout``), or its method raised
    (``application_error``; ``error_type`` is then the exception's class name). ``step`` is the controller's.
    """

    kind: Literal["actor_died", "timeout", "application_error"]
    role: str
    index: int
    step: int
    error_type: str = ""
    message: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "actor_died":
                what = "died"
            case "timeout":
                what = "did not answer in time"
            case "application_error":
                what = f"raised {self.error_type or 'an error'}"
        detail = f" ({self.message})" if self.message else ""
        return f"{self.role} {self.index} {what} at step {self.step}{detail}"


@dataclass(frozen=True)
class Restart:
    """Wait ``delay_s``, start the actor anew and roll everybody back."""

    delay_s: float


@dataclass(frozen=True)
class GiveUp:
    """End the run; ``reason`` is for the person who started it."""

    reason: str


def decide(config: ClusterConfig, history: Sequence[Failure], failure: Failure) -> Restart | GiveUp:
    """The answer to ``failure``, given the earlier failures of this run, each of which was answered by a restart. The
    pause before one is doubled for each earlier failure of the actor.
    """
    own = [earlier for earlier in history if (earlier.role, earlier.index) == (failure.role, failure.index)]
    if failure.kind == "application_error":
        if failure.error_type in _DETERMINISTIC:
            return GiveUp(f"{failure}; a restart cannot change that")
        seen = {(earlier.kind, earlier.error_type, earlier.step) for earlier in own}
        if (failure.kind, failure.error_type, failure.step) in seen:  # not by the message: it holds addresses, times
            return GiveUp(f"{failure}, again at the same step after a restart")
    if len(history) >= config.max_restarts:
        return GiveUp(f"{failure}; the run's budget max_restarts={config.max_restarts} is spent")
    return Restart(min(config.restart_backoff_s * 2.0 ** min(len(own), 64), _BACKOFF_LIMIT_S))

"""One failure in, one decision out."""

import pytest

from raydream.config.cluster import ClusterConfig
from raydream.distill.recovery import Failure, GiveUp, Restart, decide

POLICY = ClusterConfig(max_restarts=4, restart_backoff_s=0.5)


def died(index: int = 0, step: int = 7, role: str = "particle") -> Failure:
    return Failure("actor_died", role, index, step)


def raised(error_type: str, step: int = 7, index: int = 0) -> Failure:
    return Failure("application_error", "particle", index, step, error_type, "the message")


@pytest.mark.parametrize("kind", ["actor_died", "timeout"])
def test_a_lost_actor_is_restarted(kind):
    assert decide(POLICY, [], Failure(kind, "score", 1, 7)) == Restart(0.5)


def test_the_pause_doubles_with_the_actors_own_failures_up_to_the_limit():
    assert decide(POLICY, [died()], died(step=9)).delay_s == 1.0
    assert decide(POLICY, [died(), died()], died(step=9)).delay_s == 2.0
    assert decide(ClusterConfig(restart_backoff_s=40.0), [died()], died(step=9)).delay_s == 60.0
    assert decide(POLICY, [died(index=1), died(role="score")], died()).delay_s == 0.5


def test_the_runs_budget_is_spent_by_all():
    decision = decide(POLICY, [died(index=index) for index in range(1, 5)], died())
    assert isinstance(decision, GiveUp)
    assert "max_restarts=4" in decision.reason


def test_a_budget_of_zero_never_restarts():
    assert isinstance(decide(ClusterConfig(max_restarts=0), [], died()), GiveUp)


@pytest.mark.parametrize("error_type", ["ValueError", "TypeError", "AssertionError"])
def test_a_mistake_in_the_code_is_not_tried_again(error_type):
    decision = decide(POLICY, [], raised(error_type))
    assert isinstance(decision, GiveUp)
    assert f"raised {error_type} at step 7 (the message)" in decision.reason


def test_the_same_error_at_the_same_step_twice_gives_up():
    first = raised("RuntimeError")
    assert isinstance(decide(POLICY, [], first), Restart)
    decision = decide(POLICY, [first], raised("RuntimeError"))
    assert isinstance(decision, GiveUp)
    assert "again at the same step" in decision.reason


@pytest.mark.parametrize(
    "earlier", [raised("RuntimeError", step=6), raised("OSError"), raised("RuntimeError", index=1), died()]
)
def test_another_step_type_actor_or_kind_is_not_the_same_error(earlier):
    assert isinstance(decide(POLICY, [earlier], raised("RuntimeError")), Restart)


def test_ten_thousand_failures_do_not_overflow_the_pause():
    patient = ClusterConfig(max_restarts=10**6)
    assert decide(patient, [died()] * 10_000, died()) == Restart(60.0)

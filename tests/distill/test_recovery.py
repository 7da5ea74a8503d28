"""One failure in, one decision out."""

import pytest

from raydream.distill.recovery import Failure, GiveUp, RecoveryPolicy, Restart, decide

POLICY = RecoveryPolicy(max_restarts=4, max_restarts_per_actor=3, backoff_s=0.5, backoff_limit_s=1.5)


def died(index: int = 0, step: int = 7, role: str = "particle") -> Failure:
    return Failure("actor_died", role, index, step)


def raised(error_type: str, step: int = 7, index: int = 0) -> Failure:
    return Failure("application_error", "particle", index, step, error_type, "the message")


@pytest.mark.parametrize("kind", ["actor_died", "timeout"])
def test_a_lost_actor_is_restarted(kind):
    assert decide(POLICY, [], Failure(kind, "score", 1, 7)) == Restart("score", 1, 0.5)


def test_the_pause_doubles_with_the_actors_own_failures_up_to_the_limit():
    assert decide(POLICY, [died()], died(step=9)).delay_s == 1.0
    assert decide(POLICY, [died(), died()], died(step=9)).delay_s == 1.5
    assert decide(POLICY, [died(index=1), died(role="score")], died()).delay_s == 0.5


def test_an_actors_budget_is_spent_by_its_own_failures_only():
    others = [died(index=1), died(role="score"), died(index=2)]
    assert isinstance(decide(POLICY, others, died()), Restart)
    decision = decide(POLICY, [died()] * 3, died(step=12))
    assert isinstance(decision, GiveUp)
    assert "particle 0 died at step 12" in decision.reason
    assert "max_restarts_per_actor=3" in decision.reason


def test_the_runs_budget_is_spent_by_all():
    decision = decide(POLICY, [died(index=index) for index in range(1, 5)], died())
    assert isinstance(decision, GiveUp)
    assert "max_restarts=4" in decision.reason


def test_a_budget_of_zero_never_restarts():
    assert isinstance(decide(RecoveryPolicy(max_restarts=0), [], died()), GiveUp)
    assert isinstance(decide(RecoveryPolicy(max_restarts_per_actor=0), [], died()), GiveUp)


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_restarts", -1), ("max_restarts_per_actor", -1), ("backoff_s", -0.1), ("backoff_limit_s", -0.1)],
)
def test_a_negative_setting_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}:"):
        RecoveryPolicy(**{name: value})


def test_ten_thousand_failures_do_not_overflow_the_pause():
    patient = RecoveryPolicy(max_restarts=10**6, max_restarts_per_actor=10**6, backoff_limit_s=5.0)
    assert decide(patient, [died()] * 10_000, died()) == Restart("particle", 0, 5.0)

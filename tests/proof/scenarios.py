"""The worlds that are explored to the last schedule: each rule of the protocol has one in which it matters.

`CI` takes about a minute of one core; `DEEP` adds a third delivery or a second fault of a kind, and is for
`python -m tests.proof.explore --deep`.
"""

from __future__ import annotations

from tests.proof.explorer import Scenario

CI = (
    # Two deliveries, a crash, a lapse; a reply that is lost, before or after the store wrote, or much later.
    Scenario("in doubt: crash", crashes=1, lapses=2),
    Scenario("in doubt: silent store", down=1, late=1),
    Scenario("in doubt: silent store, at once given up", down=1, late=1, patience=0.0),
    Scenario("in doubt: crash and silent store", crashes=1, late=1, copies=1, hops=1),
    Scenario("resume: crash", on_crash="resume", steps=True, crashes=1),
    Scenario("resume: silent store", on_crash="resume", steps=True, late=1, hops=1),
    Scenario("resume: steps in another order", on_crash="resume", steps=True, order=True, crashes=1, hops=1),
    Scenario("resume: crash loop", on_crash="resume", steps=True, crashes=1, max_attempts=1, hops=1),
    Scenario("rerun: crash and silent store", on_crash="rerun", crashes=1, late=1, hops=1),
    Scenario("rerun: crash loop", on_crash="rerun", crashes=2, lapses=2, max_attempts=2, hops=1),
    # The destination is asked.
    Scenario("reconcile: crash", reconcile="truth", crashes=1, lapses=2),
    Scenario("reconcile: silent store", reconcile="truth", late=1, lapses=2, hops=1),
    Scenario("reconcile: crash loop", reconcile="truth", crashes=1, lapses=2, max_attempts=1, hops=1),
    Scenario("reconcile: cannot tell", reconcile="unknown", crashes=1, lapses=2),
    Scenario(
        "reconcile: ambiguous ends",
        reconcile="truth",
        endings=("ambiguous_before", "ambiguous_after"),
        odd=1,
        hops=1,
    ),
    Scenario("reconcile: late errors", reconcile="truth", endings=("error_after",), odd=1),
    # How a body may end.
    Scenario("ends: no effect", endings=("no_effect",), odd=1, crashes=1, hops=1),
    Scenario("ends: an error", endings=("error", "error_after"), odd=1, down=1),
    Scenario("ends: ambiguous", endings=("ambiguous_before", "ambiguous_after"), odd=1, operators=1),
    Scenario("ends: a retry", endings=("retry",), odd=1, crashes=1, hops=1),
    Scenario(
        "ends: late, without effect",
        on_crash="rerun",
        endings=("no_effect", "retry"),
        odd=2,
        crashes=1,
        hops=1,
    ),
    Scenario(
        "ends: a step without effect", on_crash="resume", steps=True, endings=("no_effect_in_step",), odd=1
    ),
    # People, main processes, copies, renewals.
    Scenario("operator", operators=1, crashes=1),
    Scenario("two operators", operators=2, crashes=1, hops=1),
    Scenario("operator against reconcile", operators=1, reconcile="truth", crashes=1, hops=1),
    Scenario("the worker reports a dead child", parent=True, crashes=1, on_crash="rerun", hops=1),
    Scenario("copies of one message", same_message=True, late=1, copies=1, crashes=1, hops=1),
    Scenario("copies of one message that retries", same_message=True, endings=("retry",), odd=1),
    Scenario("another value", mismatch=True, endings=("no_effect", "error"), odd=1),
    Scenario("renewals", renewals=1, jump=0.6, lapses=3, on_crash="rerun", hops=1),
    Scenario(
        "renewals between steps",
        renewals=1,
        jump=0.6,
        lapses=2,
        on_crash="resume",
        steps=True,
        late=1,
        actors=1,
    ),
    # Three deliveries.
    Scenario("three: in doubt", actors=3, crashes=1, hops=1),
    Scenario("three: rerun", actors=3, on_crash="rerun", lapses=1, hops=1),
    Scenario("three: reconcile", actors=3, reconcile="truth", lapses=1, hops=1),
)

DEEP = (
    Scenario("three: resume", actors=3, on_crash="resume", steps=True, lapses=1, hops=1),
    Scenario("deep: two crashes, silent store", crashes=2, late=1, down=1, lapses=2),
    Scenario("deep: reconcile, crash, silent store", reconcile="truth", crashes=1, late=1, lapses=2),
    Scenario("deep: resume, crash, silent store", on_crash="resume", steps=True, crashes=1, late=1, lapses=2),
    Scenario("deep: rerun, crashes, silent store", on_crash="rerun", crashes=2, late=1, lapses=2),
    Scenario("deep: three, in doubt", actors=3, crashes=1, late=1, lapses=2),
    Scenario("deep: three, rerun", actors=3, on_crash="rerun", crashes=1, lapses=2),
    Scenario("deep: three, resume", actors=3, on_crash="resume", steps=True, crashes=1, lapses=1),
    Scenario("deep: three, reconcile", actors=3, reconcile="truth", crashes=1, lapses=2),
    Scenario("deep: three, operator and reconcile", actors=3, reconcile="truth", operators=1, lapses=2),
)

"""The scenarios that are explored completely. Each rule of the protocol matters in at least one of them.

`CI` takes about a minute of one core. `DEEP` adds a third delivery, a second fault of a kind or a third return. It is
for `python -m tests.proof.explore --deep`.
"""

from __future__ import annotations

from tests.proof.explorer import Scenario

EXITS = ("exit_before", "exit_after")

CI = (
    # Two deliveries, a crash, a lapse, a lost reply. The store has written, or writes later, or never.
    Scenario("in doubt: crash", crashes=1, lapses=2),
    Scenario("in doubt: silent store", down=1, late=1),
    Scenario("in doubt: silent store, at once given up", down=1, late=1, patience=0.0),
    Scenario("resume: crash", on_crash="resume", steps=True, crashes=1, hops=1),
    Scenario("resume: silent store", on_crash="resume", steps=True, late=1, lapses=2, actors=1),
    Scenario("resume: steps in another order", on_crash="resume", steps=True, order=True, crashes=1, hops=1),
    Scenario("resume: crash loop", on_crash="resume", steps=True, crashes=1, max_attempts=1, hops=1),
    Scenario("rerun: crash loop", on_crash="rerun", crashes=2, max_attempts=2, hops=1),
    # The destination is asked.
    Scenario("reconcile: crash", reconcile="truth", crashes=1, lapses=2, hops=1),
    Scenario("reconcile: silent store", reconcile="truth", late=1, hops=1),
    Scenario("reconcile: crash loop", reconcile="truth", crashes=1, lapses=2, max_attempts=1, hops=1),
    Scenario("reconcile: cannot tell", reconcile="unknown", crashes=1, lapses=2, hops=1),
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
        odd=1,
        crashes=1,
        hops=1,
    ),
    Scenario(
        "ends: a step without effect", on_crash="resume", steps=True, endings=("no_effect_in_step",), odd=1
    ),
    # People, main processes, copies, renewals.
    Scenario("operator", operators=1, crashes=1),
    Scenario("two operators", operators=2, crashes=1, actors=1, hops=1),
    Scenario("operator against reconcile", operators=1, reconcile="truth", crashes=1, hops=1),
    Scenario("the worker reports a dead child", parent=True, crashes=1, on_crash="rerun", hops=1),
    Scenario("copies of one message", same_message=True, late=1, copies=1, hops=1),
    Scenario("copies of one message that retries", same_message=True, endings=("retry",), odd=1),
    Scenario("another value", mismatch=True, endings=("no_effect", "error"), odd=1),
    Scenario("renewals", renewals=1, jump=0.6, lapses=2, on_crash="rerun", hops=1),
    Scenario("renewals between steps", renewals=1, on_crash="resume", steps=True, late=1, actors=1),
    # A process that dies: it reports its exit, its worker reports the death, or another process sees it.
    Scenario("exits: in doubt", endings=EXITS, odd=1, late=1, hops=1),
    Scenario(
        "exits: resume",
        endings=("exit_before", "exit_in_step"),
        odd=2,
        on_crash="resume",
        steps=True,
        actors=1,
    ),
    Scenario("exits: rerun", endings=EXITS, odd=2, on_crash="rerun", max_attempts=2, hops=1),
    Scenario("exits: reconcile", endings=EXITS, odd=1, reconcile="truth", hops=1),
    Scenario("deaths reported: in doubt", parent=True, crashes=1, hops=1),
    Scenario(
        "deaths reported: resume", parent=True, crashes=1, on_crash="resume", steps=True, actors=1, hops=1
    ),
    Scenario("deaths reported: reconcile", parent=True, crashes=1, reconcile="truth", hops=1),
    Scenario("deaths seen", same_worker=True, crashes=1, on_crash="rerun", hops=1),
    Scenario(
        "deaths seen and reported", same_worker=True, parent=True, crashes=1, on_crash="rerun", actors=1
    ),
    # A soft time limit, whose exception may come at any stop.
    Scenario("limits: in doubt", soft=1, down=1, hops=1),
    Scenario("limits: silent store", soft=1, late=1, actors=1),
    Scenario("limits: ends", soft=1, endings=("retry", "no_effect", "error"), odd=1, hops=1),
    Scenario("limits: resume", soft=1, crashes=1, on_crash="resume", steps=True, actors=1),
    Scenario("limits: rerun", soft=1, on_crash="rerun", hops=1),
    Scenario("limits: reconcile", soft=1, reconcile="truth", hops=1),
    # Effects and outcome in one transaction.
    Scenario("transaction: crash", on_crash="transaction", crashes=1, hops=1),
    Scenario("transaction: lost commit", on_crash="transaction", late=1, hops=1),
    Scenario("transaction: failed commit", on_crash="transaction", rollbacks=1, hops=1),
    Scenario(
        "transaction: ends",
        on_crash="transaction",
        endings=("error_after", "ambiguous_before", "ambiguous_after", "retry", *EXITS),
        odd=1,
        hops=1,
    ),
    Scenario("transaction: limits", on_crash="transaction", soft=1, hops=1),
    Scenario("transaction: renewals", on_crash="transaction", renewals=1, jump=0.6, lapses=2, actors=1),
    # Operators who ask without a delivery, who decide later than they looked, and whose decision meets a retry.
    Scenario("inquiry", inquirers=1, reconcile="truth", crashes=1, late=1, actors=1, hops=1),
    Scenario("inquiry: cannot tell", inquirers=1, reconcile="unknown", crashes=1, actors=1, hops=1),
    Scenario("inquiry against a retry", inquirers=1, reconcile="truth", endings=("retry",), odd=1, actors=1),
    Scenario("inquiry against operator", inquirers=1, operators=1, reconcile="truth", crashes=1, actors=1),
    Scenario("operator against a retry", operators=1, endings=("retry",), odd=1, hops=1),
    Scenario("operator who takes time", operators=1, unhurried=True, crashes=1, hops=1),
    Scenario(
        "two operators who take time",
        operators=2,
        unhurried=True,
        crashes=1,
        endings=("ambiguous_after",),
        odd=1,
        actors=1,
        hops=1,
    ),
    # Recovery publishes the call of a record after the death of a worker or a submitter, or a lost message.
    Scenario("recovery: crash", recoverers=2, early=True, crashes=1, jump=2.1, actors=1),
    Scenario(
        "recovery: crash, called again",
        recoverers=1,
        early=True,
        links=True,
        crashes=1,
        jump=2.1,
        hops=1,
        on_crash="rerun",
    ),
    Scenario("recovery: rerun", recoverers=2, early=True, crashes=1, jump=2.1, on_crash="rerun", actors=1),
    Scenario(
        "recovery: resume",
        recoverers=1,
        early=True,
        links=True,
        crashes=1,
        jump=2.1,
        on_crash="resume",
        steps=True,
        actors=1,
    ),
    Scenario(
        "recovery: reconcile",
        recoverers=1,
        early=True,
        links=True,
        crashes=1,
        jump=2.1,
        reconcile="truth",
        actors=1,
    ),
    Scenario(
        "recovery: askers die", recoverers=1, early=True, crashes=2, jump=2.1, reconcile="truth", actors=1
    ),
    Scenario(
        "recovery: given up",
        recoverers=2,
        jump=2.1,
        crashes=1,
        early=True,
        losses=1,
        max_attempts=1,
        actors=1,
    ),
    Scenario(
        "recovery: an ambiguous end",
        recoverers=1,
        early=True,
        links=True,
        crashes=1,
        jump=2.1,
        endings=("ambiguous_after",),
        odd=1,
        actors=1,
    ),
    Scenario("recovery: dies twice", recoverers=1, early=True, crashes=2, jump=2.1, actors=1),
    Scenario("recovery: silent store", recoverers=2, jump=2.1, late=1, actors=1, hops=1),
    Scenario(
        "recovery: a retry is lost",
        recoverers=2,
        jump=2.1,
        endings=("retry",),
        odd=1,
        losses=1,
        unsent=1,
        max_attempts=1,
        actors=1,
    ),
    Scenario("recovery: renewals", recoverers=1, jump=2.1, renewals=1, on_crash="rerun", actors=1, hops=1),
    Scenario("recovery: the clock steps", recoverers=1, backs=1, early=True, crashes=1, jump=2.1, actors=1),
    Scenario("accepted", recoverers=1, submitters=2, losses=1, unsent=1, jump=2.1, actors=0, hops=1),
    Scenario(
        "accepted: crash",
        recoverers=2,
        submitters=1,
        crashes=1,
        early=True,
        links=True,
        jump=2.1,
        actors=0,
        hops=1,
    ),
    Scenario("accepted: called meanwhile", recoverers=0, submitters=1, jump=2.1, actors=1, hops=1),
    Scenario("accepted: silent store", recoverers=1, submitters=1, late=1, jump=2.1, actors=0, hops=1),
    Scenario(
        "accepted: released", submitters=2, recoverers=1, endings=("no_effect",), odd=1, jump=2.1, actors=0
    ),
    Scenario("accepted: revoked", submitters=1, recoverers=1, revocations=1, jump=2.1, actors=0, hops=1),
    Scenario("revoked: a copy runs", same_message=True, recoverers=1, revocations=1, jump=2.1, hops=1),
    # An outcome has expired, and a message of its call is delivered afterwards.
    Scenario("late: in doubt", expiries=1, crashes=1, actors=1, hops=1),
    Scenario("late: reconcile", expiries=1, crashes=1, reconcile="truth", actors=1, hops=1),
    Scenario("late: a retry", expiries=1, endings=("retry",), odd=1, actors=1),
    Scenario("late: silent store", expiries=1, late=1, actors=1, hops=1),
    Scenario("late: accepted", expiries=1, submitters=1, recoverers=1, jump=2.1, actors=0, hops=1),
    # Three deliveries.
    Scenario("three: in doubt", actors=3, crashes=1, hops=1),
    Scenario("three: rerun", actors=3, on_crash="rerun", lapses=1, hops=1),
    Scenario("three: reconcile", actors=3, reconcile="truth", lapses=1, hops=1),
)

DEEP = (
    Scenario("deep: crash and silent store", crashes=1, late=1, copies=1, hops=1),
    Scenario("deep: resume, crash", on_crash="resume", steps=True, crashes=1),
    Scenario("deep: reconcile, crash", reconcile="truth", crashes=1, lapses=2),
    Scenario("deep: reconcile, cannot tell", reconcile="unknown", crashes=1, lapses=2),
    Scenario("deep: rerun, crash loop", on_crash="rerun", crashes=2, lapses=2, max_attempts=2, hops=1),
    Scenario(
        "deep: late, without effect",
        on_crash="rerun",
        endings=("no_effect", "retry"),
        odd=2,
        crashes=1,
        hops=1,
    ),
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
    Scenario("deep: resume, silent store", on_crash="resume", steps=True, late=1, hops=1),
    Scenario("deep: two operators", operators=2, crashes=1, hops=1),
    Scenario("deep: limits, silent store", soft=1, late=1, hops=1),
    Scenario("deep: inquiry, retry", inquirers=1, reconcile="truth", endings=("retry",), odd=1, hops=1),
    Scenario("deep: copies of one message", same_message=True, late=1, copies=1, crashes=1, hops=1),
    Scenario(
        "deep: recovery, renewals", recoverers=2, jump=2.1, renewals=1, on_crash="rerun", actors=1, hops=1
    ),
    Scenario("deep: renewals", renewals=1, jump=0.6, lapses=3, on_crash="rerun", hops=1),
    Scenario(
        "deep: renewals between steps",
        renewals=1,
        jump=0.6,
        lapses=2,
        on_crash="resume",
        steps=True,
        late=1,
        actors=1,
    ),
    Scenario("deep: exits, silent store, crash", endings=EXITS, odd=1, crashes=1, late=1, lapses=2),
    Scenario(
        "deep: exits, resume", endings=("exit_before", "exit_in_step"), odd=2, on_crash="resume", steps=True
    ),
    Scenario("deep: deaths reported, resume", parent=True, crashes=1, on_crash="resume", steps=True, hops=1),
    Scenario("deep: deaths seen and reported", same_worker=True, parent=True, crashes=1, on_crash="rerun"),
    Scenario("deep: deaths, reconcile", same_worker=True, parent=True, crashes=1, reconcile="truth"),
    Scenario("deep: limits, reconcile, silent store", soft=1, late=1, reconcile="truth", hops=1),
    Scenario("deep: limits, reconcile, crash", soft=1, crashes=1, reconcile="truth", lapses=2),
    Scenario("deep: limits, resume", soft=2, on_crash="resume", steps=True),
    Scenario("deep: transaction", on_crash="transaction", crashes=1, late=1, rollbacks=1, lapses=2),
    Scenario("deep: transaction, limits, lost commit", on_crash="transaction", soft=1, late=1, lapses=2),
    Scenario(
        "deep: transaction, renewals", on_crash="transaction", renewals=1, jump=0.6, lapses=2, crashes=1
    ),
    Scenario("deep: three, transaction", on_crash="transaction", actors=3, crashes=1, lapses=2),
    Scenario("deep: inquiry", inquirers=1, reconcile="truth", crashes=1, late=1, hops=1),
    Scenario("deep: inquiry, cannot tell", inquirers=1, reconcile="unknown", crashes=1),
    Scenario("deep: inquiry, operator", inquirers=1, operators=1, reconcile="truth", crashes=1, hops=1),
    Scenario("deep: operator against a retry", operators=1, endings=("retry",), odd=1, crashes=1, lapses=2),
    Scenario(
        "deep: operators who take time",
        operators=2,
        unhurried=True,
        crashes=1,
        endings=("ambiguous_after",),
        odd=1,
        hops=1,
    ),
)

# Tests claims of README.md that its blocks do not show. The names come from those blocks.
# ruff: noqa: F821

# "Tasks whose code is not yours are guarded by configuration": `app` comes from that block.
charged = []


@app.task(name="thirdparty.charge")
def thirdparty_charge(order_id, cents):
    charged.append(order_id)
    return cents


assert [thirdparty_charge.apply(("o1", 5)).get() for _ in range(2)] == [5, 5]
assert charged == ["o1"]

# "When a worker dies half way": the effect has happened, and the record has no outcome.
from celery_idem.core.model import MICROSECONDS, Fingerprint, Policy, Request  # noqa: E402
from celery_idem.engine import owners  # noqa: E402
from tests.support.waiting import wait_for  # noqa: E402

key = charge.intent_key("c9", "i9", 1900)
policy = Policy(lease=MICROSECONDS // 10, result_ttl=60 * MICROSECONDS, failure_ttl=60 * MICROSECONDS)
charge.guard.ledger.claim(key, Request(owners.mint(), "dead", Fingerprint(), policy))
made = billing.create("c9", "i9", 1900, "", idempotency_key=key)
before = billing.invoices
wait_for(lambda: charge.guard.ledger.get(key).state == "lapsed")
assert charge.apply(("c9", "i9", 1900)).get() == made
assert billing.invoices == before

"""The tests that every store must pass.

Subclass ``StoreConformance`` in a test module and open your store in ``make_store``::

    from celery_idem.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def make_store(self):
            return MyStore("my://localhost")

pytest collects the tests. The class itself does not use pytest: it has plain asserts, and
``setup_method`` and ``teardown_method``, which other test runners can call too.
"""

from __future__ import annotations

from celery_idem.testing.conformance.expiry import Expiry
from celery_idem.testing.conformance.lost_replies import LostReplies
from celery_idem.testing.conformance.many import ManyValues
from celery_idem.testing.conformance.opened import OpenKeys
from celery_idem.testing.conformance.races import Races
from celery_idem.testing.conformance.single import SingleValues


class StoreConformance(SingleValues, Expiry, ManyValues, OpenKeys, Races, LostReplies):
    """Tests for one kind of store. Each uses its own keys, so the store need not be empty.

    Override ``make_store``. Override the attributes and ``wait_until`` where they do not fit your store.
    """

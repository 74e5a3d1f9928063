"""For callers that do not use Celery. Each module needs its own extra; importing this package needs none.

Never here: rules, stores, records.
"""

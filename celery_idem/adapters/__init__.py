"""For callers that do not speak Celery. Each module needs its own extra; importing this one needs none.

Never here: rules, stores, records.
"""

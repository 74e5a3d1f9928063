"""Listeners for ``celery_idem.engine.events``. Install the ones you want, where your application is made.

Never here: rules, stores, records.
"""

"""Listeners for what ``celery_idem.events`` tells. Install the ones you want, where your application is made."""

"""For Django: an idempotent task with ``delay_on_commit``.

::

    app = Celery("proj", task_cls="celery_idem.adapters.django:IdempotentDjangoTask")

Without ``task_cls``, an application under Django gets Celery's own class for Django. With this class, every task of the
application keeps ``delay_on_commit``, guarded or not.
"""

from __future__ import annotations

from celery.contrib.django.task import DjangoTask

from celery_idem.integration.task import IdempotentTask


class IdempotentDjangoTask(IdempotentTask, DjangoTask):  # type: ignore[misc,unused-ignore]  # Celery's has no types
    """An ``IdempotentTask`` with Celery's ``delay_on_commit`` and ``apply_async_on_commit``."""

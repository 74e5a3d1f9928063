"""A pytest plugin: every application whose author names no task class gets ours. `-p tests.compat.guarded`."""

from celery.app.base import Celery

from celery_idem import IdempotentTask

Celery.task_cls = IdempotentTask
assert issubclass(Celery("check", set_as_current=False).Task, IdempotentTask)

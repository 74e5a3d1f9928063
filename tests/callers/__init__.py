"""All ways to call a task, tested with a real worker and counted effects."""

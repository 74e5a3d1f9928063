"""The caller's door: everything that may call a task, with a real worker and counted effects."""

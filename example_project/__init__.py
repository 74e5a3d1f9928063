"""A billing agent on Celery: the example of celery_idem, and the stage of its demonstration.

| file | role |
|---|---|
| `app` | the Celery application and its configuration; the guard is one switch there |
| `tasks`, `legacy` | what the workers run: ours, and a module nobody wanted to touch |
| `plain` | stands in for the guarded task class when the guard is off |
| `billing_service`, `billing_client` | the destination: HTTP with an SQLite ledger, and the way to it |
| `orchestrator`, `agent` | the callers: one dispatches by task name, one re-plans and tries again |
| `mcp_server`, `mcp_agent` | the task as an MCP tool, and the agent once more, over MCP |
| `simulate` | `python -m example_project.simulate`: starts it all, injects the faults, counts at the ledger |
| `faults`, `stage`, `callers`, `processes`, `server`, `witness`, `report` | what `simulate` is made of |
"""

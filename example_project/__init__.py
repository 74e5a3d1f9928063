"""The example of celery_idem: a billing agent on Celery, and its demonstration under faults.

| file | role |
|---|---|
| `app` | the Celery application and its configuration; the guard is one switch there |
| `tasks`, `legacy` | the tasks: ours, and a module whose code stays unchanged |
| `plain` | stands in for the guarded task class when the guard is off |
| `billing_service`, `billing_client` | the destination (HTTP with a SQLite ledger) and its client |
| `orchestrator`, `agent` | the callers: one dispatches by task name, one plans again and retries |
| `mcp_server`, `mcp_agent` | the task as an MCP tool, and the agent over MCP |
| `simulate` | `python -m example_project.simulate`: starts all processes, injects the faults and counts the effects |
| `faults`, `stage`, `callers`, `processes`, `server`, `witness`, `report` | the parts of `simulate` |
"""

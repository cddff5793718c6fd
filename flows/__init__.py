"""Prefect flows: order, fan-out, retries and artifacts. The work itself is in belt_tasks."""

"""Prefect flows: order, fan-out, retries and artifacts. The work itself is in belt_tasks."""

import os

# before Prefect is imported: nobody is told that belt runs, and a new PREFECT_HOME may make the first start slow
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

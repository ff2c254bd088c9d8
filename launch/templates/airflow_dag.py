"""An Airflow DAG that retrains every night; put it into the folder of DAGs.

The task is tried again where it was killed, and goes on there. A refusal (status 3) fails it at
once, for somebody to look at the report of the day.
"""

import datetime
import subprocess

from airflow.decorators import dag, task
from airflow.exceptions import AirflowFailException

PROJECT = "/opt/syncrec-trainer"
CONFIG = "/shared/retrain.yaml"
LOGS = "/shared/logs"
REFUSED = 3


@dag(
    schedule="15 2 * * *",
    start_date=datetime.datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
)
def syncrec_retrain() -> None:
    """One task a night."""

    @task(retries=3, retry_delay=datetime.timedelta(minutes=5))
    def retrain(ds: str | None = None) -> None:
        day = [f"name={ds}", f"input=[{LOGS}/{ds}.parquet]"]
        status = subprocess.run(
            [".venv/bin/python", "launch/retrain.py", "--config", CONFIG, *day],
            cwd=PROJECT,
        ).returncode
        if status == REFUSED:
            raise AirflowFailException(
                f"{ds} was refused: its report.md says why"
            )
        if status:
            raise RuntimeError(f"status {status}")

    retrain()


syncrec_retrain()

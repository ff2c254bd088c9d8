"""An Airflow DAG that retrains every night; put it into the DAGs' folder. The task tries again where it was killed, and goes on
there; a refusal (status 3) fails it at once, for somebody to look at the day's report."""

import datetime

from airflow.models.dag import DAG
from airflow.operators.bash import BashOperator

with DAG(
    "syncrec_retrain",
    schedule="15 2 * * *",
    start_date=datetime.datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
) as dag:
    BashOperator(
        task_id="retrain",
        cwd="/opt/syncrec-trainer",
        retries=3,
        retry_delay=datetime.timedelta(minutes=5),
        bash_command=(
            ".venv/bin/python launch/retrain.py --config /shared/retrain.yaml name={{ ds }} "
            "'input=[/shared/logs/{{ ds }}.parquet]' || { status=$?; [ $status -eq 3 ] && exit 99; exit $status; }"
        ),
        skip_on_exit_code=None,
    )

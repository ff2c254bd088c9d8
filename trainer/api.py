"""The Python API: logs become a dataset, a dataset becomes a run, and a run answers.

    from trainer import prepare, fit, Run

    data = prepare("logs/", "data/shop")              # paths, a pyarrow Table or a DataFrame
    run = fit(data, "runs/1", model={"dim": 64})      # in this process
    run.evaluate(ranking="full").by_domain            # a pyarrow Table; .to_pandas()
    run.recommend(k=10)                               # a pyarrow Table
    Run.open("runs/1").export("model/")

What is done here is what the scripts in `launch/` do, by the same functions, so a run that was begun
in a notebook is gone on with by `deepspeed launch/train.py`, and the other way round. A process that a
launcher has started is one rank of many; any other is the only one. Whatever is wrong with what is
given raises `InputError`, whose message is one line with the way out.

Each function imports what it needs: preparing loads no PyTorch.
"""

import contextlib
import datetime
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from trainer.config.load import load_config
from trainer.config.prepare import PrepareConfig
from trainer.config.run import RunConfig
from trainer.config.serving import (
    ExportConfig,
    HistoriesConfig,
    RecommendConfig,
)
from trainer.data.format.dataset import Dataset
from trainer.errors import InputError, RunStopped
from trainer.evaluation.evaluation import Evaluation
from trainer.reporting.run_log import read_records
from trainer.reporting.run_report import update_report
from trainer.run_files import METRICS_FILE, REPORT

if TYPE_CHECKING:
    import pandas as pd

    from trainer.distributed.process_group import Ranks
    from trainer.training.callbacks import Callback

PathLike = str | os.PathLike[str]
Logs: TypeAlias = "PathLike | Sequence[PathLike] | pa.Table | pd.DataFrame"


def prepare(
    logs: Logs,
    output: PathLike,
    *,
    fresh: bool = False,
    **options: Any,
) -> Dataset:
    """Makes a dataset out of interaction logs, and returns it.

    logs: a path, a glob or several of them (docs/data.md has the forms); or the rows themselves, as a pyarrow
    Table or a pandas DataFrame, with a user, an item, a domain and a time.
    output: the folder of the dataset; it does not exist yet, or is empty.
    fresh: begins anew where an earlier call was killed.
    options: those of `trainer.config.prepare.PrepareConfig`, e.g. `user_column="uid"`, `min_user=5`,
    `where="rating >= 4"`, `bad_rows="skip"`.
    """
    from trainer.data.prepare.extend import read_options
    from trainer.data.prepare.pipeline import prepare as prepare_logs

    known = {field.name for field in fields(PrepareConfig)} - {
        "inputs",
        "output",
    }
    _refuse_unknown("prepare", options, known)
    if options.get("extend") is not None:
        options = read_options(options["extend"]) | options
    with _paths_of(logs, output) as paths:
        config = PrepareConfig(
            inputs=paths, output=os.fspath(output), **options
        )
        return prepare_logs(config, fresh)


def fit(
    data: Dataset | PathLike,
    run: PathLike,
    *,
    config: RunConfig | PathLike | Sequence[PathLike] = (),
    callbacks: "Sequence[Callback]" = (),
    fresh: bool = False,
    accept_changes: bool = False,
    device: str = "auto",
    titles: PathLike | None = None,
    **settings: Any,
) -> "Run":
    """Trains on a dataset, and returns the run, whose best model has been tested.

    A run's folder that holds a checkpoint is gone on with. An interrupt (the stop button of a notebook)
    writes one, then raises KeyboardInterrupt.

    data: what `prepare` gives, or a dataset's folder or address.
    run: the folder that gets everything.
    config: a RunConfig, or presets by name ("amazon4") or YAML files, each over the ones before it.
    settings: over the config, e.g. `epochs=2`, `model={"dim": 64}` or `**{"model.dim": 64}`.
    callbacks: see `trainer.training.callbacks.Callback`; called on all ranks.
    fresh: refuses a folder that holds a run. accept_changes: goes on though a setting has changed.
    device: "cpu" or "cuda"; "auto": CUDA where there is a device.
    titles: a table with item_id, title and maybe domain, for the report.
    """
    from trainer.training.loop import train

    place = data.folder if isinstance(data, Dataset) else data
    settings = settings | {"data": os.fspath(place), "run": os.fspath(run)}
    whole = _config_of(config, settings)
    try:
        with _joined(whole.timeout_minutes, device) as ranks:
            train(
                whole,
                ranks,
                fresh,
                accept_changes,
                callbacks,
                _path_of(titles),
            )
    except RunStopped as stopped:
        if stopped.interrupted:
            # What a notebook expects of its stop button; the checkpoint is written.
            raise KeyboardInterrupt(str(stopped)) from None
        raise
    return Run(Path(run), device=device)


@dataclass(frozen=True)
class Run:
    """A finished run: a folder, and what can be asked of its best model.

    data: the dataset's folder, where it is not where the run found it; or another dataset, in
    which items are found by their ids. device: what evaluates, recommends and exports, as for `fit`.
    """

    folder: Path
    data: str | None = None
    device: str = "auto"

    @classmethod
    def open(
        cls,
        folder: PathLike,
        data: Dataset | PathLike | None = None,
        device: str = "auto",
    ) -> "Run":
        """The run in a folder. Raises InputError where there is none."""
        _read_config(os.fspath(folder))
        place = data.folder if isinstance(data, Dataset) else data
        return cls(Path(folder), _path_of(place), device)

    @cached_property
    def config(self) -> RunConfig:
        """Every setting that was in force."""
        return _read_config(self.folder)

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, compared with what the run has recorded of it."""
        from trainer.checkpoint.best_model import open_run

        with _joined(device=self.device) as ranks:
            _, dataset = open_run(self.folder, self.data, ranks=ranks)
        return dataset

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the run has logged: the records of metrics.jsonl, oldest first."""
        return read_records(self.folder / METRICS_FILE)

    @property
    def report(self) -> Path:
        """The page for people, as a file."""
        return self.folder / REPORT

    def evaluate(
        self,
        *,
        split: Literal["test", "validation"] = "test",
        ranking: Literal["sampled", "full"] = "sampled",
        candidates: PathLike | None = None,
        output: PathLike | None = None,
        recency_term: bool = False,
        skip_recency: bool = False,
    ) -> Evaluation:
        """Ranks the held-out items, and returns HR, NDCG and MRR by domain.

        ranking: among drawn candidates, or among all items of the domain (with 95 % confidence
        intervals); the latter is kept in the run's folder and shown in its report.
        candidates: Parquet with user_id, positive, negatives, in place of drawn ones.
        output: Parquet that gets each user's position and scores.
        recency_term: rank test items by the model with its recency term, too (docs/evaluate.md).
        skip_recency: leave recency popularity out, so that events need not be counted.
        """
        from trainer.evaluation.evaluate_run import evaluate_run

        if split not in ("test", "validation"):
            raise InputError(f"split is {split!r}: give 'test' or 'validation'")
        if ranking not in ("sampled", "full"):
            raise InputError(
                f"ranking is {ranking!r}: give 'sampled' or 'full'"
            )
        full = ranking == "full"
        with _joined(self.config.timeout_minutes, self.device) as ranks:
            record = evaluate_run(
                self.folder,
                ranks,
                split,
                self.data,
                _path_of(candidates),
                _path_of(output),
                full,
                recency_term,
                skip_recency,
            )
            if full and ranks.first:
                update_report(self.folder)
        return Evaluation.from_record(record)

    def recommend(
        self,
        k: int = 10,
        *,
        domains: Sequence[str] = (),
        users: Iterable[Any] | PathLike | None = None,
        logs: Logs = (),
        keep_seen: bool = False,
        recency_term: bool | None = None,
        output: PathLike | None = None,
        **options: Any,
    ) -> pa.Table:
        """The k best items of each domain for each user: domain, user_id, history, rank, item_id, score.

        domains: names; none: all.
        users: ids, or a file that has them; None: all.
        logs: histories in place of those of the run's dataset, as `prepare` takes them.
        keep_seen: items that the user has had are recommended too.
        recency_term: score with what was touched lately, too (docs/evaluate.md); None: as
        `evaluation.recency_term` of the run.
        output: a folder that gets the same as partitioned Parquet, and stays.
        options: column names and memory, those of `trainer.config.serving.AskedConfig`.
        """
        from trainer.serving.recommend import recommend

        known = {field.name for field in fields(HistoriesConfig)} - {
            "inputs",
            "users",
        }
        _refuse_unknown("recommend", options, known)
        config = RecommendConfig(
            k=k,
            domains=tuple(domains),
            keep_seen=keep_seen,
            recency_term=recency_term,
        )
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            column = options.get("user_column", "user_id")
            wanted = _file_of_users(users, column, Path(scratch))
            paths = stack.enter_context(_paths_of(logs, Path(scratch) / "logs"))
            asked = HistoriesConfig(inputs=paths, users=wanted, **options)
            folder = (
                Path(scratch) / "recommendations" if output is None else output
            )
            with _joined(self.config.timeout_minutes, self.device) as ranks:
                if output is None and ranks.world_size > 1:
                    raise InputError(
                        "recommend: several ranks write into one folder: give output=DIR, which all see"
                    )
                recommend(
                    self.folder,
                    os.fspath(folder),
                    ranks,
                    config,
                    asked,
                    self.data,
                )
                return _read_recommendations(Path(folder))

    def export(
        self,
        output: PathLike,
        *,
        dtype: Literal["fp32", "fp16"] = "fp32",
        faiss: str | None = None,
        recency_term: bool | None = None,
    ) -> dict[str, Any]:
        """Writes a folder that PyTorch, NumPy and safetensors alone can serve; returns its schema.

        dtype: of the item vectors. faiss: an index of each domain, by FAISS's name for it.
        recency_term: with what was touched lately, too (docs/serve.md); None: as
        `evaluation.recency_term` of the run.
        """
        from trainer.serving.export import export_run

        config = ExportConfig(dtype, faiss, recency_term)
        with _joined(self.config.timeout_minutes, self.device) as ranks:
            return export_run(
                self.folder, os.fspath(output), ranks, config, self.data
            )


def _read_config(folder: PathLike) -> RunConfig:
    from trainer.checkpoint.best_model import read_config

    return read_config(os.fspath(folder))


@contextlib.contextmanager
def _joined(
    timeout_minutes: float = 30.0, device: str = "auto"
) -> "Iterator[Ranks]":
    """The process group, for one call; what it sets in the environment is put back."""
    from trainer.distributed import process_group

    environment = dict(os.environ)
    try:
        with process_group.join_process_group(timeout_minutes, device) as ranks:
            yield ranks
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _path_of(place: PathLike | None) -> str | None:
    """A place as text; None where none is given."""
    return None if place is None else os.fspath(place)


def _config_of(
    config: RunConfig | PathLike | Sequence[PathLike], settings: dict[str, Any]
) -> RunConfig:
    """The configuration, and keywords over it."""
    files: list[PathLike] = []
    sources: list[tuple[str, DictConfig]] = []
    if isinstance(config, RunConfig):
        sources.append(("config", OmegaConf.create(asdict(config))))
    elif isinstance(config, (str, os.PathLike)):
        files.append(config)
    else:
        files += config
    for key, value in settings.items():
        sources.append((key, _section_of(key, value)))
    names = [os.fspath(file) for file in files]
    return load_config(names, [], more=sources)


def _section_of(key: str, value: Any) -> DictConfig:
    """A keyword by itself, so that an error names it; a dotted key becomes sections in sections."""
    section = _plain(value)
    for name in reversed(key.split(".")):
        section = {name: section}
    return OmegaConf.create(section)


def _plain(value: Any) -> Any:
    """A value as YAML has it: paths and dates as text, in a section too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value


def _refuse_unknown(
    function: str, options: dict[str, Any], known: set[str]
) -> None:
    for name in options:
        if name not in known:
            names = ", ".join(sorted(known))
            raise InputError(
                f"{function}: there is no option {name!r} (there are: {names})"
            )


@contextlib.contextmanager
def _paths_of(logs: Logs, output: PathLike) -> Iterator[tuple[str, ...]]:
    """The files of logs. Rows in memory are written beside the output, for as long as they are read."""
    if isinstance(logs, (str, os.PathLike)):
        yield (os.fspath(logs),)
        return
    table = _table_of(logs)
    if table is None:
        paths = cast(Sequence[PathLike], logs)
        yield tuple(os.fspath(path) for path in paths)
        return
    parent = Path(output).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=".logs-")
    except OSError as error:
        raise InputError(
            f"{parent}: cannot be written ({error.strerror})"
        ) from None
    with folder as name:
        file = Path(name) / "logs.parquet"
        pq.write_table(table, file)
        yield (str(file),)


def _table_of(logs: Any) -> pa.Table | None:
    """Rows in memory as an Arrow table; None for anything else."""
    if isinstance(logs, pa.Table):
        return logs
    if type(logs).__module__.partition(".")[0] == "pandas":
        try:
            return pa.Table.from_pandas(logs, preserve_index=False)
        except (pa.ArrowException, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the DataFrame cannot be read: {reason}"
            ) from None
    return None


def _file_of_users(
    users: Iterable[Any] | PathLike | None, column: str, folder: Path
) -> str | None:
    """The file that has the users who are asked for."""
    if users is None:
        return None
    if isinstance(users, (str, os.PathLike)):
        return os.fspath(users)
    try:
        table = pa.table({column: list(users)})
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"users: these are no ids of one type: {reason}"
        ) from None
    file = folder / "users.parquet"
    pq.write_table(table, file)
    return str(file)


def _read_recommendations(folder: Path) -> pa.Table:
    """The partitions as one table, the domain first."""
    files = sorted(str(file) for file in folder.glob("domain=*/*.parquet"))
    if not files:
        raise InputError(f"{folder}: there are no recommendations in it")
    by_domain = pds.partitioning(
        pa.schema([("domain", pa.string())]), flavor="hive"
    )
    dataset = pds.dataset(
        files, partitioning=by_domain, partition_base_dir=str(folder)
    )
    names = [
        "domain",
        *(name for name in dataset.schema.names if name != "domain"),
    ]
    return dataset.to_table(columns=names)

"""The names of all files and folders that runs, evaluations and publishing leave on disk.

A run's folder (`run=DIR`):

    run/.lock                                   held by the process that writes here
    run/config.yaml                             the effective configuration
    run/split.json                              of a split by time: where its cuts are
    run/metrics.jsonl                           one record a line: train, validation, test
    run/tensorboard/                            the same figures as TensorBoard's event files
    run/trackers.json                           the run's own name in each tracker (MLflow, W&B)
    run/wandb/                                  W&B's files
    run/phases/rank-00000.jsonl                 the phases of a rank's steps, a line a step
    run/trace.html                              who waits for whom (`syncrec trace`)
    run/profile/                                traces of PyTorch's profiler, a table of operators
    run/nccl/rank-0                             a rank's last NCCL collectives, after a timeout
    run/status.json                             whether it trains, has stopped, failed or finished
    run/report.html                             the run on one page
    run/look.json                               what an inspection of the best model gave
    run/recency-half-life.json                  recency popularity's half-life, chosen on validation
    run/recency-term.json                       the best model's recency term, fitted on validation
    run/latest.json                             names the newest checkpoint
    run/best.json                               names the checkpoint with the best validation
    run/evaluation-full-test.json               the record of a full ranking, by split
    run/ranks-test.parquet                      each user's positions, by split
    run/checkpoints/step-00001200/              a checkpoint; a second one of the step: step-00001200-1
        manifest.json                           size and checksum of every other file
        state.json                              where the run was, its configuration, its dataset
        dense.safetensors                       the dense model's weights
        optimizer.safetensors                   the dense optimizer's state
        table-00000-of-00002.safetensors        rows of the item table, one file a rank
        metrics.jsonl                           what was logged until then

A folder of published versions (`launch/publish.py --to DIR`):

    published/.lock                             held by the process that publishes
    published/current.json                      names the version that serves
    published/refused.json                      why the last candidate was refused
    published/versions/0001/version.json        what the version was made from
    published/versions/0001/model/              the export that a service loads
"""

# In a run's folder.
LOCK = ".lock"
CONFIG = "config.yaml"
SPLIT = "split.json"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRACKERS = "trackers.json"
WANDB = "wandb"
PHASES_FOLDER = "phases"  # see phases_file
TRACE = "trace.html"
PROFILE = "profile"  # see trace_file
OPERATORS = "operators.txt"  # in it
NCCL = "nccl"
STATUS = "status.json"
REPORT = "report.html"
LOOK = "look.json"
HALF_LIFE = "recency-half-life.json"
RECENCY_TERM = "recency-term.json"
LATEST = "latest.json"
BEST = "best.json"
HEADLINE = (
    "NDCG@10"  # in it and in records: the metric that chooses the best model
)
FULL = "evaluation-full"  # see full_ranking_file
RANKS = "ranks-{split}.parquet"  # see user_ranks_file
CHECKPOINTS = "checkpoints"

# In a checkpoint's folder.
MANIFEST = "manifest.json"
STATE = "state.json"
DENSE = "dense.safetensors"
OPTIMIZER = "optimizer.safetensors"

# In the folder of a dataset that was extended.
EXTENSION = "extension"

# In a folder of published versions.
CURRENT = "current.json"
REFUSED = "refused.json"
VERSIONS = "versions"

# In a published version's folder.
VERSION = "version.json"
MODEL = "model"


def full_ranking_file(split: str) -> str:
    """The file with the record of a full ranking. split: test or validation."""
    return f"{FULL}-{split}.json"


def user_ranks_file(split: str) -> str:
    """The file with each user's positions in a full ranking. split: test or validation."""
    return RANKS.format(split=split)


def phases_file(rank: int) -> str:
    """The file with the phases of a rank's steps."""
    return f"{PHASES_FOLDER}/rank-{rank:05d}.jsonl"


def trace_file(first: int, last: int, rank: int) -> str:
    """The file with the profiler's trace of some steps of a rank."""
    return f"{PROFILE}/steps-{first}-{last}-rank-{rank:05d}.trace.json.gz"


def memory_file(rank: int) -> str:
    """The file with a snapshot of a rank's device that ran out of memory."""
    return f"{PROFILE}/memory-rank-{rank:05d}.pickle"


def checkpoint_name(step: int, repetition: int = 0) -> str:
    """A checkpoint's folder in CHECKPOINTS. repetition: above 0 for later ones of the step."""
    name = f"step-{step:08d}"
    if repetition > 0:
        name += f"-{repetition}"
    return name


def table_file(rank: int, world_size: int) -> str:
    """The file with the rows of the item table that a rank holds."""
    return f"table-{rank:05d}-of-{world_size:05d}.safetensors"

"""Every flag that the scripts have is taken, and gives what it says."""

import importlib

import pytest

from trainer.config.command_line.common_options import RecencyTerm, Verbosity
from trainer.config.retraining import PublishConfig
from trainer.errors import InputError

COLUMNS = "--user-column u --item-column i --domain-column d --time-column t"
COMMANDS = {
    "train": "--config a.yaml --config b.yaml --deepspeed_config d.json --show-config "
    "--fresh --accept-changes --max-restarts 3 --quiet --local_rank=0 data=d run=r epochs=3",
    "evaluate": "--of r --data d --json --split validation --ranking full "
    "--candidates c --output o --skip-recency --local_rank 1",
    "export": "--run r --data d --json --output o --dtype fp16 --faiss IVF1024,PQ32 "
    "--recency-term --model m --refresh-counts a b --log-domain z --memory 2GB",
    "recommend": "--run r --output o --input a b --users f -k 3 --domain x --domain y "
    "--keep-seen --log-domain z --batch-size 7 --part-users 8 --memory 2GB --fresh "
    "--skip-recency-term",
    "publish": "--candidate c --to p --data d --tolerance 0.1 --fall 0.2 --domain-fall "
    "0.3 --own-fall 0.4 --least-users 5 --keep 6 --dtype fp16 --json --local_rank=0",
    "retrain": "--config a.yaml --config b.yaml name=n input=[a]",
    "study": "--data d --output o --base a --base b --config c --recbole-python p "
    "seeds=[0,1] parallel=2",
    "synthesize": "--output o --users 5 --items 600 --domains 3 --mean-length 4 --seed 1 "
    "--topics 3 --interest-drift 0.2 --unrelated-drift 0.3 --unrelated-share 0.4 "
    "--on-topic 0.5 --exponent 1.5 --hours 2 --first-user 1 --last-user 4 --processes 1",
    "prepare": "--input a b --output o --domain x --extend e --keep-log --whole-log "
    "--since 2024 --days 3 --time-unit ms --retire --min-user 1 --min-item 2 --seed 3 "
    "--streams 4 --shard-users 5 --block-users 6 --memory 1GB --processes 2 "
    "--engine spark --fresh",
    "demo": "--output o",
}
EXPECTED = {
    "train": {
        "config": ["a.yaml", "b.yaml"],
        "deepspeed_config": "d.json",
        "max_restarts": 3,
        "quiet": True,
        "settings": ["data=d", "run=r", "epochs=3"],
    },
    "evaluate": {
        "run": "r",
        "split": "validation",
        "ranking": "full",
        "json": True,
    },
    "export": {
        "dtype": "fp16",
        "faiss": "IVF1024,PQ32",
        "recency_term": True,
        "refresh_counts": ("a", "b"),
    },
    "recommend": {
        "k": 3,
        "domain": ["x", "y"],
        "input": ("a", "b"),
        "users": "f",
        "skip_recency_term": True,
    },
    "publish": {
        "rules": PublishConfig(
            tolerance=0.1,
            fall=0.2,
            domain_fall=0.3,
            own_fall=0.4,
            least_users=5,
            keep=6,
            dtype="fp16",
        ),
        "to": "p",
    },
    "retrain": {
        "config": ["a.yaml", "b.yaml"],
        "settings": ["name=n", "input=[a]"],
    },
    "study": {"base": ["a", "b"], "settings": ["seeds=[0,1]", "parallel=2"]},
    "synthesize": {"first_user": 1, "last_user": 4, "processes": 1},
    "prepare": {
        "input": ("a", "b"),
        "days": 3.0,
        "streams": 4,
        "engine": "spark",
    },
    "demo": {"output": "o"},
}


@pytest.mark.parametrize("script", COMMANDS)
def test_every_flag_is_taken(script):
    words = COMMANDS[script].split()
    if script in ("recommend", "prepare", "export"):
        words += COLUMNS.split()
    options = importlib.import_module(f"launch.{script}").parse(words)
    for name, value in EXPECTED[script].items():
        assert getattr(options, name) == value
    if script in ("recommend", "prepare", "export"):
        assert (options.user_column, options.time_column) == ("u", "t")


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_read_at_a_hundred_columns(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    parse = importlib.import_module(f"launch.{script}").parse
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "--version" in text


@pytest.mark.parametrize(
    ("words", "version"),
    [([], None), (["--rollback"], ""), (["--rollback", "3"], "3")],
)
def test_a_rollback_may_name_its_version(words, version):
    from launch.publish import parse

    assert parse(["--to", "p", *words]).rollback == version


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        (Verbosity(), []),
        (Verbosity(quiet=True), ["log.console=quiet"]),
        (Verbosity(verbose=True), ["log.console=verbose"]),
    ],
)
def test_how_much_is_shown(options, choice):
    assert options.verbosity_settings() == choice


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        (RecencyTerm(), None),
        (RecencyTerm(recency_term=True), True),
        (RecencyTerm(skip_recency_term=True), False),
    ],
)
def test_whether_scores_have_the_recency_term(options, choice):
    assert options.wants_recency_term() is choice


def test_options_that_contradict_are_refused():
    with pytest.raises(InputError, match="--quiet and --verbose"):
        Verbosity(quiet=True, verbose=True).verbosity_settings()
    both = RecencyTerm(recency_term=True, skip_recency_term=True)
    with pytest.raises(InputError, match="--recency-term and --skip"):
        both.wants_recency_term()

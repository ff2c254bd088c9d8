"""A rank that looks at a run's best model and writes what it sees: RUN FILE."""

import sys
from pathlib import Path

import torch

from trainer.checkpoint.best_model import load_trained_model, open_run
from trainer.distributed import process_group
from trainer.evaluation.inspect import inspect_model
from trainer.files.atomic import write_json


def main():
    """Looks with as many ranks as were started."""
    run, file, *_ = (
        argument
        for argument in sys.argv[1:]
        if not argument.startswith("--local_rank")
    )
    with process_group.join_process_group() as ranks:
        config, dataset = open_run(run)
        trained = load_trained_model(run, config, dataset, ranks)
        model = trained.model
        table = trained.table
        with torch.no_grad():
            for gate in (model.cross_gate, *model.single_gates):
                gate.weight *= 1000  # after three steps a gate's means are the same over any users
        found = inspect_model(model, table, dataset, config, ranks)
        if ranks.first:
            write_json(Path(file), found)


if __name__ == "__main__":
    main()

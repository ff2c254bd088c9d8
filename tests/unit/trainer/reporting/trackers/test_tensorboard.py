"""TensorBoard's event files."""

from tests.unit.trainer.reporting.test_run_log import HOSTILE
from trainer.reporting.trackers.tensorboard import TensorBoard
from trainer.reporting.trackers.tracker import TrackedRun


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def open_board(folder, resume_step=None):
    return TensorBoard(TrackedRun(folder, "run", "", {}, resume_step))


def test_it_has_every_figure_and_forgets_what_a_resume_redoes(tmp_path):
    board = open_board(tmp_path)
    for step in (10, 20, 30):
        board.log({"loss/total": float(step)}, step)
    board.log({"validation mean/NDCG@10": 0.5}, 30)
    board.end("stopped")
    board = open_board(tmp_path, 20)
    board.log({"loss/total": 99.0}, 30)
    board.summarize({"test HR@5/Books": 0.25}, 30)
    board.end("finished")
    found = scalars(tmp_path)
    assert found["loss/total"] == [(10, 10.0), (20, 20.0), (30, 99.0)]
    assert found["test HR@5/Books"] == [(30, 0.25)]
    assert not found.get("validation mean/NDCG@10")


def test_hostile_names_are_letters(tmp_path):
    board = open_board(tmp_path)
    for name in HOSTILE:
        board.log({f"phi/{name}": 1.0}, 1)
    board.end("finished")
    assert len(scalars(tmp_path)) == len(HOSTILE)

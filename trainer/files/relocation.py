"""Where a recorded path leads after the folder that it was recorded in was moved, or from elsewhere."""

from pathlib import Path


def relocate(recorded: str, anchor: str, anchor_now: Path) -> Path | None:
    """The path that stands to `anchor_now` as `recorded` stood to `anchor`; None where that is open.

    What both anchors end in alike is what was moved together, or what was relative to one folder:

        recorded                  anchor                  anchor_now              returns
        data/all                  runs/1                  /home/a/runs/1          /home/a/data/all
        /old/days/1/dataset       /old/days/1/run         /new/days/1/run         /new/days/1/dataset
        /data/all                 /old/runs/1             /new/runs/1             None
    """
    before = list(Path(anchor).parts)
    now = list(anchor_now.absolute().parts)
    while before and now and before[-1] == now[-1]:
        before.pop()
        now.pop()
    parts = list(Path(recorded).parts)
    if not now or parts[: len(before)] != before:
        return None
    return Path(*now, *parts[len(before) :])


def find_moved(recorded: str, root: Path) -> Path:
    """A recorded folder that is not there any more: below `root` if the end of its path leads to one.

        recorded                  root      returns
        /old/days/1/run           /new      /new/days/1/run, if it is there

    One name alone says too little.
    """
    if Path(recorded).is_dir():
        return Path(recorded)
    parts = Path(recorded).parts
    for begin in range(1, len(parts) - 1):
        moved = root.joinpath(*parts[begin:])
        if moved.is_dir():
            return moved
    return Path(recorded)

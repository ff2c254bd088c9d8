"""A day whose items are shuffled in one domain is refused; the same day as it was is published."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from launch.retrain import REFUSED
from tests.ranks.test_retrain import retrained
from trainer.config.prepare import SyntheticConfig
from trainer.data.synthetic import synthesize_logs

SPOILED = "video"
SETTINGS = """
folder: {folder}
settings: [stream.workers=0, global_batch_size=64, model.dim=16, model.ffn_dim=16, model.max_length=32,
  model.experts=2, model.cross_experts=1, model.blocks=1, model.time_knots=0, table.optimizer=adagrad,
  table.learning_rate=0.1, negatives.shared=48, epochs=8, log.tensorboard=false]
warm_settings: [epochs=2]
"""


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """The logs of three days, of which the first is most of a year."""
    folder = tmp_path_factory.mktemp("days")
    config = SyntheticConfig(
        users=1500, items=240, domains=3, mean_length=40, topics=16
    )
    synthesize_logs(folder / "logs", config)
    events = ds.dataset(folder / "logs").to_table().sort_by("timestamp")
    bounds = [0, int(0.6 * len(events)), int(0.8 * len(events)), len(events)]
    files = []
    for number in range(3):
        first, last = bounds[number : number + 2]
        files.append(folder / f"{number + 1}.parquet")
        pq.write_table(events.slice(first, last - first), files[-1])
    return files


def shuffled(day, file):
    """The day's logs, in which the items of one domain have changed their users."""
    events = pq.read_table(day)
    of_domain = pc.equal(events["domain"].cast(pa.string()), SPOILED)
    (row_N,) = np.nonzero(of_domain.to_numpy(zero_copy_only=False))
    item_N = events["item_id"].to_numpy().copy()
    item_N[row_N] = np.random.default_rng(0).permutation(item_N[row_N])
    index = events.column_names.index("item_id")
    spoiled = events.set_column(index, "item_id", pa.array(item_N))
    pq.write_table(spoiled, file)
    return file


@pytest.mark.slow
def test_a_day_whose_items_are_shuffled_in_one_domain_is_refused(
    days, tmp_path
):
    (tmp_path / "retrain.yaml").write_text(SETTINGS.format(folder=tmp_path))
    for number in (1, 2):
        result, _ = retrained(tmp_path, str(number), days[number - 1])
        assert result["published"] == f"000{number}"
    spoiled = shuffled(days[2], tmp_path / "spoiled.parquet")
    result, _ = retrained(tmp_path, "3", spoiled, status=REFUSED)
    assert result["published"] is None
    for reason in result["reasons"]:
        assert reason.startswith(SPOILED) or reason.startswith("mean ")
    result, _ = retrained(tmp_path, "4", days[2], "leave_out=[3]")
    assert result["published"] == "0003"

"""A look at a trained model sees the same with one rank and with two."""

import json

import pytest

from tests.ranks.conftest import ROOT, ranks_of, run

SCRIPT = ROOT / "tests" / "helpers" / "looked.py"


def test_two_ranks_see_what_one_sees(trained, tmp_path):
    looks = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        run(
            ranks_of(ranks, SCRIPT, trained, file),
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
        )
        looks.append(json.loads(file.read_text()))
    own, one, two = json.loads((trained / "look.json").read_text()), *looks
    assert own["items"] == one["items"] == two["items"]
    assert own["lambda"] == one["lambda"] == two["lambda"]
    for view in ("cross", "single"):
        assert (
            one["gates"][view].keys()
            == two["gates"][view].keys()
            == own["gates"][view].keys()
        )
        for name, weights in two["gates"][view].items():
            assert weights == pytest.approx(one["gates"][view][name], abs=2e-4)

"""Stands for launch/prepare.py: see tests/helpers/fake_retrain/stage.py."""

from stage import prepare

prepare()

"""Stands for launch/prepare.py: see tests/trainer/fake_retrain/stage.py."""

from stage import prepare

prepare()

"""Stands for launch/publish.py: see tests/trainer/fake_retrain/stage.py."""

from stage import publish

publish()

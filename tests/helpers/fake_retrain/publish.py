"""Stands for launch/publish.py: see tests/helpers/fake_retrain/stage.py."""

from stage import publish

publish()

"""Stands for launch/evaluate.py: see tests/helpers/fake_retrain/stage.py."""

from stage import evaluate

evaluate()

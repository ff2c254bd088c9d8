"""Stands for launch/train.py: see tests/helpers/fake_retrain/stage.py."""

from stage import train

train()

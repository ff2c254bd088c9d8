"""Stands for launch/train.py: see tests/trainer/fake_retrain/stage.py."""

from stage import train

train()

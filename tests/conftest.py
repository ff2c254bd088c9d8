"""What holds for all tests: they take the CPU, also beside a device (tests/unit/test_cuda.py asks for it)."""

import os

from hypothesis import settings

# Before DeepSpeed is imported, here and in the processes that a test starts: it would take a device
# that it sees.
os.environ["DS_ACCELERATOR"] = "cpu"

# How long an example takes says nothing on a machine that does other work too.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

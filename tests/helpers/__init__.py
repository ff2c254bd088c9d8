"""What tests share: programs that they start, data that they make, and the processes of ranks."""

from pathlib import Path

HELPERS = Path(__file__).parent

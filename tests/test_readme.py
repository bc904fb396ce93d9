"""The README's tables are those of the recorded results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

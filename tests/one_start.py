"""One Ray starts at a time, over all the test processes of this machine.

Ray gives a node 30 seconds to come up. Two clusters whose twenty processes import torch at the
same moment can need more on two cores.
"""

import tempfile
from pathlib import Path

from filelock import BaseFileLock, FileLock

TIMEOUT_S = 600.0


def one_start_at_a_time() -> BaseFileLock:
    """A context; released by the system should the process that holds it die."""
    return FileLock(Path(tempfile.gettempdir()) / "wan-serve-tests-start.lock", timeout=TIMEOUT_S)

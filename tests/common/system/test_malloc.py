"""Memory that a process keeps."""

import subprocess
import sys

import pytest

TAKE_AGAIN = """
import resource
import numpy as np
from fedgex.common.system import malloc

if {keep}:
    malloc.keep_freed()
np.ones(64 * 2**20, dtype=np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(64 * 2**20, dtype=np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(*, keep: bool) -> int:
    """Return how many a process maps to take an array as large as one it freed."""
    command = [sys.executable, "-c", TAKE_AGAIN.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_an_array_as_large_as_one_that_was_freed_takes_no_new_pages():
    assert new_pages(keep=True) < new_pages(keep=False) / 10

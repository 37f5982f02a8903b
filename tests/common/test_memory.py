"""Memory that a process keeps."""

import resource

import numpy as np

from fedgex.common import memory

SIZE = 64 * 2**20


def faults_of_taking_an_array_again() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(SIZE, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_an_array_as_large_as_one_that_was_freed_takes_no_new_pages():
    memory.keep_freed()
    np.ones(SIZE, dtype=np.uint8)

    again = faults_of_taking_an_array_again()

    assert again < 100  # 500 and more, were it mapped anew

"""Those who train side by side end with the command that started them."""

import subprocess
import sys
import time
from pathlib import Path

WORK = """
import os
import time
from fedgex.simulations.processes import each_done

def work(job):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    list(each_done(work, [1, 2], 2))
"""


def test_whoever_trains_ends_when_the_command_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().strip()
        assert worker.exists()

        parent.kill()

        until = time.monotonic() + 20
        while worker.exists() and time.monotonic() < until:
            time.sleep(0.1)
    assert not worker.exists()

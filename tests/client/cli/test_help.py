"""`fedgex-site --help` is fast, and lists the commands in the order of their use."""

import subprocess
import sys

from typer.testing import CliRunner

from fedgex.client.cli import app

HEAVY = ("torch", "opacus", "lifelines", "pandas", "pyarrow", "flwr", "pydantic")


def test_help_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys\n"
        "from fedgex.client.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        f"print('heavy:', *(name for name in {HEAVY} if name in sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert "check-data" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_help_lists_every_command() -> None:
    lines = CliRunner().invoke(app, ["--help"]).stdout.splitlines()

    names = [words[1] for line in lines if len(words := line.split()) > 2]
    commands = "check-data init join check-connection status pause resume log start "
    commands += "stop study ledger predict audit"
    assert [name for name in names if name in commands.split()] == commands.split()

"""Flower ServerApp: read the settings, do the job that they name; no maths."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgex.server import deployment
from fedgex.server.run import conduct
from fedgex.server.settings import ServerSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do the job of the file that the run config names, or of the environment."""
    named = context.run_config.get("settings")
    settings = ServerSettings.load(Path(str(named)) if named else None)
    jobs = {
        "conduct": conduct,
        "publish": deployment.publish,
        "deliver": deployment.deliver,
    }
    jobs[settings.job](grid, settings)

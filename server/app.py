"""Flower ServerApp: read the settings, do the job that they name; no maths."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgex.server import deployment
from fedgex.server.settings import ServerSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do the job of the file that the run config names, or of the environment."""
    named = context.run_config.get("settings")
    settings = ServerSettings.load(Path(str(named)) if named else None)
    if settings.job == "publish":
        deployment.publish(grid, settings)
    elif settings.job == "deliver":
        deployment.deliver(grid, settings)
    else:
        from fedgex.server.run import conduct  # torch, which the others do without

        conduct(grid, settings)

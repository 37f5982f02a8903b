"""Flower ServerApp: read the settings, conduct the study; no maths."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgex.server.run import conduct
from fedgex.server.settings import ServerSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the study that the environment names."""
    conduct(grid, ServerSettings.load())

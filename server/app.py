"""Flower ServerApp: read the settings and run the job that they name."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgex.server.consortium import participants as deployment
from fedgex.server.federation.participants import Simulated
from fedgex.server.journal import Journal
from fedgex.server.settings import ServerSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job of the run config's settings file, or of the environment."""
    named = context.run_config.get("settings")
    settings = ServerSettings.load(Path(str(named)) if named else None)
    jobs = {
        "conduct": _conduct,
        "publish": deployment.publish,
        "deliver": deployment.deliver,
    }
    jobs[settings.job](grid, settings)


def _conduct(grid: Grid, settings: ServerSettings) -> None:
    """Conduct a run between the hospitals of a contract, or a simulation."""
    # torch, which the other jobs do without
    from fedgex.server.federation.run import conduct

    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with Journal(settings.run_dir / "journal.jsonl").failures():
        participants = (
            Simulated(study=settings.read_study(), n_sites=settings.n_sites)
            if settings.state_dir is None
            else deployment.Deployment.load(settings)
        )
    conduct(grid, settings, participants)

"""Where the server finds its study and keeps its state; from the environment."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedgex.common.errors import ConfigError
from fedgex.common.study import Study


class ServerSettings(BaseSettings):
    """Settings of the server, each an environment variable FEDGEX_SERVER_*."""

    model_config = SettingsConfigDict(
        env_prefix="FEDGEX_SERVER_", frozen=True, use_attribute_docstrings=True
    )

    study: Path
    """The study, TOML or JSON."""
    run_dir: Path
    """Journal, checkpoints and spooled updates of this run."""
    holdout: Path | None = None
    """Folder of the public hold-out (common/cohort.py); none leaves judging out."""
    n_sites: int = Field(ge=1)
    """Sites to wait for before the start."""
    start_deadline_s: float = Field(default=600, gt=0)
    """Seconds to wait for them; after that the run starts with those that came, if
    they make the quorum."""
    poll_s: float = Field(default=1.0, gt=0)
    """Seconds between two looks for replies."""

    @classmethod
    def load(cls) -> ServerSettings:
        """Read the environment.

        Raises
        ------
        ConfigError
            With every variable that is missing or unusable.
        """
        try:
            return cls()  # type: ignore[call-arg]  # from the environment
        except ValidationError as error:
            lines = [
                f"FEDGEX_SERVER_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}"
                for e in error.errors()
            ]
            raise ConfigError("\n".join(lines)) from error

    def read_study(self) -> Study:
        """Read the study.

        Raises
        ------
        ConfigError
            If it cannot be read, or holds anything wrong.
        """
        try:
            text = self.study.read_text()
            values = (
                json.loads(text)
                if self.study.suffix == ".json"
                else tomllib.loads(text)
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.study} cannot be read: {error}") from error
        return Study.read(values, str(self.study))

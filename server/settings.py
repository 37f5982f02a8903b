"""Settings of the server: its study, its state and its job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedgex.common import parsing
from fedgex.common.errors import ConfigError
from fedgex.common.study import Study
from fedgex.common.system.files import read_json

PREFIX = "FEDGEX_SERVER_"


class ServerSettings(BaseSettings):
    """Settings of the server: environment variables FEDGEX_SERVER_*, or a JSON file.

    Between hospitals, `state_dir`, `contract` and `run` determine the other paths.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True
    )

    job: Literal["conduct", "publish", "deliver"] = "conduct"
    """Conduct a run, or take a contract or a released model to the sites."""
    study: Path
    """The study, TOML or JSON; between hospitals the contract's is taken."""
    run_dir: Path
    """Journal, checkpoints and spooled updates of this run."""
    holdout: Path | None = None
    """Folder of the public hold-out (common/data/cohort.py); none leaves judging
    out."""
    public: Path | None = None
    """Folder of the public cohort, on the study's scale (common/data/cohort.py)."""
    n_sites: int = Field(ge=1)
    """Sites to wait for before the start; between hospitals those of the contract."""
    start_deadline_s: float = Field(default=600, gt=0)
    """Seconds to wait for them; after that the run starts with those that came, if
    they make the quorum."""
    poll_s: float = Field(default=1.0, gt=0)
    """Polling interval, seconds."""
    state_dir: Path | None = None
    """The consortium's state directory, of a run between hospitals."""
    contract: str = ""
    """Hash of its contract."""
    run: str = ""
    """Its name, which names its folder."""
    bundle: Path | None = None
    """The released model to deliver; releases/RUN.fedgex of the state directory."""

    @model_validator(mode="before")
    @classmethod
    def _places_between_hospitals(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not values.get("state_dir"):
            return values
        state_dir, run = Path(values["state_dir"]), values.get("run", "")
        run_dir = state_dir / "runs" / run
        places = {
            "run_dir": run_dir,
            "study": run_dir / "study.json",
            "n_sites": 1,
            "bundle": state_dir / "releases" / f"{run}.fedgex",
        }
        return places | {k: v for k, v in values.items() if v is not None}

    @model_validator(mode="after")
    def _complete_between_hospitals(self) -> ServerSettings:
        if self.state_dir is None and self.job == "conduct":
            return self
        wanted: dict[str, object] = {
            "state_dir": self.state_dir,
            "contract": self.contract,
            "run": self.run or self.job == "publish",
        }
        if missing := [name for name, value in wanted.items() if not value]:
            raise ValueError(f'the job "{self.job}" needs {", ".join(missing)}')
        return self

    @classmethod
    def load(cls, path: Path | None = None) -> ServerSettings:
        """Read the settings from a JSON file, or without one from the environment.

        Raises
        ------
        ConfigError
            With every missing or unusable setting.
        """
        values = {} if path is None else read_json(path, "the server's settings")
        try:
            return cls(**values)
        except ValidationError as error:
            lines = [
                f"{_setting_name(path, '_'.join(map(str, e['loc'])))}: {e['msg']}"
                for e in error.errors()
            ]
            raise ConfigError("\n".join(lines)) from error

    def read_study(self) -> Study:
        """Read the study.

        Raises
        ------
        ConfigError
            If it cannot be read, or is invalid.
        """
        path, most = self.study, parsing.LONG_BYTES
        content = parsing.read_bytes(path, "a study", most=most)
        read = parsing.json_value if path.suffix == ".json" else parsing.toml_table
        return Study.read(read(content, f"{path}:", most=most), str(path))


def _setting_name(path: Path | None, name: str) -> str:
    """Return the environment variable, or the file and key, of a setting."""
    if path is None:
        return f"{PREFIX}{name.upper()}"
    return f"{path}: {name or 'settings'}"

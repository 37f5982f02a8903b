"""Which packages a wheel holds: those whose folder lies here.

Built here it holds everything. deploy/wheelhouse.sh builds a hospital's wheel from a
copy of `client` and `common`, the coordinator's from one of `server` and `common`, so
that each installs no more than it has to review.
"""

from pathlib import Path

from setuptools import setup

COMMANDS = {
    "client": "fedgex-site",
    "server": "fedgex-admin",
    "simulations": "fedgex-sim",
}

here = [side for side in ("common", *COMMANDS) if Path(side).is_dir()]
setup(
    packages=sorted(
        "fedgex." + ".".join(init.parent.parts)
        for side in here
        for init in Path(side).rglob("__init__.py")
    ),
    package_dir={f"fedgex.{side}": side for side in here},
    entry_points={
        "console_scripts": [
            f"{command} = fedgex.{side}.cli:app"
            for side, command in COMMANDS.items()
            if side in here
        ]
    },
)

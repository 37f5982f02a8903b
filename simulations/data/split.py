"""Split real data by institution into the folders that simulated hospitals hold.

    raw files ─read→ samples with patient and institution ─assign→ site of each
    institution ─write→ sites/<slug>/, holdout/ and public/, each with
    expression.parquet, clinical.csv, site.toml and policy.toml, as at a hospital

All patients of an institution go to one place, so that none is in two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import CLINICAL_COLUMNS, Cohort
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion import cohort as ingestion
from fedgex.common.study import Study
from fedgex.simulations.data.raw_data import RawData, find_files, read_raw
from fedgex.simulations.scenario import Scenario, Sites

REGION = "region"
"""Site of all patients whose institutions are small."""
HOLDOUT = "holdout"
"""Folder and name of the hold-out."""
PUBLIC = "public"
"""Folder and name of the server's public cohort."""
RECORD = "split.json"
"""Moved to its place last: a folder without it holds no finished split."""
PARTIAL = "split.partial"
"""Where a split is written before it moves to its place; gone when it is finished."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Description of a split, without a single patient."""

    sizes: Mapping[str, int]
    """Patients of each site, by the name of its folder, sorted."""
    holdout_size: int
    """Patients of the hold-out."""
    public_size: int
    """Patients of the public cohort; 0 if there is none."""
    notes: tuple[str, ...]
    """Lines for the log: who was pooled or left out, and why."""
    digest: str
    """SHA-256 of all files written."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites' folders, sorted."""
        return tuple(self.sizes)

    @property
    def apart(self) -> tuple[str, ...]:
        """Names of the folders of patients that no site has."""
        return (HOLDOUT, PUBLIC) if self.public_size else (HOLDOUT,)


def split(scenario: Scenario, data_dir: Path, out: Path) -> Split:
    """Write the data of each simulated hospital to `out/sites`.

    The hold-out goes to `out/holdout` and, if the scenario has one, the public cohort
    to `out/public`.

    The same scenario and data give the same bytes. A finished split of the same
    scenario and data is used again; one that was interrupted starts anew.

    Parameters
    ----------
    scenario
        Names the files, the site column, the hold-out and the public cohort.
    data_dir
        Folder to which the scenario's paths are relative.
    out
        Folder for the split; it may hold other things.

    Raises
    ------
    ConfigError
        If the data do not fit the scenario, with everything that does not; or if `out`
        holds the split of another scenario or other data, or files changed since.
    """
    expression_files, clinical_file = find_files(scenario.data, data_dir)
    inputs = _digest(
        data_dir,
        [*expression_files, clinical_file],
        scenario.model_dump_json(
            include={"study", "data", "sites", "holdout", "public"}
        ),
    )
    finished = _finished(out, inputs)
    if finished is not None:
        return finished

    raw = read_raw(scenario, expression_files, clinical_file)
    _refuse_unknown_names(scenario, raw.clinical)
    return _write(scenario, raw, *_assign(scenario, raw.clinical), out, inputs)


def read_cohort(folder: Path, study: Study) -> Cohort:
    """Read and check the patients in a folder of a split, the first sample of each."""
    settings = SiteSettings.load(folder / "site.toml")
    cohort, _ = ingestion.read_cohort(
        settings.data, settings.policy.minimum_cohort, study.scale, tuple(study.phases)
    )
    return cohort.take(cohort.first_samples())


def slugs(names: Iterable[str], reserved: Collection[str] = ()) -> dict[str, str]:
    """Return a distinct folder name for each of `names`.

    Parameters
    ----------
    names
        Distinct names of institutions; their order does not matter.
    reserved
        Folder names that none of them gets.

    Returns
    -------
    dict
        Lower-case letters, digits and single hyphens, at most about 60; names that
        would collide are numbered in sorted order.
    """
    given: dict[str, str] = {}
    used = set(reserved)
    for name in sorted(names):
        ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore")
        words = re.findall(r"[a-z0-9]+", ascii_name.decode().lower())
        stem = "-".join(words)[:56].strip("-") or "site"
        slug, number = stem, 2
        while slug in used:
            slug, number = f"{stem}-{number}", number + 1
        given[name] = slug
        used.add(slug)
    return given


def panel(seed: int, site: str, n_genes: int, share: float) -> NDArray[np.intp]:
    """Return the genes of a site's own random share, rising positions."""
    rng = np.random.default_rng([seed, *f"panel/{site}".encode()])
    kept = rng.choice(n_genes, max(1, round(share * n_genes)), replace=False)
    return np.sort(kept)


def _refuse_unknown_names(scenario: Scenario, clinical: pd.DataFrame) -> None:
    """Refuse institutions and types that no patient has; a typo would be silent."""
    study = scenario.study
    institutions = sorted(clinical["institution"].unique())
    types = (
        sorted(clinical["cancer_type"].dropna().astype(str).unique())
        if "cancer_type" in clinical
        else []
    )
    checks = [
        ("holdout.institutions", scenario.holdout.institutions, institutions),
        ("public.institutions", scenario.public_institutions, institutions),
        ("study.classification.classes", study.classification.classes, types),
        ("study.survival.cancer_types", study.survival.cancer_types, types),
    ]
    _refuse(
        f'{key}: no patient with expression has "{name}"{_near(name, known)}'
        for key, names, known in checks
        for name in names
        if name not in known
    )


def _assign(
    scenario: Scenario, clinical: pd.DataFrame
) -> tuple[dict[str, str], list[str]]:
    """Return the site of each institution that is not left out, and notes."""
    rule: Sites = scenario.sites
    sizes = clinical.groupby("institution")["patient"].nunique()
    held_out = list(scenario.holdout.institutions)
    public = list(scenario.public_institutions)
    rest = sizes.drop([*held_out, *public])
    small = sorted(rest.index[rest < rule.minimum_patients])
    large = rest.drop(small)
    notes = [f"hold-out: {sizes[held_out].sum()} patients of {_listed(held_out)}"]
    if public:
        notes.append(f"public: {sizes[public].sum()} patients of {_listed(public)}")

    site_of = slugs(large.index, reserved=(REGION, HOLDOUT, PUBLIC))
    below = f"each below {rule.minimum_patients} patients"
    if small and rule.small == "region":
        site_of |= dict.fromkeys(small, REGION)
        pooled = rest[small].sum()
        notes.append(f"{REGION}: {pooled} patients of {_listed(small)}, {below}")
    elif small:
        notes.append(f"left out: {_listed(small)}, {below}")

    site_sizes = rest[list(site_of)].groupby(pd.Series(site_of)).sum()
    if rule.max_sites is not None and len(site_sizes) > rule.max_sites:
        ranked = sorted(site_sizes.index, key=lambda site: (-site_sizes[site], site))
        dropped = sorted(ranked[rule.max_sites :])
        site_of = {i: site for i, site in site_of.items() if site not in dropped}
        site_sizes = site_sizes.drop(dropped)
        notes.append(
            f"left out: {', '.join(dropped)}, beyond the {rule.max_sites} sites with "
            "the most patients"
        )
    if site_sizes.empty:
        raise ConfigError(
            f"no site is left: {len(sizes)} institutions, of which {len(held_out)} are "
            f"held out, {len(public)} public, and {len(small)} have fewer than "
            f"{rule.minimum_patients} patients. Lower sites.minimum_patients, or hold "
            "out fewer."
        )
    _refuse(
        f'study.rounds.mandatory_sites: there is no site "{name}"'
        f"{_near(name, list(site_sizes.index))}"
        for name in scenario.study.rounds.mandatory_sites
        if name not in site_sizes.index
    )
    minimum = scenario.study.minimum_cohort
    too_small = sorted(site_sizes.index[site_sizes < minimum])
    if too_small:
        notes.append(
            f"will take no part: {', '.join(too_small)}, below the study's minimum "
            f"cohort of {minimum} patients"
        )
    site_of |= dict.fromkeys(held_out, HOLDOUT) | dict.fromkeys(public, PUBLIC)
    return site_of, notes


def _listed(names: Sequence[str]) -> str:
    noun = "institution" if len(names) == 1 else "institutions"
    return f"{len(names)} {noun} ({'; '.join(names)})"


def _near(name: str, known: Sequence[str]) -> str:
    """Return a question that offers up to three known names, if any are like `name`."""
    by_lower_case = {k.lower(): k for k in known}
    near = [k for k in by_lower_case if name.lower() in k][:3]
    near = near or get_close_matches(name.lower(), by_lower_case, n=3)
    if not near:
        return ""
    return "; did you mean " + " or ".join(f'"{by_lower_case[n]}"' for n in near) + "?"


def _refuse(problems: Iterable[str]) -> None:
    lines = list(problems)
    if lines:
        raise ConfigError("\n".join(lines))


def _finished(out: Path, inputs: str) -> Split | None:
    """Return the split that `out` holds already, if it is finished."""
    if not (out / RECORD).is_file():
        return None
    record = json.loads((out / RECORD).read_text())
    record.pop("sites", None)  # named twice in earlier splits
    if record.pop("inputs") != inputs:
        raise ConfigError(
            f"{out} holds the split of another scenario or of other data. Choose "
            "another folder, or delete this one."
        )
    done = Split(**record | {"notes": tuple(record["notes"])})
    if _digest(out, _written(out, done)) != done.digest:
        raise ConfigError(
            f"{out}: the split's files are not as they were written. Choose another "
            "folder, or delete this one."
        )
    logger.info("%s holds this split already", out)
    return done


def _write(
    scenario: Scenario,
    raw: RawData,
    site_of: Mapping[str, str],
    notes: Sequence[str],
    out: Path,
    inputs: str,
) -> Split:
    _clear_interrupted(out)
    partial = out / PARTIAL
    partial.mkdir(parents=True)
    site = raw.clinical["institution"].map(site_of)
    sizes = {}
    for name in sorted(map(str, site.dropna().unique())):
        samples = site.index[site == name]
        clinical = raw.clinical.loc[samples]
        expression = raw.expression.loc[samples].dropna(axis=1, how="all")
        share = scenario.sites.panel_share
        if name not in (HOLDOUT, PUBLIC) and share < 1:
            kept = panel(scenario.study.seed, name, expression.shape[1], share)
            expression = expression.iloc[:, kept]
        _write_site(_folder(partial, name), name, expression, clinical, scenario)
        sizes[name] = int(clinical["patient"].nunique())
    done = Split(
        holdout_size=sizes.pop(HOLDOUT),
        public_size=sizes.pop(PUBLIC, 0),
        sizes=sizes,
        notes=(*raw.notes, *notes),
        digest="",
    )
    digest = _digest(partial, _written(partial, done))
    done = dataclasses.replace(done, digest=digest)
    record = json.dumps({"inputs": inputs, **asdict(done)}, indent=1)
    (partial / RECORD).write_text(record + "\n")
    for name in (*done.apart, "sites", RECORD):
        (partial / name).rename(out / name)
    partial.rmdir()
    return done


def _clear_interrupted(out: Path) -> None:
    """Remove the files of an interrupted split, and no others."""
    written = (out / HOLDOUT, out / PUBLIC, out / "sites")
    ours = [folder for folder in written if folder.exists()]
    if (out / PARTIAL).exists():
        logger.warning("%s: an earlier split was interrupted; it starts anew", out)
        for folder in (*ours, out / PARTIAL):
            shutil.rmtree(folder)
    elif ours:
        raise ConfigError(
            f"{out} holds {' and '.join(f.name for f in ours)} that no split wrote. "
            "Choose another folder, or move them away."
        )


def _write_site(
    folder: Path,
    name: str,
    expression: pd.DataFrame,
    clinical: pd.DataFrame,
    scenario: Scenario,
) -> None:
    folder.mkdir(parents=True)
    expression.to_parquet(folder / "expression.parquet")
    columns = ["patient", *(c for c in CLINICAL_COLUMNS if c in clinical)]
    clinical = clinical[columns]
    if scenario.data.patient_from_sample is not None:
        clinical = clinical.reset_index()  # a column "sample"
    clinical.to_csv(folder / "clinical.csv", index=False)
    lines = [
        f'name = "{name}"',
        "",
        "[data]",
        'expression = "expression.parquet"',
        'clinical = "clinical.csv"',
        f'scale = "{scenario.data.scale}"',
        'orientation = "samples-by-genes"',
        'unknown_genes = "keep"',
        f'time_unit = "{scenario.data.time_unit}"',
    ]
    (folder / "site.toml").write_text("\n".join(lines) + "\n")
    policy = Policy.proposed(
        minimum_cohort=scenario.study.minimum_cohort,
        privacy_epsilon=1e6,  # no hospital's budget ends a simulation
        share_cross_products=scenario.sites.share_cross_products,
        threads=1,  # equal bits wherever the simulation runs
        message_limit_s=scenario.study.rounds.deadline_s,
    )
    permitted = policy.model_dump(mode="json").items()
    lines = [f"{key} = {json.dumps(value)}" for key, value in permitted]
    (folder / "policy.toml").write_text("\n".join(lines) + "\n")


def _folder(out: Path, name: str) -> Path:
    return out / name if name in (HOLDOUT, PUBLIC) else out / "sites" / name


def _written(out: Path, done: Split) -> list[Path]:
    return [
        _folder(out, name) / file
        for name in (*done.apart, *done.sites)
        for file in ("clinical.csv", "expression.parquet", "site.toml", "policy.toml")
    ]


def _digest(root: Path, files: Iterable[Path], text: str = "") -> str:
    """Return the SHA-256 of a text, and of files and their paths below `root`."""
    total = hashlib.sha256(text.encode())
    for path in files:
        content = path.read_bytes() if path.is_file() else b"absent"
        line = f"\n{path.relative_to(root).as_posix()} "
        total.update(line.encode() + hashlib.sha256(content).digest())
    return total.hexdigest()

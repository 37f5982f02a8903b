"""`fedgex-site predict`: a finished model on the hospital's own samples."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from cryptography import x509

from fedgex.client import prediction_files
from fedgex.client.prediction_files import FORMATS, Samples
from fedgex.client.settings import DataSettings, SiteSettings
from fedgex.common import bundle, pki
from fedgex.common import checkpoint as checkpoints
from fedgex.common.bundle import Released
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.codes import Code
from fedgex.common.errors import (
    ConfigError,
    DataError,
    FedgexError,
    Finding,
    TrustError,
)
from fedgex.common.scale import Scale
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL

NOTICE = "Research use only; not a medical device."

predict = typer.Typer(
    no_args_is_help=True,
    help="Use a finished model on own samples; nothing leaves the machine.",
)


class Orientation(StrEnum):
    """What the rows of the input are."""

    AUTO = "auto"
    SAMPLES_BY_GENES = "samples-by-genes"
    GENES_BY_SAMPLES = "genes-by-samples"


def _has_format(path: Path) -> Path:
    if prediction_files.ending(path) is None:
        raise typer.BadParameter(f"{path.name} must end in {', '.join(FORMATS)}")
    return path


Model = Annotated[
    Path,
    typer.Option(
        help="A released model (.fedgex), a run's folder (its last checkpoint), or a "
        "checkpoint's."
    ),
]
Authority = Annotated[
    Path | None,
    typer.Option(
        help="The consortium's authority.crt, against which a released model is "
        "verified; default: that of --site."
    ),
]
Input = Annotated[
    Path,
    typer.Option("--input", help="Expression: .csv, .tsv (or .gz), .parquet, .h5ad."),
]
Output = Annotated[
    Path,
    typer.Option(
        help="Table, one row a sample: .csv, .tsv (or .gz), .parquet. Its card is "
        "written beside it.",
        callback=_has_format,
    ),
]
InputScale = Annotated[
    Scale | None,
    typer.Option(help="Scale of the input; default: that of --site, or the study's."),
]
Axes = Annotated[
    Orientation,
    typer.Option(help="What the rows of the input are; auto looks at the labels."),
]
HgncTable = Annotated[
    Path | None,
    typer.Option(help="HGNC's complete set, for Ensembl ids and retired symbols."),
]
Clinical = Annotated[
    Path | None,
    typer.Option(help="Clinical table: library_size, which raw counts need."),
]
ClinicalOfRisk = Annotated[
    Path | None,
    typer.Option(
        help="Clinical table: sample or patient, cancer_type; age (years) and sex if "
        "the study uses them."
    ),
]
Site = Annotated[
    Path | None,
    typer.Option(
        metavar="SITE_TOML",
        help="The hospital's site.toml, for its own heads and its column names.",
    ),
]
Genes = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...|FILE",
        help="These genes only; default: all of the study.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


@predict.command()
def impute(
    model: Model,
    input_file: Input,
    output: Output,
    scale: InputScale = None,
    genes: Genes = None,
    orientation: Axes = Orientation.AUTO,
    hgnc_table: HgncTable = None,
    site: Site = None,
    authority: Authority = None,
    force: Force = False,
) -> None:
    """Fill missing cells and missing genes; measured values stay as they are."""
    from fedgex.client import inference  # torch takes seconds to load

    options = _Options(
        model=model,
        input=input_file,
        output=output,
        scale=scale,
        orientation=orientation,
        hgnc_table=hgnc_table,
        clinical=None,
        site=site,
        authority=authority,
        force=force,
    )
    with _restoring(options, genes) as (job, samples, frame, wanted):
        scale = job.data.scale
        table = inference.impute(job.checkpoint, frame, scale=scale, genes=wanted)
        job.write(samples, table, _restored(frame, table))


@predict.command()
def spread(
    model: Model,
    input_file: Input,
    output: Output,
    scale: InputScale = None,
    genes: Genes = None,
    orientation: Axes = Orientation.AUTO,
    hgnc_table: HgncTable = None,
    site: Site = None,
    authority: Authority = None,
    force: Force = False,
) -> None:
    """Write by how much each value that impute fills may be off, one SD."""
    from fedgex.client import inference  # torch takes seconds to load

    options = _Options(
        model=model,
        input=input_file,
        output=output,
        scale=scale,
        orientation=orientation,
        hgnc_table=hgnc_table,
        clinical=None,
        site=site,
        authority=authority,
        force=force,
    )
    with _restoring(options, genes) as (job, samples, frame, wanted):
        scale = job.data.scale
        table = inference.spread(job.checkpoint, frame, scale=scale, genes=wanted)
        job.write(samples, table)


@predict.command()
def embed(
    model: Model,
    input_file: Input,
    output: Output,
    scale: InputScale = None,
    orientation: Axes = Orientation.AUTO,
    hgnc_table: HgncTable = None,
    clinical: Clinical = None,
    site: Site = None,
    authority: Authority = None,
    force: Force = False,
) -> None:
    """Write one vector a sample, from the pretrained encoder."""
    from fedgex.client import inference  # torch takes seconds to load

    options = _Options(
        model=model,
        input=input_file,
        output=output,
        scale=scale,
        orientation=orientation,
        hgnc_table=hgnc_table,
        clinical=clinical,
        site=site,
        authority=authority,
        force=force,
    )
    with _refusing(), _open(options, PRETRAINING) as job:
        samples = job.read(clinical_columns=())
        job.accept(inference.review(job.checkpoint, samples.expression))
        job.write(samples, inference.embed(job.checkpoint, samples.expression))


@predict.command()
def risk(
    model: Model,
    input_file: Input,
    output: Output,
    scale: InputScale = None,
    cancer_type: Annotated[
        str | None,
        typer.Option(help="Cancer type of all samples, in place of a column."),
    ] = None,
    orientation: Axes = Orientation.AUTO,
    hgnc_table: HgncTable = None,
    clinical: ClinicalOfRisk = None,
    site: Site = None,
    authority: Authority = None,
    force: Force = False,
) -> None:
    """Write the log-hazard and, if the study models it, survival probabilities."""
    from fedgex.client import inference  # torch takes seconds to load

    options = _Options(
        model=model,
        input=input_file,
        output=output,
        scale=scale,
        orientation=orientation,
        hgnc_table=hgnc_table,
        clinical=clinical,
        site=site,
        authority=authority,
        force=force,
    )
    with _refusing(), _open(options, SURVIVAL) as job:
        samples = job.read(clinical_columns=("cancer_type", "age", "sex"))
        covariates = samples.clinical
        if cancer_type is not None:
            covariates = covariates.assign(cancer_type=cancer_type)
        fit = inference.review(job.checkpoint, samples.expression)
        job.accept(fit + inference.review_clinical(job.checkpoint.study, covariates))
        table = inference.risk(
            job.checkpoint, samples.expression, covariates, state_dir=job.state_dir
        )
        job.write(samples, table)


@predict.command()
def classify(
    model: Model,
    input_file: Input,
    output: Output,
    scale: InputScale = None,
    among: Annotated[
        str | None,
        typer.Option(
            help="Cancer types that are possible, A,B: say, those that you treat."
        ),
    ] = None,
    orientation: Axes = Orientation.AUTO,
    hgnc_table: HgncTable = None,
    clinical: Clinical = None,
    site: Site = None,
    authority: Authority = None,
    force: Force = False,
) -> None:
    """Write the probability of each cancer type, and the most probable one."""
    from fedgex.client import inference  # torch takes seconds to load

    options = _Options(
        model=model,
        input=input_file,
        output=output,
        scale=scale,
        orientation=orientation,
        hgnc_table=hgnc_table,
        clinical=clinical,
        site=site,
        authority=authority,
        force=force,
    )
    types = None if among is None else [name.strip() for name in among.split(",")]
    with _refusing(), _open(options, CLASSIFICATION) as job:
        with job.problems.collecting():
            inference.possible_types(job.checkpoint, types)
        samples = job.read(clinical_columns=())
        job.accept(inference.review(job.checkpoint, samples.expression))
        table = inference.classify(
            job.checkpoint, samples.expression, among=types, state_dir=job.state_dir
        )
        job.write(samples, table)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What the commands have in common."""

    model: Path
    input: Path
    output: Path
    scale: Scale | None
    orientation: Orientation
    hgnc_table: Path | None
    clinical: Path | None
    site: Path | None
    authority: Path | None
    force: bool

    @property
    def card(self) -> Path:
        return self.output.with_name(f"{self.output.name}.card.json")


@dataclass
class _Job:
    """One prediction from its options to its files."""

    options: _Options
    phase: str  # which teaches what is predicted
    folder: Path  # of the checkpoint
    checkpoint: Checkpoint
    released: Released | None  # None for a model that is not a bundle
    site: SiteSettings | None
    problems: _Problems
    findings: list[Finding] = field(default_factory=list)

    @property
    def data(self) -> DataSettings:
        """What is known of the input: the options', then the site's, then ours."""
        options, site = self.options, self.site
        scale, hgnc_table = options.scale, options.hgnc_table
        if site is not None:
            scale = scale or site.data.scale
            hgnc_table = hgnc_table or site.data.hgnc_table
        scale = scale or self.checkpoint.study.scale
        needed = self.phase == SURVIVAL or scale == Scale.COUNTS
        data = DataSettings(
            expression=options.input,
            clinical=options.clinical if needed else None,
            scale=scale,
            orientation=options.orientation.value,
            hgnc_table=hgnc_table,
        )
        if site is not None:
            data = data.model_copy(update={"columns": site.data.columns})
        return data

    @property
    def state_dir(self) -> Path | None:
        """Where the hospital keeps its heads of this study."""
        if self.site is None:
            return None
        return self.site.state_dir / self.checkpoint.study.hash[:16]

    def read(self, clinical_columns: Collection[str]) -> Samples:
        """Read the samples; refuse everything found so far at once."""
        study, vocabulary = self.checkpoint.study, self.checkpoint.vocabulary
        if self.data.scale == Scale.COUNTS:
            clinical_columns = {*clinical_columns, "library_size"}
        with self.problems.collecting():
            samples = prediction_files.read(
                self.data, study.scale, vocabulary, clinical_columns
            )
        self.problems.tell()
        self.findings += samples.findings
        return samples

    def accept(self, findings: Sequence[Finding]) -> None:
        """Keep findings for the card, or refuse them."""
        if any(finding.severity == "error" for finding in findings):
            raise DataError(findings)
        self.findings += findings

    def write(
        self,
        samples: Samples,
        table: pd.DataFrame,
        restored: Mapping[str, int] | None = None,
    ) -> None:
        """Write the table, one row for each sample of the file, and its card."""
        options = self.options
        card = self._card(samples, restored or {})
        prediction_files.write(
            table.reindex(list(samples.labels)), card, options.output, options.card
        )
        for finding in self.findings:
            typer.echo(str(_in_options(finding)), err=True)
        typer.echo(f"wrote {options.output} and {options.card.name}", err=True)
        typer.echo(NOTICE, err=True)

    def _card(self, samples: Samples, restored: Mapping[str, int]) -> dict[str, Any]:
        """Return the model's card, and how this prediction came about."""
        data, vocabulary = self.data, self.checkpoint.vocabulary
        files = {
            "expression": data.expression,
            "clinical": data.clinical,
            "hgnc_table": data.hgnc_table,
        }
        measured = samples.expression.notna().any()
        return self.checkpoint.card | {
            "prediction": {
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "fedgex": version("fedgex"),
                "checkpoint": self.folder.name,
                "release": self._release(),
                "model_sha256": checkpoints.digest(self.folder / "model.safetensors"),
                "head_of_site": self._owner_of_head(),
                "inputs": {
                    name: {"file": path.name, "sha256": checkpoints.digest(path)}
                    for name, path in files.items()
                    if path is not None
                },
                "samples": len(samples.labels),
                "genes_in_vocabulary": len(vocabulary),
                "genes_measured": int(
                    measured.reindex(vocabulary.genes).eq(True).sum()
                ),
                **restored,
                "scale_of_input": data.scale.value,
                "scale_converted": data.scale != self.checkpoint.study.scale,
                "warnings": [
                    str(_in_options(f))
                    for f in self.findings
                    if f.severity == "warning"
                ],
            }
        }

    def _release(self) -> dict[str, Any] | None:
        """Return what the bundle says of itself, once verified."""
        if self.released is None:
            return None
        release = self.released.release
        return {
            "file": self.options.model.name,
            "run": release.run,
            "contract": release.contract,
            "model": release.model,
            "released": release.released.isoformat(),
            "administrators": list(self.released.administrators),
        }

    def _owner_of_head(self) -> str | None:
        """Return the site whose own head was used, or None if heads are shared."""
        from fedgex.client import inference  # torch takes seconds to load

        if self.site and inference.head_is_local(self.checkpoint.study, self.phase):
            return self.site.name
        return None


@contextmanager
def _open(options: _Options, phase: str) -> Iterator[_Job]:
    """Load the model and the site's settings; keep what else stands in the way."""
    from fedgex.client import inference  # torch takes seconds to load

    problems = _Problems()
    site: SiteSettings | None = None
    job: _Job | None = None
    with ExitStack() as stack:
        with problems.collecting():
            if options.site is not None:
                site = SiteSettings.load(options.site)
        with problems.collecting():
            _refuse_overwriting(options)
        with problems.collecting():
            released = None
            if options.model.is_file():
                authority = trusted_authority(options.model, options.authority, site)
                released, folder = stack.enter_context(
                    bundle.opened(options.model, authority)
                )
            else:
                folder = checkpoints.find(options.model)
            model = checkpoints.load(folder)
            with problems.collecting():
                inference.require(model, phase, has_state_dir=options.site is not None)
            job = _Job(options, phase, folder, model, released, site, problems)
        if job is None:
            problems.tell()
            raise AssertionError("without a model there is a problem to tell")
        yield job


@contextmanager
def _restoring(
    options: _Options, genes: str | None
) -> Iterator[tuple[_Job, Samples, pd.DataFrame, list[str] | None]]:
    """Read what is to be restored: samples, their table, and the genes asked for."""
    from fedgex.client import inference  # torch takes seconds to load

    with _refusing(), _open(options, PRETRAINING) as job:
        wanted: list[str] | None = None
        with job.problems.collecting():
            wanted = None if genes is None else _read_genes(genes)
            inference.wanted_genes(job.checkpoint, wanted)
        samples = job.read(clinical_columns=())
        job.accept(inference.review(job.checkpoint, samples.expression))
        yield job, samples, samples.as_in_file(job.checkpoint.vocabulary), wanted


def trusted_authority(
    model: Path, path: Path | None, site: SiteSettings | None
) -> x509.Certificate:
    """Return the certificate of the authority whose releases are trusted.

    Parameters
    ----------
    model
        Released model that is to be verified, for the message.
    path
        The certificate's; None: that of the site.

    Raises
    ------
    TrustError
        If none was named, or it cannot be read.
    """
    if path is None and site is not None:
        path = site.state_dir / "identity" / "authority.crt"
    if path is None:
        raise TrustError(
            f"{model} is a released model, and nothing says whose releases are "
            "trusted here; name the hospital's site.toml with --site, or the "
            "consortium's authority.crt with --authority."
        )
    try:
        return pki.from_pem(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError, TrustError) as error:
        raise TrustError(
            f"{path}: holds no readable certificate; expected the consortium's "
            "authority.crt, which fedgex-site join writes. Join first, or name it "
            "with --authority."
        ) from error


def _refuse_overwriting(options: _Options) -> None:
    there = [path for path in (options.output, options.card) if path.exists()]
    if options.input.resolve() in (path.resolve() for path in there):
        raise ConfigError(f"{options.output} is the input too; choose another output.")
    if there and not options.force:
        raise ConfigError(
            f"{' and '.join(path.name for path in there)} exist already in "
            f"{options.output.parent}; choose another output, or replace with --force."
        )


def _read_genes(names: str) -> list[str]:
    """Return the genes of a file, or of a list with commas."""
    text = names
    if os.path.isfile(names):  # unlike Path.is_file, takes a list of any length
        try:
            text = Path(names).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{names}: cannot be read; expected gene symbols, one a line."
            ) from error
    return text.replace(",", " ").split()


def _restored(frame: pd.DataFrame, table: pd.DataFrame) -> dict[str, int]:
    """Count what `table` has more than `frame`, whose columns come first in it."""
    known = table.notna().to_numpy()
    known[:, : frame.shape[1]] &= frame.isna().to_numpy()
    return {
        "genes_restored": int(known.any(axis=0).sum()),
        "genes_added": table.shape[1] - frame.shape[1],
        "cells_restored": int(known.sum()),
    }


class _Problems:
    """Errors kept until all can be told at once."""

    def __init__(self) -> None:
        self.errors: list[FedgexError] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an error and go on."""
        try:
            yield
        except FedgexError as error:
            self.errors.append(error)

    def tell(self) -> None:
        """Print all errors, if any, and leave with exit code 1."""
        if not self.errors:
            return
        for error in self.errors:
            said: Sequence[object] = [error]
            if isinstance(error, DataError):
                said = [_in_options(finding) for finding in error.findings]
            typer.echo("Error: " + "\n".join(map(str, said)), err=True)
        raise typer.Exit(1)


@contextmanager
def _refusing() -> Iterator[None]:
    """Tell what made a prediction impossible."""
    problems = _Problems()
    with problems.collecting():
        yield
    problems.tell()


_ACTIONS: dict[str, str] = {
    Code.FILE_MISSING: "Correct the path.",
    Code.COLUMN_MISSING: "Name the column so, or give the site.toml that names "
    "it with --site.",
}
"""What to do here about findings that otherwise lead into a site.toml."""

_OPTIONS = {
    "data.scale": "--scale",
    "data.orientation": "--orientation",
    "data.hgnc_table": "--hgnc-table",
    "data.columns.sample": "column sample",
    "Add all reads of each sample to the clinical table as library_size, or export": (
        "For embed, risk and classify, give all reads of each sample as library_size "
        "in the table of --clinical; else export"
    ),
}
"""Words of findings that mean a site.toml, and what they are called here."""


def _in_options(finding: Finding) -> Finding:
    """Return a finding whose advice is about the options of this command."""
    action = _ACTIONS.get(finding.code, finding.action)
    for word, option in _OPTIONS.items():
        action = action.replace(word, option)
    return replace(finding, action=action)

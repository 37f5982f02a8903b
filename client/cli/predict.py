"""`fedgex-site predict`: a finished model on the hospital's own samples."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgex.client.cli.options import Authority, Model, load, refusing
from fedgex.common.data.scales import Scale, scale_of
from fedgex.common.errors import ConfigError, DataError, FedgexError, Finding

if TYPE_CHECKING:
    import pandas as pd

    from fedgex.client.prediction.files import Samples
    from fedgex.client.settings import SiteSettings
    from fedgex.common.ingestion.settings import DataSettings
    from fedgex.common.models.checkpoint import Checkpoint
    from fedgex.common.trust.bundle import Released

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
    from fedgex.client.prediction import files

    if files.ending(path) is None:
        raise typer.BadParameter(f"{path.name} must end in {', '.join(files.FORMATS)}")
    return path


def _scale(text: str) -> Scale:
    try:
        return scale_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options that all commands share."""

    model: Model
    input: Annotated[
        Path,
        typer.Option(
            "--input", help="Expression: .csv, .tsv (or .gz), .parquet, .h5ad."
        ),
    ]
    output: Annotated[
        Path,
        typer.Option(
            help="Table, one row a sample: .csv, .tsv (or .gz), .parquet. Its card is "
            "written to the same folder.",
            callback=_has_format,
        ),
    ]
    scale: Annotated[
        Scale | None,
        typer.Option(
            parser=_scale,
            metavar="NAME|FORMULA",
            help="Scale of the input, such as log2p1, linear or log2(x+0.001); "
            "default: that of --site, or the study's.",
        ),
    ] = None
    orientation: Annotated[
        Orientation,
        typer.Option(help="What the rows of the input are; auto looks at the labels."),
    ] = Orientation.AUTO
    hgnc_table: Annotated[
        Path | None,
        typer.Option(help="HGNC's complete set, for Ensembl ids and retired symbols."),
    ] = None
    clinical: Annotated[
        Path | None,
        typer.Option(
            help="Clinical table: sample or patient; library_size, which raw counts "
            "need; for risk, cancer_type, and age (years) and sex if the study uses "
            "them."
        ),
    ] = None
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="SITE_TOML",
            help="The hospital's site.toml, for its column names.",
        ),
    ] = None
    authority: Authority = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output.")
    ] = False

    @property
    def card(self) -> Path:
        return self.output.with_name(f"{self.output.name}.card.json")


def _command(run: Callable[..., None]) -> Callable[..., None]:
    """Register a command: its first parameter stands for the options of all."""
    predict.command(run.__name__, help=run.__doc__)(_with_options(run))
    return run


def _with_options(run: Callable[..., None]) -> Callable[..., None]:
    """Return the command that spells out the options of all for `run`."""
    shared = [*inspect.signature(_Options, eval_str=True).parameters.values()]
    own = [*inspect.signature(run, eval_str=True).parameters.values()][1:]

    def command(**values: Any) -> None:
        options = _Options(**{each.name: values.pop(each.name) for each in shared})
        with refusing():
            run(options, **values)

    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in (*shared[:4], *own, *shared[4:])
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


Genes = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...|FILE",
        help="These genes only; default: all of the study.",
    ),
]


@_command
def impute(options: _Options, genes: Genes = None) -> None:
    """Fill missing cells and missing genes; measured values stay as they are."""
    from fedgex.client.prediction import inference

    with _restoring(options, genes) as (job, wanted):
        frame = job.samples.as_in_file(job.checkpoint.vocabulary)
        restored = inference.restore(job.checkpoint, job.samples.expression)
        on_scale = job.samples.on_file_scale(restored[wanted])
        table = inference.fill(frame, on_scale)
        known = table.notna().to_numpy()
        known[:, : frame.shape[1]] &= frame.isna().to_numpy()
        job.write(
            job.samples.with_integers(table, frame),
            genes_restored=int(known.any(axis=0).sum()),
            genes_added=table.shape[1] - frame.shape[1],
            cells_restored=int(known.sum()),
        )


@_command
def uncertainty(options: _Options, genes: Genes = None) -> None:
    """Write the predictive standard deviation of every imputed value."""
    from fedgex.client.prediction import inference

    with _restoring(options, genes) as (job, wanted):
        expression = job.samples.expression
        job.write(inference.uncertainty(job.checkpoint, expression, genes=wanted))


def _spread(options: _Options, genes: Genes = None) -> None:
    """Write what `uncertainty` writes, under the name of before."""
    typer.echo("Warning: spread is called uncertainty now.", err=True)
    uncertainty(options, genes)


predict.command("spread", hidden=True)(_with_options(_spread))


@contextmanager
def _restoring(
    options: _Options, genes: str | None
) -> Iterator[tuple[_Job, list[str]]]:
    """Prepare what restores genes, and return those that are asked for."""
    from fedgex.client.prediction import review

    wanted: list[str] = []

    def choose(model: Checkpoint) -> None:
        chosen = review.wanted_genes(model, _read_genes(genes))
        wanted.extend(compress(model.vocabulary.genes, chosen))

    with _prepared(options, "pretraining", choose) as job:
        yield job, wanted


@_command
def embed(options: _Options) -> None:
    """Write one vector a sample, from the pretrained encoder."""
    from fedgex.client.prediction import inference

    with _prepared(options, "pretraining") as job:
        job.write(inference.embed(job.checkpoint, job.samples.expression))


@_command
def risk(
    options: _Options,
    cancer_type: Annotated[
        str | None,
        typer.Option(help="Cancer type of all samples, in place of a column."),
    ] = None,
) -> None:
    """Write the log-hazard and, if the study models it, survival probabilities."""
    from fedgex.client.prediction import inference

    with _prepared(options, "survival", cancer_type=cancer_type) as job:
        expression = job.samples.expression
        job.write(inference.risk(job.checkpoint, expression, job.clinical))


@_command
def classify(
    options: _Options,
    among: Annotated[
        str | None,
        typer.Option(
            help="Cancer types that are possible, A,B: say, those that you treat."
        ),
    ] = None,
) -> None:
    """Write the probability of each cancer type, and the most probable one."""
    from fedgex.client.prediction import inference, review

    types = None if among is None else [name.strip() for name in among.split(",")]

    def possible(model: Checkpoint) -> object:
        return review.possible_types(model, types)

    with _prepared(options, "classification", possible) as job:
        expression = job.samples.expression
        job.write(inference.classify(job.checkpoint, expression, among=types))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One prediction: a model, and samples that passed every check."""

    options: _Options
    folder: Path
    """Of the checkpoint."""
    checkpoint: Checkpoint
    released: Released | None
    """None for a model that is not a bundle."""
    data: DataSettings
    samples: Samples
    clinical: pd.DataFrame
    """One row for each checked sample."""
    findings: Sequence[Finding]

    def write(self, table: pd.DataFrame, **restored: int) -> None:
        """Write the table, one row for each sample of the file, and its card."""
        from fedgex.client.prediction import files

        options = self.options
        table = table.reindex(list(self.samples.labels))
        files.write(table, self._card(restored), options.output, options.card)
        for finding in self.findings:
            typer.echo(str(finding), err=True)
        typer.echo(f"wrote {options.output} and {options.card.name}", err=True)
        typer.echo(NOTICE, err=True)

    def _card(self, restored: dict[str, int]) -> dict[str, Any]:
        """Return the model's card, and how this prediction came about."""
        from fedgex.common.models import checkpoint as checkpoints

        data, vocabulary = self.data, self.checkpoint.vocabulary
        inputs = {
            "expression": data.expression,
            "clinical": data.clinical,
            "hgnc_table": data.hgnc_table,
        }
        measured = self.samples.expression.notna().any().reindex(vocabulary.genes)
        return self.checkpoint.card | {
            "prediction": {
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "fedgex": version("fedgex"),
                "checkpoint": self.folder.name,
                "release": self._release(),
                "model_sha256": checkpoints.digest(self.folder / "model.safetensors"),
                "inputs": {
                    name: {"file": path.name, "sha256": checkpoints.digest(path)}
                    for name, path in inputs.items()
                    if path is not None
                },
                "samples": len(self.samples.labels),
                "genes_in_vocabulary": len(vocabulary),
                "genes_measured": int(measured.eq(True).sum()),
                **restored,
                "scale_of_input": data.scale.value,
                "scale_converted": data.scale != self.checkpoint.study.scale,
                "warnings": [str(f) for f in self.findings if f.severity == "warning"],
            }
        }

    def _release(self) -> dict[str, Any] | None:
        """Return what the verified bundle states of its release."""
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


@contextmanager
def _prepared(
    options: _Options,
    phase: str,
    check: Callable[[Checkpoint], object] = lambda model: None,
    cancer_type: str | None = None,
) -> Iterator[_Job]:
    """Load model and samples; report all errors at once.

    Parameters
    ----------
    check
        Refuses, by a `FedgexError`, options that do not suit the model.
    cancer_type
        Of all samples; None: that in the clinical table.
    """
    from fedgex.client.prediction import files, inference, review
    from fedgex.common.models import checkpoint as checkpoints
    from fedgex.common.study import SURVIVAL

    errors: list[FedgexError] = []
    site: SiteSettings | None = None
    samples: Samples | None = None
    with ExitStack() as stack:
        with _collecting(errors):
            site = None if options.site is None else load(options.site)
        with _collecting(errors):
            _refuse_overwriting(options)
        with _collecting(errors):
            folder, released = stack.enter_context(
                files.opened_model(options.model, options.authority, site)
            )
            model = checkpoints.load(folder)
            data = _data(options, site, model.study.scale, phase)
            with _collecting(errors):
                review.require(model, phase)
            with _collecting(errors):
                check(model)
            with _collecting(errors):
                columns = ("cancer_type", "age", "sex") if phase == SURVIVAL else ()
                samples = files.read_samples(data, model, columns)
        if errors or samples is None:
            for error in errors:
                typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1)
        clinical = samples.clinical
        if cancer_type is not None:
            clinical = clinical.assign(cancer_type=cancer_type)
        found = review.review(model, samples.expression)
        if not any(finding.severity == "error" for finding in found):
            found += inference.review_likeness(model, samples.expression)
        if phase == SURVIVAL:
            found += review.review_clinical(model.study, clinical)
        if any(finding.severity == "error" for finding in found):
            raise DataError(found)
        yield _Job(
            options=options,
            folder=folder,
            checkpoint=model,
            released=released,
            data=data,
            samples=samples,
            clinical=clinical,
            findings=[*samples.findings, *found],
        )


@contextmanager
def _collecting(errors: list[FedgexError]) -> Iterator[None]:
    """Collect an error and continue."""
    try:
        yield
    except FedgexError as error:
        errors.append(error)


def _data(
    options: _Options, site: SiteSettings | None, study_scale: Scale, phase: str
) -> DataSettings:
    """Return the data settings: from the options, else the site, else defaults."""
    from fedgex.common.ingestion.settings import DataColumns, DataSettings
    from fedgex.common.study import SURVIVAL

    ours = None if site is None else site.data
    scale = options.scale or (study_scale if ours is None else ours.scale)
    table = options.hgnc_table or (None if ours is None else ours.hgnc_table)
    needed = phase == SURVIVAL or scale == Scale.COUNTS
    return DataSettings(
        expression=options.input,
        clinical=options.clinical if needed else None,
        scale=scale,
        orientation=options.orientation.value,
        unknown_genes="keep",  # a model may be of others, and nothing leaves
        hgnc_table=table,
        columns=DataColumns() if ours is None else ours.columns,
    )


def _refuse_overwriting(options: _Options) -> None:
    there = [path for path in (options.output, options.card) if path.exists()]
    if options.input.resolve() in (path.resolve() for path in there):
        raise ConfigError(f"{options.output} is the input too; choose another output.")
    if there and not options.force:
        raise ConfigError(
            f"{' and '.join(path.name for path in there)} exist already in "
            f"{options.output.parent}; choose another output, or replace with --force."
        )


def _read_genes(names: str | None) -> list[str] | None:
    """Return the genes of a file, or of a list with commas."""
    if names is None:
        return None
    text = names
    if os.path.isfile(names):  # unlike Path.is_file, takes a list of any length
        try:
            text = Path(names).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{names}: cannot be read; expected gene symbols, one a line."
            ) from error
    return text.replace(",", " ").split()

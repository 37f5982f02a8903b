"""`fedgex-admin model`: see what runs have trained, and release it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509

from fedgex.common.errors import FedgexError, TrustError
from fedgex.common.models import checkpoint
from fedgex.common.trust import bundle as bundles
from fedgex.common.trust import pinning, pki
from fedgex.server.cli.command_line import (
    Format,
    KeyFile,
    OptionalState,
    State,
    note,
    refusals,
    show,
    show_rows,
)
from fedgex.server.consortium import commands, contracts, releases, runs
from fedgex.server.consortium.store import Consortium, NotFoundError

model = typer.Typer(no_args_is_help=True, help="Look at models and release them.")


@model.command("show")
def model_show(
    model: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's.")],
    form: Format = "text",
) -> None:
    """Verify a checkpoint against its hashes and print its card and metrics."""
    with refusals():
        folder = checkpoint.find(model)
        found = checkpoint.load(folder)
    numbers = {
        k: found.metrics.get(k) for k in ("train_loss", "judged_loss", "holdout")
    }
    show({"folder": str(folder), "verified": True, **found.card, **numbers}, form)


@model.command("list")
def model_list(state: State, form: Format = "text") -> None:
    """List the last model of each run, and whether it is released."""
    with refusals():
        found = Consortium(state)
        rows = []
        for run in runs.every(found.folder):
            last = checkpoint.latest(run.folder / "checkpoints")
            if last is None:
                continue
            how_far = releases.status(found, run.name)
            ended = run.state == "finished"
            digest = releases.manifest_digest(last)
            rows.append(
                {
                    "run": run.name,
                    "state": how_far.state if ended else "in training",
                    "model": last.name,
                    "manifest": digest if form == "json" else digest[:12],
                    "approved_by": ", ".join(how_far.approvals),
                    "approvals": f"{len(how_far.approvals)} of {how_far.needed}",
                }
            )
    show_rows(rows, form, "no model yet; a run writes one after each round")


@model.command("release")
def model_release(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    key: KeyFile,
    state: State,
    audit: Annotated[
        Path | None,
        typer.Option(help="Audit report (audit.json), if the contract demands one."),
    ] = None,
    form: Format = "text",
) -> None:
    """Order the release of a finished run's model; the contract says how many must."""
    with refusals():
        found = Consortium(state)
        facts = release(found, run, pki.load_key(key), audit)
    show(facts, form)
    if facts["missing"]:
        note(
            f"{facts['missing']} more must order it: the same command, with another "
            "administrator's key."
        )
    if not found.is_served():
        note("The server is not running; it carries the order out once it is started.")


@model.command("export")
def model_export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    out: Annotated[Path, typer.Option(help="File for the bundle, such as RUN.fedgex.")],
    state: State,
    form: Format = "text",
) -> None:
    """Copy a released model, with contract, receipts and orders, to one file."""
    with refusals():
        released = releases.export(Consortium(state), run, out)
    show({"bundle": str(out), **_facts(released)}, form)


@model.command("verify")
def model_verify(
    bundle: Annotated[Path, typer.Argument(help="What model export wrote.")],
    authority: Annotated[
        Path | None,
        typer.Option(help="The authority's certificate; without it, the state's."),
    ] = None,
    state: OptionalState = None,
    form: Format = "text",
) -> None:
    """Verify a bundle: every hash, signature and receipt, up to the authority."""
    with refusals():
        released = bundles.verify(bundle, _authority(authority, state))
    show({"bundle": str(bundle), "verified": True, **_facts(released)}, form)


def release(
    consortium: Consortium, run: str, key: pki.Key, audit: Path | None = None
) -> dict[str, Any]:
    """Order the release of a run's last model, and return its state.

    Parameters
    ----------
    audit
        Report of an audit, which the contract may demand.

    Raises
    ------
    NotFoundError
        If there is no such run.
    ConfigError
        If the contract demands an audit report, and this one does not permit it.
    FedgexError
        If it is not finished, its model was changed, or the key is no administrator's.
    """
    found = runs.load(consortium.folder, run)
    if found.state != "finished":
        raise FedgexError(
            f'the run "{run}" is {found.state}; expected a finished one. A model is '
            "released once its run is at its end."
        )
    folder = checkpoint.find(found.folder)
    checkpoint.load(folder)
    digest = releases.manifest_digest(folder)
    name, certificate = consortium.administrator(key)
    contract = contracts.load(consortium, found.facts["contract"]).contract
    if contract.administrator_keys:
        pinning.require(certificate, contract.administrator_keys, "the contract")
    if name not in commands.approvals(consortium, run, digest):
        report = "" if audit is None else releases.keep_audit(consortium, audit)
        releases.require_audit(consortium, contract, digest, report)
        commands.submit(consortium, "release", run, key, model=digest, audit=report)
    how_far = releases.status(consortium, run)
    return {
        "run": run,
        "model": folder.name,
        "manifest": digest,
        "approved_by": list(how_far.approvals),
        "missing": max(how_far.needed - len(how_far.approvals), 0),
    }


def _authority(path: Path | None, state: Path | None) -> x509.Certificate:
    """Return the certificate that a bundle must lead up to; never the bundle's own."""
    if path is not None:
        if not path.is_file():
            raise NotFoundError(f"{path}: there is no such file; expected a PEM.")
        return pki.from_pem(path.read_text(errors="replace"))
    if state is not None:
        return Consortium(state).authority
    raise TrustError(
        "there is nothing to verify the bundle with; name the certificate of the "
        "consortium's authority with --authority, or give --state."
    )


def _facts(released: bundles.Released) -> dict[str, Any]:
    release = released.release
    return {
        "run": release.run,
        "contract": release.contract,
        "model": release.model,
        "released": release.released,
        "released_by": list(released.administrators),
        "rounds": release.lineage.rounds,
        "sites": release.lineage.sites,
    }

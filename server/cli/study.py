"""`fedgex-admin study`: draft, sign and publish contracts; see what sites answered."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from fedgex.common.errors import TrustError
from fedgex.common.privacy.summary import protections
from fedgex.common.trust import pki
from fedgex.common.trust.contract import Contract, remaining
from fedgex.common.trust.signed import Signed
from fedgex.server.cli.command_line import (
    Format,
    KeyFile,
    OptionalState,
    State,
    note,
    refusals,
    show,
    show_rows,
    write_out,
)
from fedgex.server.consortium import contracts, drafts
from fedgex.server.consortium.contracts import Answer
from fedgex.server.consortium.store import Consortium
from fedgex.server.run_monitor import one_line

study = typer.Typer(no_args_is_help=True, help="Contracts: draft, sign, publish, read.")

ContractToml = Annotated[
    Path, typer.Argument(metavar="CONTRACT_TOML", help="The contract's file.")
]
Which = Annotated[
    str,
    typer.Argument(
        metavar="CONTRACT", help="Hash, six or more characters of it, or study's name."
    ),
]


@study.command("new")
def study_new(
    study_toml: Annotated[
        Path, typer.Option("--study", help="TOML with a [study]; a scenario will do.")
    ],
    genes: Annotated[Path, typer.Option(help="Gene symbols, one a line.")],
    purpose: Annotated[str, typer.Option(help="For what, as the approver reads it.")],
    expires: Annotated[
        datetime, typer.Option(formats=["%Y-%m-%d"], help="Last day, UTC.")
    ],
    sites: Annotated[str, typer.Option(help="Hospitals, with commas between them.")],
    out: Annotated[Path, typer.Option(help="File for the contract.")],
    state: State,
    administrators: Annotated[
        int, typer.Option(help="How many must order the release.")
    ] = 2,
    no_secure_aggregation: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="Why the server may see each hospital's update. Without it, the "
            "contract asks for secure aggregation.",
        ),
    ] = "",
    form: Format = "text",
) -> None:
    """Draft a contract around a study: a TOML file to be read, edited and signed.

    It pins the keys of its hospitals and of all administrators.
    """
    with refusals():
        text = drafts.draft(
            Consortium(state),
            study_toml,
            genes,
            purpose=purpose,
            expires=expires.date(),
            sites=[name.strip() for name in sites.split(",") if name.strip()],
            administrators=administrators,
            no_secure_aggregation=no_secure_aggregation,
        )
        write_out(out, text)
        retired = drafts.retired_genes(genes)
        contract = Contract.from_toml(text, str(out))
        protected, left = protections(contract.study), remaining(contract)
    facts: dict[str, object] = {"contract": str(out), "hash": Signed(text).hash}
    if form == "json":
        facts |= {"protections": protected, "not_protected": left}
    show(facts, form)
    if form == "text":
        _show_protections(protected, left)
    if retired:
        pairs = ", ".join(f"{old} is {new}" for old, new in sorted(retired.items()))
        note(f"Retired symbols of genes are written as the current ones: {pairs}.")
    note("Read it through; each change until it is signed changes its hash.")


@study.command("sign")
def study_sign(
    contract: ContractToml,
    key: KeyFile,
    certificate: Annotated[
        Path | None,
        typer.Option(
            help="The administrator's certificate; without it, the key's name with "
            ".crt, else the one in the state directory."
        ),
    ] = None,
    state: OptionalState = None,
    form: Format = "text",
) -> None:
    """Add an administrator's signature to a contract, in a file of its folder."""
    with refusals():
        private = pki.load_key(key)
        signed = contracts.sign(
            contract, private, _own(private, key, certificate, state)
        )
    facts = {
        "signatures": str(contracts.signatures_path(contract)),
        "hash": signed.hash,
        "signed_by": [each.name for each in signed.signatures],
    }
    show(facts, form)


@study.command("publish")
def study_publish(
    contract: ContractToml, key: KeyFile, state: State, form: Format = "text"
) -> None:
    """Store a signed contract and order that its hospitals receive it."""
    with refusals():
        found = Consortium(state)
        order = contracts.publish(found, contract, pki.load_key(key))
        served = found.is_served()
    show({"contract": order.subject, "token": order.token}, form)
    if not served:
        note("The server is not running; it sends the contract once it is started.")


@study.command("list")
def study_list(state: State, form: Format = "text") -> None:
    """List the published contracts and how many hospitals approved each."""
    with refusals():
        found = Consortium(state)
        rows = []
        for each in contracts.published(found):
            contract, answers = each.contract, contracts.answers(found, each.hash)
            approved = [a.decision for a in answers.values()].count("approved")
            rows.append(
                {
                    "hash": each.hash if form == "json" else each.hash[:12],
                    "study": contract.study.name,
                    "state": _state(each),
                    "expires": contract.expires,
                    "signed_by": ", ".join(each.signers),
                    "approved": f"{approved} of {len(contract.sites)}",
                }
            )
    show_rows(rows, form, "no contract yet; see fedgex-admin study publish")


@study.command("show")
def study_show(contract: Which, state: State, form: Format = "text") -> None:
    """Show a published contract, who signed it, and what each hospital answered."""
    with refusals():
        found = Consortium(state)
        each = contracts.find(found, contract)
        answers = contracts.answers(found, each.hash)
        by_site = {
            name: _answer(answers.get(name), form) for name in each.contract.sites
        }
        protected, left = protections(each.contract.study), remaining(each.contract)
    facts = {
        "hash": each.hash,
        "study": each.contract.study.name,
        "state": _state(each),
        "signed_by": list(each.signers),
        "answers": by_site,
    }
    if form == "json":
        text = {"contract": each.contract.model_dump(mode="json")}
        known = {"protections": protected, "not_protected": left}
        show(facts | known | text, form)
        return
    show({name: value for name, value in facts.items() if name != "answers"}, form)
    _show_protections(protected, left)
    for name, answer in by_site.items():
        typer.echo(f"answer of {name}: {answer}")
    typer.echo(f"\n{each.signed.content}", nl=False)


def _show_protections(protected: list[str], left: list[str]) -> None:
    for each in protected:
        typer.echo(f"protection: {each}")
    for each in left:
        typer.echo(f"not protected: {each}")


def _own(
    private: pki.Key, key: Path, certificate: Path | None, state: Path | None
) -> x509.Certificate:
    """Return the certificate that belongs to an administrator's key."""
    beside = certificate or key.with_suffix(".crt")
    if beside.is_file():
        return pki.from_pem(beside.read_text())
    if certificate is None and state is not None:
        return Consortium(state).administrator(private)[1]
    raise TrustError(
        f"{beside} does not exist; expected the certificate that came back for the "
        "request. Put it there, name it with --certificate, or give --state."
    )


def _state(each: contracts.Published) -> str:
    if each.contract.expired():
        return "expired"
    return "usable" if each.contract.supports(version("fedgex")) else "other version"


def _answer(answer: Answer | None, form: str) -> object:
    if form == "json":
        return None if answer is None else answer.model_dump(mode="json")
    if answer is None:
        return "none yet"
    until = f" until {answer.expires}" if answer.expires else ""
    reason = f": {one_line(answer.reason)}" if answer.reason else ""
    return f"{answer.decision}{until} by {one_line(answer.by)}{reason}"

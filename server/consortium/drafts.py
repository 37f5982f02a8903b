"""Drafts of study contracts: a study, its genes and the terms, as annotated TOML."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedgex.common import parsing
from fedgex.common.data.genes import retired_symbols
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.study import FEWEST_SUMMED
from fedgex.common.trust import pki
from fedgex.common.trust.contract import MAX_BYTES, Contract
from fedgex.server.consortium import annotated_toml, members
from fedgex.server.consortium.contracts import read_text
from fedgex.server.consortium.store import Consortium, listed


def draft(
    consortium: Consortium,
    study_toml: Path,
    genes: Path,
    *,
    purpose: str,
    expires: date,
    sites: Sequence[str],
    administrators: int,
    no_secure_aggregation: str = "",
) -> str:
    """Return a contract around a study, as annotated TOML.

    Defaults are written too, so that the signed text is complete. It pins the keys of
    its sites and of all administrators, and asks for secure aggregation.

    Parameters
    ----------
    study_toml
        A `[study]` section, or a scenario that has one.
    genes
        One gene symbol a line; blank lines and what follows a # do not count. Retired
        symbols become the current ones, see `retired_genes`.
    administrators
        Number of administrators who must order the release.
    no_secure_aggregation
        Why the server may see each site's update; empty with secure aggregation.

    Raises
    ------
    ConfigError
        With every error in study, genes and terms.
    """
    values = _toml(study_toml)
    study = values.get("study", values)
    if not isinstance(study, Mapping):
        raise ConfigError(f'{study_toml}: "study" is no section; expected [study].')
    added = "secure_aggregation" not in study and not no_secure_aggregation
    retired = retired_genes(genes)
    vocabulary = Vocabulary(tuple(sorted(retired.get(g, g) for g in _genes(genes))))
    rule = {**study.get("vocabulary", {}), "genes": list(vocabulary.genes)}
    terms = {
        "purpose": purpose,
        "expires": expires,
        "code_version": ".".join(version("fedgex").split(".")[:2]),
        "vocabulary_hash": vocabulary.hash,
        "sites": list(sites),
        "no_secure_aggregation": no_secure_aggregation,
        "release": {"administrators": administrators},
        "study": {**(_secure(study) if added else study), "vocabulary": rule},
    }
    findings = []
    if strange := sorted(set(sites) - (active := _active(consortium))):
        findings.append(
            f"{', '.join(strange)}: no active hospital of {consortium.settings.name}; "
            f"expected some of {listed(active)}. Add them with fedgex-admin site add."
        )
    try:
        contract = Contract.read(terms | _pins(consortium, sites), str(study_toml))
    except ConfigError as error:
        findings.insert(0, str(error))
        if added:
            findings.append(
                "New contracts ask for secure aggregation, which needs a mean of "
                'changes (strategy.update = "delta"), weights that are "equal" or '
                f'"fixed", and a quorum of {FEWEST_SUMMED} hospitals or more. Change '
                "the study, or give a reason with --no-secure-aggregation."
            )
    if findings:
        raise ConfigError("\n".join(findings))
    if contract.expired():
        raise ConfigError(
            f"the contract would expire on {expires}; expected a day to come."
        )
    text = annotated_toml.render(contract)
    assert Contract.from_toml(text, "the draft") == contract, "what is written is read"
    return text


def retired_genes(path: Path) -> dict[str, str]:
    """Return the current symbol of each gene of a list that has a retired one.

    Raises
    ------
    ConfigError
        If the list cannot be used, or holds a gene under two of its names.
    """
    genes = _genes(path)
    retired = retired_symbols(genes)
    names = Counter(retired.get(gene, gene) for gene in genes)
    if twice := [gene for gene in genes if names[retired.get(gene, gene)] > 1]:
        raise ConfigError(
            f"{path}: {', '.join(twice)} are retired and current symbols of the same "
            "genes; expected one symbol a gene. Remove the retired ones."
        )
    return retired


def _active(consortium: Consortium) -> set[str]:
    known = consortium.sites().items()
    return {name for name, site in known if site.state == "active"}


def _pins(consortium: Consortium, sites: Sequence[str]) -> dict[str, Any]:
    """Return the contract's pinned keys; none if a site is not active."""
    if set(sites) - _active(consortium):
        return {}
    held = {n: pki.from_pem(consortium.site(n).certificate) for n in sites}
    return {
        "site_keys": {name: pki.fingerprint(each) for name, each in held.items()},
        "administrator_keys": members.administrator_pins(consortium),
    }


def _secure(study: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study under secure aggregation, with what that needs by default."""
    needs: dict[str, dict[str, Any]] = {
        "strategy": {"name": "fedavg", "weights": "equal", "update": "delta"},
        "rounds": {"quorum": FEWEST_SUMMED},
    }
    chosen = {name: {**rule, **study.get(name, {})} for name, rule in needs.items()}
    return {**study, "secure_aggregation": {}, **chosen}


def _genes(path: Path) -> tuple[str, ...]:
    lines = (line.partition("#")[0].strip() for line in read_text(path).splitlines())
    found = [line for line in lines if line]
    findings = []
    if spaced := [gene for gene in found if re.search(r"[\s,;]", gene)]:
        findings.append(
            f"{len(spaced)} lines hold more than one word, as {spaced[0]!r}"
        )
    if twice := sorted(gene for gene, n in Counter(found).items() if n > 1):
        findings.append(f"{len(twice)} genes stand in it twice, as {twice[0]}")
    if not found:
        findings.append("it is empty")
    if findings:
        raise ConfigError(
            f"{path}: {'; '.join(findings)}; expected one symbol a line, each once."
        )
    return tuple(sorted(found))


def _toml(path: Path) -> dict[str, Any]:
    return parsing.toml_table(read_text(path), f"{path}:", most=MAX_BYTES)

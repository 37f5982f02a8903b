"""What of a contract the hospital's data can take part in.

Counts below the smallest that may be named read "fewer than".
"""

from __future__ import annotations

from collections.abc import Iterator

from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.genes import spelt_as
from fedgex.common.errors import DataError
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.study import CLASSIFICATION, SURVIVAL, Study


def coverage(cohort: Cohort, study: Study, min_cell_count: int) -> Iterator[str]:
    """Yield what a person compares with the contract: genes, patients, cancer types.

    Parameters
    ----------
    cohort
        The hospital's checked patients, of whom one sample each counts.
    min_cell_count
        Smallest count of patients that is named.
    """

    def count(n: int) -> str:
        few = n < min_cell_count
        return f"fewer than {min_cell_count} patients" if few else f"{n} patients"

    asked = study.vocabulary.genes
    if asked:
        measured = len({*spelt_as(cohort.genes, asked)} & {*asked})
        yield f"of its {len(asked)} genes you measure {measured}"
    one = cohort.take(cohort.first_samples())
    known = {
        CLASSIFICATION: study.classification.classes,
        SURVIVAL: study.survival.cancer_types,
    }
    for phase, types in known.items():
        if phase not in study.phases or "cancer_type" not in one.clinical:
            continue
        able = one.clinical["cancer_type"].isin(types).to_numpy()
        if phase == SURVIVAL:
            able &= one.with_survival()
        yield f"{count(int(able.sum()))} can take part in {phase}"
    named = {name for phase in known if phase in study.phases for name in known[phase]}
    if named and "cancer_type" in one.clinical:
        sizes = one.clinical["cancer_type"].value_counts()
        other = sizes[[name not in named for name in sizes.index]]
        if len(other):
            large = [name for name, n in other.items() if n >= min_cell_count]
            spelt = f" ({', '.join(map(str, large))})" if large else ""
            yield (
                f"{count(int(other.sum()))} have a cancer type that the contract does "
                f"not know{spelt}; it knows {', '.join(sorted(named))}"
            )


def of_site(settings: SiteSettings, study: Study) -> list[str]:
    """Return `coverage` of a hospital's files, or that they cannot be used now."""
    floor = max(study.minimum_cohort, settings.policy.minimum_cohort)
    try:
        cohort, _ = read_cohort(settings.data, floor, study.scale, tuple(study.phases))
    except DataError:
        return ["they cannot be used now; fedgex-site check-data says why"]
    return list(coverage(cohort, study, floor))

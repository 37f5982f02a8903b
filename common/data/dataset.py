"""From a checked cohort to tensors on the vocabulary: one row a patient.

N patients, V genes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Patients:
    """One row a patient, standardised and on the vocabulary."""

    values: Tensor
    """Standardised expression, shape (N, V), float32; NaN where not measured."""
    cancer_type: tuple[str | None, ...]
    """Cancer type of each patient, length N."""
    duration: Tensor
    """Follow-up, days, shape (N,); NaN where unknown."""
    event: Tensor
    """1 died, 0 censored, shape (N,); NaN where unknown."""
    clinical: Tensor
    """Covariates named by `heads.CLINICAL`, shape (N, 2); zeros where unknown."""

    def __len__(self) -> int:
        """Return the number of patients, N."""
        return len(self.values)

    @property
    def measured(self) -> Tensor:
        """Cells with a value, shape (N, V), bool."""
        return ~self.values.isnan()

    def take(self, rows: Tensor) -> Patients:
        """Return the patients at the given rows, in their order."""
        return Patients(
            values=self.values[rows],
            cancer_type=tuple(self.cancer_type[i] for i in rows.tolist()),
            duration=self.duration[rows],
            event=self.event[rows],
            clinical=self.clinical[rows],
        )

    def without(self, cells: Tensor) -> Patients:
        """Return the patients as if cells, (N, V) or (V,), had not been measured."""
        values = self.values.masked_fill(cells, torch.nan)
        return dataclasses.replace(self, values=values)

    @classmethod
    def joined(cls, groups: Sequence[Patients]) -> Patients:
        """Return the patients of all groups, one group after the other."""
        return cls(
            values=torch.cat([each.values for each in groups]),
            cancer_type=tuple(t for each in groups for t in each.cancer_type),
            duration=torch.cat([each.duration for each in groups]),
            event=torch.cat([each.event for each in groups]),
            clinical=torch.cat([each.clinical for each in groups]),
        )

    def type_index(self, types: tuple[str, ...]) -> Tensor:
        """Return the position of each patient's type in `types`, or -1, shape (N,)."""
        at = {name: i for i, name in enumerate(types)}
        return torch.tensor([at.get(name or "", -1) for name in self.cancer_type])


def to_patients(
    cohort: Cohort,
    vocabulary: Vocabulary,
    standardisation: Standardisation | None = None,
) -> Patients:
    """Take one sample a patient (the first), onto the vocabulary, standardised.

    One patient is one unit of privacy and of splitting, hence one row. Without a
    standardisation, values stay on the canonical scale.
    """
    unit = Standardisation.identity(len(vocabulary))
    first = cohort.first_samples()
    placed = vocabulary.place(cohort.genes, cohort.expression[first])
    clinical = cohort.clinical.iloc[first]

    def column(name: str) -> Tensor:
        if name not in clinical:
            return torch.full((len(first),), torch.nan)
        return torch.tensor(clinical[name].to_numpy(dtype=np.float32))

    age = (column("age") - 60) / 10
    male = torch.zeros(len(first))
    if "sex" in clinical:
        male = torch.tensor((clinical["sex"] == "male").to_numpy(dtype=np.float32))
    types = (
        clinical["cancer_type"] if "cancer_type" in clinical else [None] * len(first)
    )
    return Patients(
        values=torch.from_numpy((standardisation or unit).apply(placed)),
        cancer_type=tuple(t if isinstance(t, str) else None for t in types),
        duration=column("duration"),
        event=column("event"),
        clinical=torch.stack([age.nan_to_num(0.0), male], dim=1),
    )

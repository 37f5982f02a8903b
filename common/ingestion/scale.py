"""Expression on the study's scale: declared against actual, counts, conversion.

N samples, G genes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.data import scales
from fedgex.common.data.scales import CONVERTIBLE, Scale
from fedgex.common.ingestion.expression import Sheet
from fedgex.common.ingestion.findings import Findings


def on_scale(
    sheet: Sheet, source: Scale, target: Scale, table: pd.DataFrame, findings: Findings
) -> NDArray[np.float32]:
    """Convert expression to a study's scale; all NaN after an error.

    Parameters
    ----------
    source, target
        The declared scale of the sheet, and the study's.
    table
        Clinical values, one row a sample; counts need `library_size`.

    Returns
    -------
    NDArray
        Shape (N, G).
    """
    values = sheet.values
    impossible = check_scale(sheet, source, findings)
    if source == Scale.COUNTS and target in CONVERTIBLE and "library_size" in table:
        library_size = table["library_size"].to_numpy(dtype=np.float64)
        impossible |= _check_library_size(sheet, library_size, findings)
        with np.errstate(divide="ignore", invalid="ignore"):  # reported just above
            values = scales.counts_per_million(values, library_size)
        source = Scale.LINEAR
    if not scales.is_convertible(source, target):
        impossible = True
        give = (
            "{library_size}, or export normalised values; reads are not summed "
            "from a panel."
        )
        findings.add(
            Code.SCALE_NOT_CONVERTIBLE,
            sheet.file,
            declared=source,
            target=target,
            action=give if source == Scale.COUNTS else None,
        )
    if impossible:
        return np.full(values.shape, np.nan, dtype=np.float32)
    return scales.convert(values, source, target)


def check_scale(sheet: Sheet, scale: Scale, findings: Findings) -> bool:
    """Return whether the numbers contradict the declared scale."""
    finite = np.where(np.isfinite(sheet.values), sheet.values, np.nan)
    reason = scales.misfit(finite, scale)
    if reason is None:
        if scales.is_faint(finite, scale):
            n = len(sheet.labels)
            findings.add(Code.SCALE_FAINT, sheet.file, n_genes=n, declared=scale)
        return False
    negative = scales.below_floor(finite, scale)
    fitting = [*sorted(scales.recognise(finite)), *scales.formula_of(finite)]
    findings.add(
        Code.NEGATIVE_EXPRESSION if negative.any() else Code.SCALE_IMPOSSIBLE,
        sheet.file,
        n=negative.sum(),
        floor=scales.floor(scale),
        genes=sheet.genes_where(negative),
        declared=scale,
        reason=reason,
        fitting=", ".join(fitting) or "none that we know",
    )
    return True


def _check_library_size(
    sheet: Sheet, library_size: NDArray[np.float64], findings: Findings
) -> bool:
    """Return whether any sample's counts exceed its library size."""
    given = np.nansum(np.where(np.isinf(sheet.values), 0, sheet.values), axis=1)
    bad = ~((library_size > 0) & (library_size >= given) & np.isfinite(library_size))
    code = Code.LIBRARY_SIZE_UNUSABLE if bad.any() else Code.COUNTS_PER_MILLION
    findings.add(code, sheet.file, n=bad.sum())
    return bool(bad.any())

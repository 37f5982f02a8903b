"""Expression on the study's scale: declared against actual, counts, conversion.

N samples, G genes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.client.data.codes import Code
from fedgex.client.data.expression import Sheet
from fedgex.client.data.findings import Findings
from fedgex.common import scale as scales
from fedgex.common.scale import CONVERTIBLE, Scale


def on_scale(
    sheet: Sheet, source: Scale, target: Scale, table: pd.DataFrame, findings: Findings
) -> NDArray[np.float32]:
    """Convert expression to a study's scale; all NaN if anything stands in the way.

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
        findings.add(
            Code.SCALE_NOT_CONVERTIBLE,
            sheet.file,
            f"expression on the {source} scale",
            expected=f"the study's scale, {target}, or one that leads there",
            action=f"{findings.advice.library_size}, or export normalised values; "
            "reads are not summed from a panel."
            if source == Scale.COUNTS
            else f"Export the expression as {target}.",
        )
    if impossible:
        return np.full(values.shape, np.nan, dtype=np.float32)
    return scales.convert(values, source, target)


def check_scale(sheet: Sheet, scale: Scale, findings: Findings) -> bool:
    """Compare the numbers with the declared scale; return True if they cannot fit."""
    finite = np.where(np.isfinite(sheet.values), sheet.values, np.nan)
    reason = scales.misfit(finite, scale)
    if reason is None:
        if scales.is_faint(finite, scale):
            findings.add(
                Code.SCALE_FAINT,
                sheet.file,
                f"no gene of {len(sheet.labels)} is abundant on the {scale} scale",
            )
        return False
    fitting = ", ".join(sorted(scales.recognise(finite))) or "none that we know"
    name = findings.advice.scale
    action = f"Correct {name} or the export; the numbers could be: {fitting}."
    negative = scales.below_floor(finite, scale)
    if negative.any():
        findings.add(
            Code.NEGATIVE_EXPRESSION,
            sheet.file,
            f"{findings.count(int(negative.sum()), 'value')} below "
            f"{scales.floor(scale):g} in {sheet.genes_where(negative)}",
            expected=f"{scales.floor(scale):g} or more on the {scale} scale",
            action=action,
        )
    else:
        expected = f"values on the {scale} scale, as declared"
        findings.add(
            Code.SCALE_IMPOSSIBLE, sheet.file, reason, expected=expected, action=action
        )
    return True


def _check_library_size(
    sheet: Sheet, library_size: NDArray[np.float64], findings: Findings
) -> bool:
    """Return whether any sample has more reads in its genes than it has at all."""
    given = np.nansum(np.where(np.isinf(sheet.values), 0, sheet.values), axis=1)
    bad = ~((library_size > 0) & (library_size >= given) & np.isfinite(library_size))
    if bad.any():
        findings.add(
            Code.LIBRARY_SIZE_UNUSABLE,
            sheet.file,
            f"{findings.count(int(bad.sum()), 'sample')} whose library size is "
            "missing, not above zero, or less than its counts add up to",
        )
        return True
    findings.add(
        Code.COUNTS_PER_MILLION,
        sheet.file,
        "counts, taken as counts per million of the library size",
    )
    return False

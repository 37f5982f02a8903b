"""What a model does with partly visible patients: restore, embed; and its loss.

B or N patients, V genes, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.imputers import Float
from fedgex.common.models.gexbert import Encoder, GexBert, select

REMEMBERED = 64
"""Sets of patients whose vectors are kept: a simulation's sites and its hold-out."""
_embedded: OrderedDict[bytes, Tensor] = OrderedDict()


def restore(model: GexBert, values: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
    """Restore the cells asked for from the visible ones.

    Parameters
    ----------
    values
        Standardised expression, shape (B, V); anything (NaN too) where not visible.
    visible, asked
        Bool masks, shape (B, V).

    Returns
    -------
    Tensor
        Shape (B, V): restored values where asked, zero elsewhere.
    """
    genes, given, keep = _tokens(values, visible)
    wanted, wanted_keep = select(asked)
    restored = model(genes, given, keep, wanted).float()
    if wanted_keep is not None:
        restored = torch.where(wanted_keep, restored, 0.0)
    return torch.zeros_like(values).scatter(1, wanted, restored)


def embed(encoder: Encoder, values: Tensor, visible: Tensor) -> Tensor:
    """Return one vector a patient from the visible genes, shape (B, D)."""
    device = next(encoder.parameters()).device
    genes, given, keep = _tokens(values.to(device), visible.to(device))
    return encoder.embed(genes, given, keep)


@torch.no_grad()
def embed_all(encoder: Encoder, patients: Patients, batch_size: int = 64) -> Tensor:
    """Return one vector a patient from all measured genes, shape (N, D), float32.

    A frozen encoder meets the same patients every round: the vectors of the last
    `REMEMBERED` calls are kept in this process.
    """
    key = _digest([*encoder.state_dict().values(), patients.values])
    if key in _embedded:
        _embedded.move_to_end(key)
        return _embedded[key].clone()
    device = next(encoder.parameters()).device
    with mixed_precision(device):
        parts = [
            embed(encoder, values, measured).float()
            for values, measured in zip(
                patients.values.split(batch_size),
                patients.measured.split(batch_size),
                strict=True,
            )
        ]
    _embedded[key] = torch.cat(parts)
    if len(_embedded) > REMEMBERED:
        _embedded.popitem(last=False)
    return _embedded[key].clone()


BATCH_CELLS = 2**18
"""Patients times genes that a backbone restores at once. Memory follows it: judging six
patients of 90,000 genes took 2 GB at once."""


class ModelImputer:
    """A backbone as an imputer, with the interface of `imputers.Imputer`."""

    def __init__(self, backbone: GexBert, batch_size: int = 64) -> None:
        self.backbone = backbone.eval()
        at_once = BATCH_CELLS // backbone.config.n_genes
        self.batch_size = max(1, min(batch_size, at_once))

    @torch.no_grad()
    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill the NaN cells of standardised values (N, V); the others stay as is."""
        device = next(self.backbone.parameters()).device
        filled = values.copy()
        for start in range(0, len(values), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = torch.as_tensor(values[rows], dtype=torch.float32, device=device)
            missing = batch.isnan()
            if missing.any():
                with mixed_precision(device):
                    restored = restore(self.backbone, batch, ~missing, missing)
                hidden = missing.cpu().numpy()
                filled[rows][hidden] = restored.cpu().numpy()[hidden]
        return filled


def restoration_loss(
    model: GexBert, values: Tensor, measured: Tensor, hidden: Tensor
) -> tuple[Tensor, int]:
    """Return the mean squared error over hidden cells, and how many there are.

    Parameters
    ----------
    values
        Standardised expression, shape (B, V); NaN where not measured.
    measured
        Cells with a value, shape (B, V).
    hidden
        Measured cells to be restored from the rest, shape (B, V).
    """
    restored = restore(model, values, measured & ~hidden, hidden)
    error = torch.where(hidden, restored - values, 0.0)
    n_terms = int(hidden.sum())
    return error.square().sum() / max(n_terms, 1), n_terms


def draw_panel(measured: Tensor, min_genes: int, generator: torch.Generator) -> Tensor:
    """Draw a panel of genes, and show those of them that each patient has.

    The size of the panel is drawn evenly on the log scale, from `min_genes` to all.

    Returns
    -------
    Tensor
        Visible cells, shape (B, V), bool.
    """
    n_genes = measured.shape[1]
    low = math.log(min(min_genes, n_genes))
    share = float(torch.rand((), generator=generator))
    size = round(math.exp(low + (math.log(n_genes) - low) * share))
    panel = torch.randperm(n_genes, generator=generator)[:size]
    visible = torch.zeros_like(measured)
    visible[:, panel] = measured[:, panel]
    return visible


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Use bfloat16 on a GPU; float32 on a CPU, where it is the faster one."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def _digest(tensors: Iterable[Tensor]) -> bytes:
    """Return the SHA-256 of what tensors hold, their shapes and where they are."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.device} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _tokens(values: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return genes, values and keep of the visible cells, each (B, T)."""
    genes, keep = select(visible)
    given = values.gather(1, genes)
    if keep is not None:
        given = torch.where(keep, given, 0.0)
    return genes, given, keep

"""Parameters of torch modules to named arrays and back, checked on the way in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedgex.common.arrays import Arrays, check


def parameters(modules: Mapping[str, nn.Module]) -> dict[str, NDArray[np.float32]]:
    """Return all parameters of the modules, each named `module.parameter`."""
    return {
        f"{prefix}.{name}": tensor.detach().cpu().numpy().astype(np.float32)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def load_parameters(modules: Mapping[str, nn.Module], arrays: Arrays) -> None:
    """Put arrays named `module.parameter` into the modules.

    Raises
    ------
    UpdateError
        If a parameter is missing or of another shape. Names of other modules are
        ignored, so that a phase can load what it needs from all of a model.
    """
    for prefix, module in modules.items():
        state: dict[str, Tensor] = module.state_dict()
        check({f"{prefix}.{name}": tuple(t.shape) for name, t in state.items()}, arrays)
        for name, tensor in state.items():  # one copy of one array at a time
            tensor.copy_(torch.tensor(arrays[f"{prefix}.{name}"]))

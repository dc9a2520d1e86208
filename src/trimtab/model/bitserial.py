"""The rule of bit-serial products in the decoder.

Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.model.products import Exact, added
from trimtab.runtime.native.bitserial import multiply
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.bipolar import BipolarPlanes
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import BitSerial


class BitSerialProduct(Exact):
    """Tokens are coded, the codes multiplied; the matrix is never decoded."""

    def __init__(self, path: str, node: LinearSpec, weights: Weights) -> None:
        super().__init__(path, node, weights)
        assert isinstance(node.product, BitSerial)
        self.product = node.product
        if not isinstance(self.packed.format, BipolarPlanes):
            raise SpecError(
                f"{path} is stored as {self.packed.format}; bit-serial products read bipolar planes alone. Use bipolar."
            )

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = np.ascontiguousarray(x_TK.float().numpy())
        return added(multiply(self.packed, self.product, x, torch.get_num_threads()), x_TK.dtype, bias)

"""The compiled operators for what stands between the products of a decoder layer.

Letters: N rows of a step, d numbers of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.native.library import Library, threads_for


class LayerOperators:
    """Norms, rotations and gates of contiguous rows in fp32 on CPU, by the library."""

    def __init__(self, library: Library) -> None:
        self._kernels = library.kernels
        self._norm_rows = library.operator("mhr_norm_rows")
        self._rotate_rows = library.operator("mhr_rotate_rows")
        self._gate_rows = library.operator("mhr_gate_rows")

    def norm(self, states: Tensor, more: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Add `more` (N, d), if any, to states (N, d), in place -> weight * states / sqrt(mean(states^2) + epsilon).

        Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).
        """
        rows, d = states.shape
        normed = torch.empty(rows, d)
        self._norm_rows(
            self._kernels,
            states.data_ptr(),
            None if more is None else more.data_ptr(),
            weight.data_ptr(),
            epsilon,
            rows,
            d,
            normed.data_ptr(),
            threads_for(rows * d),
        )
        return normed

    def rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor, num_heads: int) -> None:
        """Rotate the first `num_heads` heads of every row of heads (N, width), in place, by the angles whose cosines
        and sines (N, head_dim) are given.

        Source: Su et al. 2021, RoFormer (arXiv 2104.09864), the two numbers of a pair half a head apart.
        """
        rows, head_dim = cosines.shape
        self._rotate_rows(
            self._kernels,
            heads.data_ptr(),
            heads.stride(0),
            cosines.data_ptr(),
            sines.data_ptr(),
            rows,
            num_heads,
            head_dim,
            threads_for(rows * num_heads * head_dim),
        )

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up (N, d) of both side by side (N, 2 d).

        Source: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202), SwiGLU.
        """
        rows, d = len(gate_up), gate_up.shape[1] // 2
        gated = torch.empty(rows, d)
        self._gate_rows(self._kernels, gate_up.data_ptr(), rows, d, gated.data_ptr(), threads_for(rows * d))
        return gated

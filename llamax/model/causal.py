"""Causal attention, the default of a model: as an ``Attend``, and with the rotation before it."""

from __future__ import annotations

from torch import Tensor

from llamax import ops


class Causal:
    """Attention of whole sequences, within documents where their numbers are given."""

    def __init__(self, documents_BS: Tensor | None) -> None:
        self.documents_BS = documents_BS

    def __call__(self, q_BShE: Tensor, k_BSkE: Tensor, v_BSkE: Tensor, layer: int) -> Tensor:
        return ops.attention(q_BShE, k_BSkE, v_BSkE, self.documents_BS)

    def rotated(self, qkv_BSf: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, heads: int) -> Tensor:
        """The same of a projection's output, before rotation: -> [B,S,h*E]."""
        return ops.rotated_attention(qkv_BSf, cos_BSE, sin_BSE, heads, self.documents_BS)

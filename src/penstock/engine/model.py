"""The decoder: Llama, Qwen2, Qwen3 and Mistral are one computation with a few parts present or not.

Matrix products are torch's; everything between them is `attention.Kernels`.
"""

from __future__ import annotations

import torch

from penstock.engine.attention import Kernels
from penstock.engine.weights import Weights


class Model:
    """Computes logits from tokens, reading and writing the KV cache through its kernels."""

    def __init__(self, weights: Weights, kernels: Kernels) -> None:
        self.weights = weights
        self.kernels = kernels

    def forward(self, tokens: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        """Logits float32 [wanted, vocabulary] of the places `wanted` among `tokens` (None: of all, in order).

        The kernels have begun the step that `tokens` int64 [tokens] belongs to.
        """
        weights, kernels = self.weights, self.kernels
        residual = weights.embedding.index_select(0, tokens)
        inputs = kernels.norm(residual, weights.layers[0].input_norm)
        last = len(weights.layers) - 1
        for i, layer in enumerate(weights.layers):
            attention = kernels.attend(i, layer.qkv(inputs))
            if i == last and wanted is not None:
                # Keys and values of all tokens are in the cache now; the rest serves the logits alone.
                attention, residual = attention[wanted], residual[wanted]
            inputs = kernels.add_norm(layer.output(attention), residual, layer.post_attention_norm)
            delta = layer.down(kernels.silu_mul(layer.gate_up(inputs)))
            following = weights.final_norm if i == last else weights.layers[i + 1].input_norm
            inputs = kernels.add_norm(delta, residual, following)
        return weights.lm_head(inputs).float()

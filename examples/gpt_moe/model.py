"""A small GPT over bytes whose every other feed-forward block is DeepSpeed's own MoE layer.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.nn import functional

from data import VOCABULARY_SIZE

EMBEDDING_DEVIATION = 0.05
RESIDUAL_SCALE = 0.35
"""Projections back into the residual stream start this much smaller, so that depth does not blow it up."""
ROTARY_BASE = 1000.0
LOCAL_EXPERT = re.compile(r"deepspeed_experts\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; ep_size ranks share the experts of one layer."""

    num_layers: int = 4
    hidden_size: int = 96
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    ep_size: int = 1
    sequence_length: int = 96
    capacity_factor: float = 1.25
    seed: int = 1234


class FeedForward(nn.Module):
    """Two linear layers with a GELU between: [..., H] to [..., H]; both the dense block and the expert."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, inner_size)
        self.contract = nn.Linear(inner_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform every position alone."""
        out: Tensor = self.contract(functional.gelu(self.expand(hidden)))
        return out


class CausalAttention(nn.Module):
    """Multi-head self-attention that sees only the past: [B, S, H] to [B, S, H]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Mix every position with those before it."""
        split = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        query, key, value = rotate_by_position(split[0]), rotate_by_position(split[1]), split[2]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.project(mixed.transpose(-2, -3).flatten(-2))
        return out


def rotate_by_position(heads: Tensor) -> Tensor:
    """Turn pairs of features of [..., S, D] by angles that grow with the position, D even: rotary embedding."""
    num_pairs = heads.shape[-1] // 2
    frequencies = ROTARY_BASE ** (-torch.arange(num_pairs, device=heads.device) / num_pairs)
    angles = torch.arange(heads.shape[-2], device=heads.device)[:, None] * frequencies
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Block(nn.Module):
    """Attention, then a dense or a Mixture-of-Experts feed-forward: [B, S, H] to ([B, S, H], balance loss [])."""

    def __init__(self, config: ModelConfig, *, is_moe: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = CausalAttention(config.hidden_size, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        feed_forward = FeedForward(config.hidden_size, 4 * config.hidden_size)
        self.feed_forward = _moe_layer(config, feed_forward) if is_moe else feed_forward

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Add both branches to the residual stream; a dense block's balance loss is zero."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        out = self.feed_forward(self.feed_forward_norm(hidden))
        if isinstance(out, tuple):
            return hidden + out[0], out[1]
        return hidden + out, hidden.new_zeros(())


class GPTMoE(nn.Module):
    """The whole model: tokens int64 [B, S] to (logits [B, S, V], sum of the layers' balance losses [])."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, is_moe=index % 2 == 1) for index in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the byte after every position."""
        hidden = self.token_embedding(tokens)
        balance_loss = hidden.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            hidden, block_balance_loss = block(hidden)
            balance_loss = balance_loss + block_balance_loss
        return functional.linear(self.final_norm(hidden), self.token_embedding.weight), balance_loss


def build_model(config: ModelConfig, rank: int) -> GPTMoE:
    """Build the model; a weight's start depends on the seed and its place alone, not on the number of ranks.

    DeepSpeed copies one expert num_experts times; here every expert starts apart, so that they specialise sooner.
    """
    torch.manual_seed(config.seed)
    model = GPTMoE(config)
    first_expert = rank % config.ep_size * (config.num_experts // config.ep_size)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            place = LOCAL_EXPERT.sub(lambda found: f"expert {int(found[1]) + first_expert}", name)
            generator = torch.Generator().manual_seed(config.seed + zlib.crc32(place.encode()))
            nn.init.normal_(module.weight, std=_initial_deviation(name, module), generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _moe_layer(config: ModelConfig, expert: FeedForward) -> MoE:
    return MoE(
        hidden_size=config.hidden_size,
        expert=expert,
        num_experts=config.num_experts,
        ep_size=config.ep_size,
        k=config.top_k,
        capacity_factor=config.capacity_factor,
        eval_capacity_factor=2.0,
        # Off, because that noise also acts in evaluation and would make two runs differ.
        top2_2nd_expert_sampling=False,
    )


def _initial_deviation(name: str, module: nn.Linear | nn.Embedding) -> float:
    if isinstance(module, nn.Embedding):
        return EMBEDDING_DEVIATION
    scale = RESIDUAL_SCALE if name.endswith(("project", "contract")) else 1.0
    return scale / math.sqrt(module.in_features)

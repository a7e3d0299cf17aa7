"""The routed objective on vocabulary-parallel logits. Losses take tensors and process groups, nothing else."""

from megatron_srpo.losses.distillation import distill_ratio, dynamic_weights, topk_divergence
from megatron_srpo.losses.head import Head, LinearHead, LogitsHead
from megatron_srpo.losses.policy import k3, policy_loss, rollout_weights
from megatron_srpo.losses.terms import RoutedLoss
from megatron_srpo.losses.vocab_parallel import full_divergence, gather_logprobs, topk

__all__ = [
    "Head",
    "LinearHead",
    "LogitsHead",
    "RoutedLoss",
    "distill_ratio",
    "dynamic_weights",
    "full_divergence",
    "gather_logprobs",
    "k3",
    "policy_loss",
    "rollout_weights",
    "topk",
    "topk_divergence",
]

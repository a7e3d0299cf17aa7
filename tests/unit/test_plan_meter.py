"""A run's FLOPs and its share of the peak."""

import pytest

from megatron_srpo.plan import MACHINES, Architecture, Meter

HF = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_flops_are_those_of_every_product_of_the_model():
    matrices = 2 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16) + 8 * 10  # two layers (q, k, v, o, MLP), and the head
    attention = 2 * 2 * 2 * 8 * (6 / 2)  # scores and values, two layers, half of a sequence of 6 on average
    forward = 2 * matrices + attention
    found = Meter(Architecture.from_hf(HF), ranks=4)(trained=100, scored=50, length=6, seconds=2)
    assert found == {"perf/tflops_per_gpu": pytest.approx((3 * 100 + 50) * forward / 2 / 4 / 1e12)}
    found = Meter(Architecture.from_hf(HF), ranks=4, frozen=True)(trained=100, scored=50, length=6, seconds=2)
    assert found == {"perf/tflops_per_gpu": pytest.approx((2 * 100 + 50) * forward / 2 / 4 / 1e12)}


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GB200", "gb200"), ("T4", None)],
)
def test_the_share_of_the_peak_is_told_where_the_gpu_is_known(device, name):
    found = Meter(Architecture.from_hf(HF), 1, device)(1e9, 0, 6, 1)
    assert ("perf/mfu" in found) == bool(name)
    if name:
        assert found["perf/mfu"] == pytest.approx(found["perf/tflops_per_gpu"] * 1e12 / MACHINES[name].flops)

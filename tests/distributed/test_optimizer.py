"""The optimizer: what the weight decay reaches, and fused Adams, for which a stand-in counts steps as they do."""

from unittest.mock import patch

import pytest
import torch

from tests.distributed.test_policy import _policy, _rows, logprobs
from tests.distributed_harness import run_distributed
from tests.saved_policy import save_policy
from tests.tiny_models import make_tiny_model

VOCAB = 101
LR, DECAY = 1e-3, 0.1


class FusedAdam(torch.optim.Optimizer):
    """Keeps the state of Transformer Engine's and Apex's fused Adam: it counts steps in the group, from its first step
    on, skips groups without parameters, and creates the moments in a parameter's first step."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable  # Megatron Core 0.19 says that it needs no CUDA graph
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                root = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                p.sub_(group["lr"] * (mean / (root + group["eps"]) + group["weight_decay"] * p))


def _loss(given, row):
    return -logprobs(given, row).sum() / 96, {}


def _steps(policy, count):
    for _ in range(count):
        policy.train_step(_rows(policy.topology.dp_rank, policy.topology.dp_size), _loss)


def _weights(policy):
    weights = {f"student {name}": value.detach().clone() for name, value in policy.shards.parameters.items()}
    with policy.weights("teacher"):
        return weights | {f"teacher {name}": value.detach().clone() for name, value in policy.shards.parameters.items()}


def _fused_policy(model, **sections):
    with (
        patch("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False),
        patch("megatron.core.optimizer.Adam", FusedAdam),
        patch("megatron.core.optimizer.distrib_optimizer.Adam", FusedAdam),
    ):
        policy = _policy(model, {}, "bfloat16", **sections)
    assert all(isinstance(part.optimizer, FusedAdam) for part in policy.optimizer._parts)
    if policy.topology.dp_size > 1:  # fused optimizers never count in a group of which this rank has nothing
        policy.optimizer._parts[0].optimizer.param_groups.append(
            {"params": [], "is_expert_parallel": False, "wd_mult": 0.0}
        )
    return policy


def _save(policy, folder):

    if policy.topology.is_driver:
        folder.mkdir()
    torch.distributed.barrier()
    save_policy(policy, folder)


def straight(model, folder):
    policy = _fused_policy(model)
    _steps(policy, 2)
    _save(policy, folder)
    _steps(policy, 2)
    return policy.optimizer.adam_steps(), _weights(policy)


def resumed(model, folder):
    from megatron_srpo.mcore import checkpoint

    policy = _fused_policy(model)
    checkpoint.load(policy, folder)
    restored = policy.optimizer.adam_steps()
    _steps(policy, 1)
    _save(policy, folder.with_name("second"))  # a next checkpoint asks how many steps there were
    _steps(policy, 1)
    return restored, policy.optimizer.adam_steps(), _weights(policy)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_with_a_fused_adam_resumes_bit_for_bit(tmp_path, ranks):
    model = make_tiny_model(tmp_path / "model", vocab=VOCAB, dtype=torch.bfloat16)
    expected = run_distributed(straight, ranks, model, tmp_path / "first")
    found = run_distributed(resumed, ranks, model, tmp_path / "first")
    for (steps, weights), (restored, resumed_steps, resumed_weights) in zip(expected, found, strict=True):
        assert (steps, restored, resumed_steps) == (4, 2, 4)
        assert weights.keys() == resumed_weights.keys()
        assert all(torch.equal(resumed_weights[name], value) for name, value in weights.items())


def decay_without_gradient(model):
    """Weights before and after a step in which every gradient is exactly zero, without and with the option."""
    from megatron.core import parallel_state

    found = []
    for everywhere in (False, True):
        given = {"lr": LR, "weight_decay": DECAY, "decay_norms_and_biases": everywhere}
        policy = _policy(model, {}, optimizer=given)
        before = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
        assert policy.train_step(_rows(0, 1), lambda given, row: (0 * logprobs(given, row).sum(), {})).grad_norm == 0
        found.append((before, {name: value.detach().clone() for name, value in policy.shards.parameters.items()}))
        parallel_state.destroy_model_parallel()
    return found


def test_weight_decay_reaches_matrices_and_by_an_option_norms_and_biases(tmp_path):
    model = make_tiny_model(tmp_path / "model", "qwen2", tied=False, vocab=VOCAB)
    (found,) = run_distributed(decay_without_gradient, 1, model)
    for everywhere, (before, after) in zip((False, True), found, strict=True):
        spared = {name for name, value in before.items() if value.dim() == 1 and not everywhere}
        assert everywhere or all(any(word in name for name in spared) for word in ("norm", "bias"))
        for name, value in before.items():
            assert torch.equal(after[name], value if name in spared else value * (1 - LR * DECAY)), name


def update_once_per_iteration(model):
    """The EMA teacher moves when the iteration ends, by what the student is then, and only if a step was taken."""
    policy = _policy(model, {}, teacher={"update_every": "iteration", "update_rate": 0.5})

    def weights(which):
        with policy.weights(which):
            return {name: value.detach().clone() for name, value in policy.shards.parameters.items()}

    def bad(given, row):
        return _loss(given, row)[0] * float("nan"), {}

    initial = weights("teacher")
    _steps(policy, 2)
    held = weights("teacher")
    policy.end_iteration()
    moved, student = weights("teacher"), weights("student")
    assert policy.train_step(_rows(0, 1), bad).skipped
    policy.end_iteration()
    kept = weights("teacher")
    for name, start in initial.items():
        assert torch.equal(held[name], start) and torch.equal(kept[name], moved[name]), name
        assert torch.equal(moved[name], start.lerp(student[name], 0.5)), name
    assert any(not torch.equal(moved[name], start) for name, start in initial.items())
    # A "refresh" teacher moves only when it is told to, and is then the student exactly.
    policy._teacher_config = policy._teacher_config.model_copy(update={"mode": "refresh"})
    _steps(policy, 1)
    policy.end_iteration()
    assert all(torch.equal(value, moved[name]) for name, value in weights("teacher").items())
    policy.end_iteration(refresh_teacher=True)
    copied, student = weights("teacher"), weights("student")
    assert all(torch.equal(value, student[name]) for name, value in copied.items())


def learning_rates(model):
    """What the log says of five steps, of which the second is skipped, and how far each of them went."""
    policy = _policy(model, {}, optimizer={"lr": LR, "warmup_steps": 4})
    told, moved = [], []
    for number in range(5):
        before = [value.detach().clone() for value in policy.shards.parameters.values()]
        factor = float("nan") if number == 1 else 1.0
        stats = policy.train_step(_rows(0, 1), lambda given, row, f=factor: (f * _loss(given, row)[0], {}))
        assert stats.skipped is (number == 1)
        told.append(float(stats.metrics["actor/lr"]))
        pairs = zip(before, policy.shards.parameters.values(), strict=True)
        moved.append(max(float((new.detach() - old).abs().max()) for old, new in pairs))
    return told, moved


def test_a_step_takes_the_learning_rate_of_its_number_which_skipped_steps_count_in(tmp_path):
    (found,) = run_distributed(learning_rates, 1, make_tiny_model(tmp_path / "model", vocab=VOCAB))
    told, moved = found
    assert told == pytest.approx([LR / 4, LR / 2, 3 * LR / 4, LR, LR])
    assert moved[0] == pytest.approx(LR / 4, rel=1e-2) and moved[1] == 0.0  # Adam's first step is as long as its rate


def test_a_teacher_that_is_updated_once_per_iteration_waits_for_its_last_step(tmp_path):
    run_distributed(update_once_per_iteration, 1, make_tiny_model(tmp_path / "model", vocab=VOCAB))


def with_and_without_offload(model, folder, make):
    """Two steps, a checkpoint, and two steps after it: all in device memory, all offloaded, and changing at the
    checkpoint, either way."""
    from megatron.core import parallel_state

    from megatron_srpo.mcore import checkpoint

    def run(offload, start=None, end=None):
        policy = make(model, optimizer={"lr": LR, "offload": offload})
        if start:
            checkpoint.load(policy, folder / start)
        _steps(policy, 1)
        with policy.on_host():  # as while engines generate
            pass
        _steps(policy, 1)
        if end:
            _save(policy, folder / end)
        held = [tensor.untyped_storage().nbytes() for tensor in policy.optimizer.tensors() if tensor.dim()]
        whole = [tensor.nbytes for tensor in policy.optimizer.tensors() if tensor.dim()]
        if policy.shards.parameters["embedding.word_embeddings.weight"].dtype == torch.bfloat16:
            assert held == ([0] * len(whole) if offload else whole)
        else:  # main parameters are the model's memory
            assert sum(not bytes for bytes in held) == (len(held) * 2 // 3 if offload else 0)
        weights = _weights(policy)
        for shard in policy.optimizer.shards():
            name = next(n for n, p in policy.shards.parameters.items() if p is shard.parameter)
            with policy.optimizer.present(*(own := [shard.main, *shard.state.values()])):
                weights |= {f"{name} {i}": value.detach().clone() for i, value in enumerate(own)}
        found = policy.optimizer.adam_steps(), weights
        parallel_state.destroy_model_parallel()
        return found

    def same(some, others):
        assert some[0] == others[0] and some[1].keys() == others[1].keys()
        assert all(torch.equal(value, others[1][name]) for name, value in some[1].items())

    with patch("megatron_srpo.mcore.optimizer.PIECE", 40_000):  # several pieces, some with several parameters
        plain, offloaded = run(False, end="plain"), run(True, end="offloaded")
        same(plain, offloaded)
        goes_on = run(False, "plain")
        assert plain[0] == 2 and goes_on[0] == 4
        for offload, start in ((True, "plain"), (False, "offloaded"), (True, "offloaded")):
            same(goes_on, run(offload, start))


def _float32_policy(model, **sections):
    return _policy(model, {}, **sections)


def _bf16_policy(model, **sections):
    return _policy(model, {}, "bfloat16", **sections)


@pytest.mark.parametrize(
    "make", [_bf16_policy, *(pytest.param(make, marks=pytest.mark.slow) for make in (_float32_policy, _fused_policy))]
)
def test_an_optimizer_whose_state_is_in_host_memory_takes_the_same_steps(tmp_path, make):
    model = make_tiny_model(tmp_path / "model", vocab=VOCAB, dtype=torch.bfloat16)
    run_distributed(with_and_without_offload, 2, model, tmp_path, make)

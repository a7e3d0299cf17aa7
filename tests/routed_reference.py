"""One optimizer step's routed objective in plain float64: Hugging Face models on whole sequences, one process.

Written from the formulas (SRPO, arXiv 2604.02288 §2–3) and nothing of the package but its records and settings: no
packing, no masks, no sharding, no second-hand log-probs.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM

NAMES = {
    "pg_loss": "actor/pg_loss",
    "pg_clipfrac": "actor/pg_clipfrac",
    "entropy": "actor/entropy",
    "ppo_kl": "actor/ppo_kl",
    "kl_loss": "actor/kl_loss",
    "gap": "rollout_corr/logprob_diff_mean",
    "kl": "rollout_corr/kl",
    "weight": "rollout_corr/weight",
    "guided_loss": "actor/guided_loss",
    "guided_clipfrac": "actor/guided_clipfrac",
    "guided_advantage": "actor/guided_advantage",
    "teacher_gap": "srpo/teacher_gap",
    "distill_loss": "srpo/distill_loss",
    "distill_ratio": "srpo/distill_ratio",
    "teacher_entropy": "srpo/teacher_entropy",
    "first_token_entropy": "actor/first_token_entropy",
    "teacher_first_token_entropy": "srpo/teacher_first_token_entropy",
}


def load(folder, dtype=torch.float64):
    """A model; in float64 its loss surface is the truth that every layout is compared with."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).eval()


def hub_names(tensors):
    """Tensors of a transformers model under the names that they have on the hub, where every expert has its own."""
    named = {}
    for name, tensor in tensors.items():
        prefix, fused, kind = name.partition("experts.")
        if not fused:
            named[name] = tensor
            continue
        for expert, own in enumerate(tensor):
            parts = (
                dict(zip(("gate_proj", "up_proj"), own.chunk(2), strict=True))
                if kind == "gate_up_proj"
                else {kind: own}
            )
            named |= {f"{prefix}experts.{expert}.{part}.weight": value for part, value in parts.items()}
    return named


def put_weights(model, weights):
    """Load tensors with the hub's names into a transformers model."""
    with torch.no_grad():
        for name, target in hub_names(dict(model.named_parameters())).items():
            target.copy_(weights[name])
    model.tie_weights()


def count_choices(model):
    """Per layer with experts: a list that gets, with every forward pass, how many tokens each expert got [E]."""
    counts = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            found = counts[name] = []
            module.register_forward_hook(
                lambda router, _, out, found=found: found.append(
                    out[2].flatten().bincount(minlength=router.num_experts)
                )
            )
    return counts


class FixedChoice:
    """The routers of a model, which can be told whom to choose: `given` is [tokens, layers with experts, K], −1 for a
    token that chooses itself, or None. `made` is what they would have chosen in the last pass, in the same form."""

    def __init__(self, model):
        self.given, self.made = None, None
        routers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
        for number, router in enumerate(routers):
            router.forward = functools.partial(self._choose, router, number, len(routers))

    def _choose(self, router, number, count, hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
        shares = logits.float().softmax(-1) if logits.dtype != torch.float64 else logits.softmax(-1)
        own = shares.topk(router.top_k, -1).indices
        if number == 0:
            self.made = torch.full((len(own), count, router.top_k), -1)
        self.made[:, number] = own
        chosen = own if self.given is None else torch.where(self.given[:, number] < 0, own, self.given[:, number])
        values = shares.gather(1, chosen)
        if router.norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        return logits, values.to(logits.dtype), chosen


def stream_logprobs(model, stream, temperature):
    """[R, V] log-probs of the distributions that the trained tokens of a sequence were drawn from."""
    before = [len(stream.prompt_ids) + i - 1 for i, trained in enumerate(stream.trained) if trained]
    logits = model(torch.tensor([[*stream.prompt_ids, *stream.response_ids]])).logits[0, before].double()
    return (logits / temperature).log_softmax(-1)


def per_token(value, length):
    """A number for every token, or one for each, as float64 [R]; what the rows carry is fp32."""
    return torch.tensor(np.broadcast_to(np.asarray(value, dtype=np.float32), length).copy()).double()


def divergence(logp, logq, alpha):
    """Per position: KL(q‖p), KL(p‖q), or α·KL(q‖m) + (1−α)·KL(p‖m) with m = (1−α)p + αq."""
    p, q = logp.exp(), logq.exp()
    if alpha == 0:
        return (q * (logq - logp)).sum(-1)
    if alpha == 1:
        return (p * (logp - logq)).sum(-1)
    logm = ((1 - alpha) * p + alpha * q).log()
    return alpha * (q * (logq - logm)).sum(-1) + (1 - alpha) * (p * (logp - logm)).sum(-1)


def reduced(logp, ids, tail):
    """The distribution on the K ids and the rest, or renormalised over the ids."""
    kept = logp.gather(1, ids)
    if not tail:
        return kept.log_softmax(-1)
    return torch.cat([kept, (1 - kept.exp().sum(-1, keepdim=True)).log()], -1)


def guided_advantage(a, advantage, gap, contrast):
    """Â_t of the methods that turn the teacher's log-probs into credit, from their papers' formulas."""
    if a.name == "rlsd":
        factor = [min(max(math.exp(math.copysign(1, advantage) * g), 1 - a.token_credit_clip), 1 + a.token_credit_clip)
                  for g in gap.tolist()]  # fmt: skip
        return advantage * torch.tensor(factor).double()
    if a.name == "contrastive":
        return (gap - contrast) / 2
    assert a.name == "drift"
    bonus = [min(max(math.exp(a.bonus_rate * max(-g - 0.2, 0)), 1), 2) for g in gap.tolist()]
    return advantage * (torch.tensor(bonus).double() - 1)


class Reference:
    """The objective of one iteration: `behaviour` made the samples' old log-probs, `teacher` judges them."""

    def __init__(self, config, behaviour, teacher, reference):
        self.a, self.temperature = config.algorithm, config.rollout.temperature
        self.behaviour, self.teacher, self.reference = behaviour, teacher, reference
        self.chosen, self.chooser = None, behaviour  # the model whose top-k counts
        self.trust = config.teacher.update_rate if config.teacher.mode == "trust_region" else 0.0
        self.replay, self.replay_teacher = None, config.teacher.routing_replay

    def choose(self, ids, slack):
        """Take top-k ids as they are given: (group, sample) → [R, K]; none may be `slack` nats below the k-th."""
        self.chosen, self.slack = ids, slack

    def fix_experts(self, student, mode, *, moved):
        """Replay the engine's experts ("rollout"), or, once the student has moved, those that the behaviour policy
        chooses ("old"). `differences` then counts [of router decisions, all of them, of tokens, all of them]."""
        self.replay = mode if mode == "rollout" or moved else None
        self.choices = {m: FixedChoice(m) for m in {student, self.behaviour, self.teacher, self.reference}}
        self.student, self.differences = student, torch.zeros(4)

    def _given(self, model, stream, sample):
        """The experts [tokens, layers, K] that a pass of `model` over a stream of the sample is told, or None."""
        by_student = model is self.student or model is self.behaviour
        if stream is sample.student and by_student:
            if self.replay == "old":
                if model is self.behaviour:
                    return None
                with torch.no_grad():
                    self.choices[self.behaviour].given = None
                    self._pass(self.behaviour, stream)
                return self.choices[self.behaviour].made
            known = torch.from_numpy(sample.experts.astype(np.int64))
            return torch.cat([known, torch.full_like(known[:1], -1)])
        if not self.replay_teacher:
            return None
        own = torch.from_numpy(sample.experts[len(sample.student.prompt_ids) :].astype(np.int64))
        free = own.new_full((1, *sample.experts.shape[1:]), -1)
        before = sample.experts[: len(stream.prompt_ids)] if stream is sample.student else None
        prompt = free.expand(len(stream.prompt_ids), -1, -1) if before is None else torch.from_numpy(before).long()
        return torch.cat([prompt, own, free])

    def _topk(self, sample):
        with torch.no_grad():
            behaviour = self._logp(self.chooser, sample.student, sample)
        top = behaviour.topk(self.a.distillation_topk, -1)
        if self.chosen is None:
            return top.indices
        ids = self.chosen[sample.uid, sample.sample]
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        below = float((top.values[:, -1:] - behaviour.gather(1, ids)).max())
        assert below <= self.slack, f"{sample.uid}: an id {below} nats below the k-th was chosen"
        return ids

    def _pass(self, model, stream):
        return stream_logprobs(model, stream, self.temperature)

    def _logp(self, model, stream, sample):
        if self.replay is None:
            return self._pass(model, stream)
        choice = self.choices[model]
        given = self._given(model, stream, sample)
        choice.given = given
        found = self._pass(model, stream)
        choice.given = None
        if model is self.student and torch.is_grad_enabled():
            known = given[:, :, 0] >= 0
            differs = (given.sort(-1).values != choice.made.sort(-1).values).any(-1) & known
            self.differences += torch.tensor([differs.sum(), known.sum(), differs.any(1).sum(), known.any(1).sum()])
        return found

    def _taught(self, stream, sample):
        """The teacher's log-probs of a stream."""
        found = self._logp(self.teacher, stream, sample)
        if self.trust:  # the lerp of the logits; their normalisers make no difference to the softmax
            own = self._logp(self.behaviour, stream, sample)
            found = ((1 - self.trust) * found + self.trust * own).log_softmax(-1)
        return found

    @torch.no_grad()
    def _correction(self, old, sample):
        ratio = (old - torch.tensor(sample.rollout_logprobs, dtype=torch.float32).double()).exp()
        mode, cap = self.a.rollout_correction, self.a.rollout_correction_cap
        if mode == "off":
            return torch.ones_like(ratio)
        if mode == "mask":
            return ratio * (ratio <= cap)
        if mode == "sequence_mask" and abs(ratio.log().mean()) > math.log(cap):
            return torch.zeros_like(ratio)
        return ratio.clamp(max=cap)

    def _policy_term(self, at, old, advantage, moved):
        a = self.a
        log_ratio = at - (old if moved else at.detach())
        rho = (log_ratio.mean() if a.importance_ratio == "sequence" else log_ratio).exp().expand(len(at))
        clipped = rho.clamp(1 - a.clip_ratio_low, 1 + a.clip_ratio_high)
        gain = torch.minimum(rho * advantage, clipped * advantage)
        if a.dual_clip:
            gain = torch.where(advantage < 0, torch.maximum(gain, a.dual_clip * advantage), gain)
        return -gain, (clipped * advantage < rho * advantage).double()

    def step(self, student, samples, *, loss_tokens, responses, moved):
        """(loss, metrics); call `.backward()` on the loss. `moved`: `student` is no longer `behaviour`. Samples whose
        loss is zero for all weights may be missing; `loss_tokens` and `responses` count theirs too."""
        a = self.a
        per_response = a.loss_aggregation == "seq-mean-token-mean"
        counted = [s for s in samples if any(np.any(weight) for weight in s.weights.values())]
        means = {name: [0.0, 0.0] for name in NAMES}
        taught = {}  # by position in `counted`: teacher log-probs
        with torch.no_grad():
            for i, s in enumerate(counted):
                if {"distill", "guided"} & set(s.weights):
                    taught[i] = self._taught(s.teacher, s)
        entropies = {i: -(logq.exp() * logq).sum(-1) for i, logq in taught.items()}
        entropies = {i: h for i, h in entropies.items() if "distill" in counted[i].weights}
        distilled = {i: per_token(counted[i].weights["distill"], len(h)) for i, h in entropies.items()}
        weights = {i: (-a.beta * h).exp() for i, h in entropies.items()}
        omega = sum(int((d > 0).sum()) for d in distilled.values())
        mean = sum(float(w[distilled[i] > 0].sum()) for i, w in weights.items()) / omega if omega else 1.0
        total, tops = sum(p.sum() for p in student.parameters()) * 0, {"gap": 0.0, "distill_weight": 0.0}

        def log(name, values, over=None):
            over = torch.ones_like(values.detach()) if over is None else over
            means[name][0] += float((values.detach() * over).sum())
            means[name][1] += float(over.sum())

        for i, s in enumerate(counted):
            ids = torch.tensor([t for t, on in zip(s.student.response_ids, s.student.trained, strict=True) if on])
            weight = {name: per_token(value, len(ids)) for name, value in s.weights.items()}
            if per_response:
                weight = {name: value / len(ids) for name, value in weight.items()}
            nothing = torch.zeros(len(ids)).double()
            logp = self._logp(student, s.student, s)
            at = logp.gather(1, ids[:, None])[:, 0]
            with torch.no_grad():
                behaviour = self._logp(self.behaviour, s.student, s)
            old = behaviour.gather(1, ids[:, None])[:, 0]
            r = self._correction(old, s)
            gain, clipped = self._policy_term(at, old, per_token(s.advantage, len(at)), moved)
            entropy = -(logp.exp() * logp).sum(-1)
            total = total + (weight.get("policy", nothing) * r * gain).sum()
            total = total - (weight.get("entropy", nothing) * entropy).sum()
            if a.kl_loss_coef:
                with torch.no_grad():
                    ref = self._logp(self.reference, s.student, s)
                gap = ref.gather(1, ids[:, None])[:, 0] - at
                total = total + (weight.get("kl", nothing) * (gap.exp() - 1 - gap)).sum()
                log("kl_loss", gap.exp() - 1 - gap)
            rollout = torch.tensor(s.rollout_logprobs, dtype=torch.float32).double()
            on_policy = (weight.get("policy", nothing) > 0).double()
            log("pg_loss", gain, on_policy)
            log("pg_clipfrac", clipped, on_policy)
            log("entropy", entropy)
            log("first_token_entropy", entropy[:1])
            log("ppo_kl", old - at)
            log("gap", (old - rollout).abs())
            log("kl", rollout - old)
            log("weight", r)
            tops["gap"] = max(tops["gap"], float((old - rollout).abs().max()))
            if "guided" in s.weights:
                gap, contrast = taught[i].gather(1, ids[:, None])[:, 0] - old, None
                if s.contrast is not None:
                    with torch.no_grad():
                        contrast = self._taught(s.contrast, s).gather(1, ids[:, None])[:, 0] - old
                tokens = guided_advantage(a, s.advantage, gap, contrast)
                guided, edge = self._policy_term(at, old, tokens, moved)
                total = total + (weight["guided"] * r * guided).sum()
                log("guided_loss", guided)
                log("guided_clipfrac", edge)
                log("guided_advantage", tokens)
                log("teacher_gap", gap)
            if "distill" in s.weights:
                p, q = logp, taught[i]
                if a.distillation_topk:
                    top = self._topk(s)
                    p, q = reduced(p, top, a.distillation_tail), reduced(q, top, a.distillation_tail)
                d = divergence(p, q, a.divergence_alpha)
                ratio = torch.ones_like(at)
                if moved and a.distill_ratio_clip:
                    ratio = (at.detach() - old).exp().clamp(max=a.distill_ratio_clip)
                w, on = weights[i] / mean, (distilled[i] > 0).double()
                if a.name == "demopsd":
                    m = (p.exp() + q.exp()) / 2
                    jsd = ((p.exp() * (p - m.log())).sum(-1) + (q.exp() * (q - m.log())).sum(-1)).detach() / 2
                    w = w * (1 - 2 * a.damping_max * (1 / (1 + (-a.damping_rate * jsd).exp()) - 0.5))
                total = total + (weight["distill"] * w * ratio * r * d).sum()
                log("distill_loss", d, on)
                log("distill_ratio", ratio, on)
                log("teacher_entropy", entropies[i], on)
                log("teacher_first_token_entropy", entropies[i][:1], on[:1])
                tops["distill_weight"] = max(tops["distill_weight"], float((w * on).max()))
        loss = total / (responses if per_response else loss_tokens)
        return loss, self._named(means, tops, float(loss.detach()))

    @staticmethod
    def _named(means, tops, loss):
        metrics = {NAMES[name]: total / count for name, (total, count) in means.items() if count}
        metrics["rollout_corr/logprob_diff_max"] = tops["gap"]
        if "srpo/distill_loss" in metrics:
            metrics["srpo/distill_weight_max"] = tops["distill_weight"]
        return metrics | {"actor/loss": loss}

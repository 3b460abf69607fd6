"""Reinforcement learning with verifiable rewards: answers are sampled, checked and compared within their group, and the
policy moves toward what did better, held to a frozen reference, beside replayed rows.

A step's loss is the mean over its answers of the clipped policy-gradient loss plus `kl` times an estimate of the KL to
the reference, plus `replay_weight` times the cross-entropy of the replayed rows, plus the anchor.
"""

# N counted positions, S answers

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow, Item, encode_prompts
from evertune.model.adapter import concatenate, read_factors, save_new, write_adapter
from evertune.model.codec import Codec
from evertune.model.forward import Forward
from evertune.model.open import OpenModel
from evertune.train.adapt import Ask
from evertune.train.batch import collate, counted_positions
from evertune.train.episodes import Answer, play_episodes
from evertune.train.head import target_log_probabilities
from evertune.train.loop import Feed, wait_for_all
from evertune.train.losses import clipped_surrogate, sampled_kl
from evertune.train.material import Material, load_material
from evertune.train.objective import Objective, Policy, StepCounts, backward_beside_replay
from evertune.train.penalty import Penalty
from evertune.train.reference import LiveReference
from evertune.train.rollout import Check, EncodedAnswer, RolloutFeed, RolloutSettings
from evertune.train.sample import SampledAnswer, sample_answers
from evertune.train.served import ServedPolicy, Server
from evertune.train.sink import Metrics
from evertune.train.spec import RlSpec
from evertune.train.stage import Lesson, Setting, gatherer, mean_of, run_training
from evertune.workspace import Workspace

# What the last steps are compared with when a stage ends: its first ones.
FIRST_STEPS = 10
FINAL = ("reward", "policy_kl", "entropy", "length", "stopped", "repeats", "flat", "clipped", "replay_loss")
# Alarms: how far answers may drift in length, and what share of them may loop or never end, before a person is told.
LENGTH_FACTOR, REPEATS, STOPPED_DROP = 2.0, 0.3, 0.2


def run_rl(spec: RlSpec, workspace: Workspace, check: Check, *, ask: Ask | None = None) -> dict[str, Any]:
    """Train one rl stage and publish it; see `run_training`.

    Args:
        check: the sources' verifiers.
        ask: scores guards of the model in training.
    """
    return run_training(spec, workspace, _Rewarded(spec, check), ask=ask)


class Multipliers:
    """Lagrange multipliers of the protected sources: each answers to maximising the reward of the others subject to its
    own mean reward being `at_least` a floor.

    From step to step, lambda <- min(most, max(0, lambda + rate (at_least - mean reward))), from 1 on: a function of the
    metrics of the steps before.
    """

    def __init__(self, protect: Mapping[str, Mapping[str, float]]) -> None:
        self._protect = protect
        self.values = dict.fromkeys(protect, 1.0)

    def of(self, source: str) -> float:
        return self.values.get(source, 1.0)

    def observe(self, metrics: Metrics) -> Metrics:
        """Move on after a step; returns the multipliers of the next one. A source without an answer in it stays."""
        for name, one in self._protect.items():
            reward = metrics.get(f"reward/{name}")
            if reward is not None:
                moved = self.values[name] + one["rate"] * (one["at_least"] - reward)
                self.values[name] = min(one["most"], max(0.0, moved))
        return {f"multiplier/{name}": value for name, value in self.values.items()}


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of an rl stage."""

    spec: RlSpec
    multipliers: Multipliers = field(default_factory=lambda: Multipliers({}))

    def divisors(self, items: Sequence[Item]) -> dict[str, int]:
        answers = [item for item in items if isinstance(item, EncodedAnswer)]
        tokens = sum(counted_positions(one.row) for one in answers)
        known = [one for one in answers if not math.isnan(one.reward)]
        return {
            "loss": tokens if self.spec.average == "tokens" else len(answers),
            "policy_kl": tokens if self.spec.kl else 0,
            "entropy": tokens,
            "clipped": tokens,
            "length": len(answers),
            "stopped": len(answers),
            "repeats": len(answers),
            "flat": len(answers),
            "verifier_errors": len(answers),
            "reward": len(known),
            **{name: sum(one.source == source for one in known) for name, source, _ in reward_names(self.spec)},
            "replay_loss": sum(counted_positions(row) for item in items if item.is_replay for row in item.rows),
        }

    def backward(
        self, policy: Policy, items: Sequence[Item], counts: StepCounts, penalties: Sequence[Penalty]
    ) -> Tensor:
        answers = [item for item in items if isinstance(item, EncodedAnswer)]
        replayed = [row for item in items if item.is_replay for row in item.rows]

        def judge(hidden_NH: Tensor, targets_N: Tensor, sums: dict[str, Tensor]) -> Tensor:
            logp_N = target_log_probabilities(hidden_NH, targets_N, head=policy.head, temperature=self.spec.temperature)
            return self._answers_loss(logp_N, answers, counts, sums)

        spoken = [answer.row for answer in answers]
        weight = self.spec.replay_weight
        return backward_beside_replay(policy, spoken, replayed, counts, penalties, replay_weight=weight, judge=judge)

    def _answers_loss(
        self, logp_N: Tensor, answers: Sequence[EncodedAnswer], counts: StepCounts, sums: dict[str, Tensor]
    ) -> Tensor:
        """The answers' part of the step's loss, with gradient; their sums are written into `sums`."""
        spec, device = self.spec, logp_N.device
        lengths_S = torch.tensor([counted_positions(one.row) for one in answers], device=device)
        answer_N = torch.arange(len(answers), device=device).repeat_interleave(lengths_S)
        advantages = [self.multipliers.of(one.source) * one.advantage for one in answers]
        advantages_N = torch.tensor(advantages, device=device)[answer_N]
        old_N = (
            logp_N.detach() if answers[0].old_logp_N is None else _joined([one.old_logp_N for one in answers], device)
        )
        token_log_ratio_N = log_ratio_N = logp_N - old_N
        if spec.ratio == "sequence":
            log_ratio_N = _means_of(log_ratio_N, answer_N, lengths_S)[answer_N]
        loss_N = clipped_surrogate(log_ratio_N, advantages_N, clip_low=spec.clip_low, clip_high=spec.clip_high)
        found = {"entropy": -logp_N.sum(), "clipped": _clipped(log_ratio_N, advantages_N, spec).sum()}
        if spec.kl:
            kl_N = sampled_kl(logp_N, _joined([one.ref_logp_N for one in answers], device))
            found["policy_kl"] = kl_N.sum()
            # The ratio is 1 on policy, and even there its gradient is what makes the penalty's unbiased.
            loss_N = loss_N + spec.kl * token_log_ratio_N.exp() * kl_N
        weight_N = {
            "answers": 1.0 / lengths_S[answer_N],
            "tokens": torch.ones_like(loss_N),
            "constant": torch.full_like(loss_N, 1.0 / spec.max_new_tokens),
        }[spec.average]
        found["loss"] = (loss_N * weight_N).sum()
        sums.update({name: one.detach().float() for name, one in found.items()})
        sums.update({name: torch.tensor(one, device=device) for name, one in _plain_sums(answers, spec).items()})
        return found["loss"] / counts.divisors["loss"]


def reward_names(spec: RlSpec) -> list[tuple[str, str, str | None]]:
    """Metrics of the rewards: name, source, and the part of the source's verifier, None for the whole."""
    found: list[tuple[str, str, str | None]] = []
    for source, verifier in spec.verifiers.items():
        found.append((f"reward/{source}", source, None))
        found += [(f"reward/{source}/{part}", source, part) for part in verifier.get("parts", ())]
    return found


def _plain_sums(answers: Sequence[EncodedAnswer], spec: RlSpec) -> dict[str, float]:
    """Sums of what is known of the answers beside their likelihood."""
    known = [one for one in answers if not math.isnan(one.reward)]
    by_source = {
        name: math.fsum(one.reward if part is None else one.parts[part] for one in known if one.source == source)
        for name, source, part in reward_names(spec)
    }
    return {
        "length": float(sum(counted_positions(one.row) for one in answers)),
        "stopped": float(sum(one.stopped for one in answers)),
        "repeats": math.fsum(one.repeats for one in answers),
        "flat": float(sum(one.is_flat for one in answers)),
        "verifier_errors": float(len(answers) - len(known)),
        "reward": math.fsum(one.reward for one in known),
        **by_source,
    }


def _clipped(log_ratio_N: Tensor, advantages_N: Tensor, spec: RlSpec) -> Tensor:
    """1 where clipping has taken a token's gradient away."""
    ratio_N = log_ratio_N.detach().exp()
    low_N = (ratio_N < 1.0 - spec.clip_low) & (advantages_N < 0)
    high_N = (ratio_N > 1.0 + spec.clip_high) & (advantages_N > 0)
    return (low_N | high_N).float()


def _means_of(values_N: Tensor, answer_N: Tensor, lengths_S: Tensor) -> Tensor:
    return values_N.new_zeros(len(lengths_S)).index_add(0, answer_N, values_N) / lengths_S


def _joined(parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
    return torch.cat([one for one in parts if one is not None]).to(device)


class _Rewarded(Lesson):
    can_compare = False  # before an answer is there, nothing has a gradient

    def __init__(self, spec: RlSpec, check: Check) -> None:
        self._spec, self._check = spec, check
        self._multipliers = Multipliers(spec.protect)
        self.replay_ratio = spec.replay_ratio

    def load(self, codec: Codec, *, world_size: int) -> Material:
        """Prompts and replayed rows; the stream is as long as the rollouts need."""
        spec = self._spec
        material = load_material(spec, codec, world_size=world_size, encode=encode_prompts)
        if spec.steps is None:
            return replace(material, steps=-(-material.steps // spec.rollout_steps) * spec.rollout_steps)
        whole, rest = divmod(spec.steps, spec.rollout_steps * spec.iterations)
        return replace(material, steps=whole * spec.rollout_steps + min(rest, spec.rollout_steps))

    def objective(self, setting: Setting) -> Objective:
        return PolicyGradient(self._spec, self._multipliers)

    def feed(self, setting: Setting, policy: Policy) -> Feed:
        """Rollouts by the policy itself."""
        spec, opened = self._spec, setting.opened
        live = setting.source(spec.kl_to).live() if spec.kl else None
        size = setting.material.micro_batch_rows
        settings = RolloutSettings(
            group=spec.group,
            steps=spec.rollout_steps,
            iterations=spec.iterations,
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            scale=spec.scale,
            seed=spec.seed,
        )

        answer = self._served(setting) if spec.server is not None else partial(_sampled, policy, opened, spec)
        return RolloutFeed(
            setting.material,
            settings,
            steps=spec.steps or setting.material.steps * spec.iterations,
            answer=answer,
            play=partial(
                play_episodes,
                answer,
                codec=opened.codec,
                max_steps=spec.max_steps,
                max_new_tokens=spec.max_new_tokens,
                context=Forward(opened).max_tokens,
            ),
            stop_ids=opened.codec.stop_ids,
            decode=opened.codec.decode,
            check=self._check,
            old=partial(_policy_logp, policy, spec.temperature, size) if settings.optimizer_steps > 1 else None,
            reference=partial(_reference_logp, live, spec.temperature, size) if live else None,
            gather=gatherer(setting),
            rank=setting.accelerator.process_index,
        )

    def _served(self, setting: Setting) -> Answer:
        """Answers by the server, which must be there before anything is trained."""
        spec, opened, accelerator = self._spec, setting.opened, setting.accelerator
        assert spec.server is not None and spec.is_lora, "a server takes adapters"

        def write(folder: Path) -> None:
            with tempfile.TemporaryDirectory(dir=setting.workspace.tmp) as own:
                save_new(opened, Path(own), spec.start)
                stack = [*(read_factors(one.path) for one in spec.start.stack[1:]), read_factors(Path(own))]
            write_adapter(concatenate(stack), folder, spec.start.base)

        served = ServedPolicy(
            Server(**spec.server),
            write=write,
            folder=setting.workspace.tmp,
            name=f"evertune-{spec.key[:12]}",
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            stop_ids=opened.codec.stop_ids,
            is_main=accelerator.is_main_process,
            wait=partial(wait_for_all, accelerator),
        )
        served.check()
        return served.answer

    def observe(self, metrics: Metrics) -> Metrics:
        return self._multipliers.observe(metrics)

    def methods(self) -> dict[str, bool]:
        return {
            "rlvr": True,
            "verifier_constraint": bool(self._spec.protect),
            "kl_ref_rl": self._spec.kl > 0.0,
            "ppo_ptx": bool(self._spec.replay) and self._spec.replay_weight > 0.0,
        }

    def final(self, last: Sequence[Metrics]) -> dict[str, float]:
        names = [*FINAL, "replay_weight", *(name for name, _, _ in reward_names(self._spec))]
        names += [f"multiplier/{name}" for name in self._spec.protect]
        return {name: mean_of(last, name) for name in names if any(name in one for one in last)}

    def brake(self, metrics: Metrics) -> str | None:
        """The stage's budget of drift: a bound on the KL to the reference, and a floor of the entropy."""
        if "entropy" not in metrics:  # a step of replayed rows alone
            return None
        most, least = self._spec.max_kl, self._spec.min_entropy
        if most is not None and metrics["policy_kl"] > most:
            return f"the KL to the reference is {metrics['policy_kl']:.4f} nats per token, above max_kl {most:g}."
        if least is not None and metrics["entropy"] < least:
            return f"the entropy is {metrics['entropy']:.4f} nats per token, below min_entropy {least:g}."
        return None

    def warnings(self, first: Sequence[Metrics], last: Sequence[Metrics]) -> list[dict[str, str]]:
        return reward_alarms(first, last)


def reward_alarms(first: Sequence[Metrics], last: Sequence[Metrics]) -> list[dict[str, str]]:
    """Ways in which a reward can rise for the wrong reason, and a verifier that has failed.

    Args:
        first, last: metrics of the first and of the last steps of a stage.
    """
    before, after = (
        {name: mean_of(steps, name) for name in ("length", "repeats", "stopped", "verifier_errors")}
        for steps in (first, last)
    )
    found = []
    if after["length"] > LENGTH_FACTOR * before["length"] or before["length"] > LENGTH_FACTOR * after["length"]:
        found.append(
            ("answer_length", f"answers had {before['length']:.0f} tokens at first and {after['length']:.0f} at last")
        )
    if after["repeats"] > max(REPEATS, 2.0 * before["repeats"]):
        found.append(
            ("answer_repetition", f"{after['repeats']:.0%} of the answers' runs of four tokens repeat earlier ones")
        )
    if after["stopped"] < before["stopped"] - STOPPED_DROP:
        found.append(
            (
                "answer_end",
                f"{before['stopped']:.0%} of the answers ended by themselves at first, {after['stopped']:.0%} at last",
            )
        )
    if max(before["verifier_errors"], after["verifier_errors"]):
        share = max(before["verifier_errors"], after["verifier_errors"])
        found.append(
            ("verifier_errors", f"the verifier failed on up to {share:.1%} of the answers; they got no reward")
        )
    return [{"name": name, "text": f"{text}. Read some answers before you trust the reward."} for name, text in found]


def _sampled(
    policy: Policy, opened: OpenModel, spec: RlSpec, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]
) -> list[list[SampledAnswer]]:
    """Answers by the policy in memory."""
    policy.model.eval()
    return sample_answers(
        Forward(opened),
        prompts,
        seeds=seeds,
        max_new_tokens=spec.max_new_tokens,
        temperature=spec.temperature,
        stop_ids=opened.codec.stop_ids,
    )


@torch.no_grad()
def _policy_logp(policy: Policy, temperature: float, size: int, rows: Sequence[EncodedRow]) -> list[Tensor]:
    """Log-probabilities under the policy as it is, without dropout, by rows of about one length."""
    policy.model.eval()

    def of(some: Sequence[EncodedRow]) -> Tensor:
        batch = collate(some, pad_id=policy.pad_id, device=policy.device)
        hidden_NH = policy.counted_hidden(batch)
        return target_log_probabilities(hidden_NH, batch.targets_N, head=policy.head, temperature=temperature)

    return _by_length(rows, size, of)


@torch.no_grad()
def _reference_logp(live: LiveReference, temperature: float, size: int, rows: Sequence[EncodedRow]) -> list[Tensor]:
    """The same under the reference."""

    def of(some: Sequence[EncodedRow]) -> Tensor:
        targets_N = torch.cat([torch.from_numpy(row.ids[1:][row.counted[1:]]).long() for row in some])
        device = live.head.weight_VH.device
        return target_log_probabilities(
            live.hidden(some), targets_N.to(device), head=live.head, temperature=temperature
        )

    return _by_length(rows, size, of)


def _by_length(rows: Sequence[EncodedRow], size: int, of: Callable[[Sequence[EncodedRow]], Tensor]) -> list[Tensor]:
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        values = of([rows[i] for i in chosen]).split([counted_positions(rows[i]) for i in chosen])
        found.update(zip(chosen, (one.cpu() for one in values), strict=True))
    return [found[i] for i in range(len(rows))]

"""The one training loop: draw, weigh, follow the gradient, and move the proposal."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmgen import divergences, log_weights, runs
from dmgen.ebm import EBM
from dmgen.metrics.evaluate import evaluate
from dmgen.models.base import Samples, stream
from dmgen.samplers.config import TrainerConfig
from dmgen.samplers.objectives import advantage, inclusion_probabilities, systematic_sample
from dmgen.samplers.z_pool import ZPool

# A one-sided 95 % test: the policy must be closer to the target than the proposal is by this many
# standard errors, on at least this effective number of texts.
_CLOSER = 1.645
_MIN_ESS = 20.0
# Texts in one forward and backward pass unless the user says otherwise.
_MICRO_BATCH = 64


class Trainer:
    """Fits `policy` to `target` by `∇ = E_q[A ∇log π]`; the methods differ in A and in q.

    Args:
        policy: the model to train, usually `base.copy()`; it is changed in place.
        target: the distribution to match.
        config: settings of the run.
        proposal: the model to draw from at first; None takes the target's base (off-policy) or
            the policy itself.

    Raises:
        ValueError: the policy has nothing to train, or is the target's own base.
    """

    method: ClassVar[str]
    default_proposal_rule: ClassVar[str]

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        proposal: Any = None,
    ) -> None:
        self.policy, self.target = policy, target
        self.config = config = config or TrainerConfig()
        self.proposal_rule = config.proposal_rule or self.default_proposal_rule
        trainable = [p for p in policy.parameters() if p.requires_grad]
        if not trainable or policy is target.base:
            raise ValueError("the policy has no trainable weights: use policy = base.copy()")
        if self.proposal_rule == "policy" and proposal is not None:
            raise ValueError('proposal_rule "policy" draws from the policy: give no proposal')
        self.proposal: Any = proposal or (policy if self.proposal_rule == "policy" else target.base)
        self.optimizer = _optimizer(config, trainable)
        self.generator = stream("train", config.seed)
        self.step = 0
        self.n_drawn = 0
        self.seconds = 0.0
        self.z = ZPool.from_score(target.log_z)
        self.average: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] | None = None
        # (log-weights, log π − log q) of the texts drawn since the proposal was last replaced.
        self._since_change: list[Tensor] = []
        self.history: list[dict[str, Any]] = []

    def train(self, n_steps: int, out: str | Path | None = None) -> pd.DataFrame:
        """Takes `n_steps` more steps and returns the history of all so far, a row a step.

        With `out`, metrics, evaluations and checkpoints go there, the last one where it ends;
        `resume(out)` goes on from it. A run that is interrupted goes on from the last checkpoint
        that `checkpoint_every` wrote.

        Raises:
            ValueError: `out` holds another run.
            FloatingPointError: a gradient is not finite; names the step. The policy and the last
                checkpoint are untouched.
        """
        folder = None if out is None else Path(out)
        if folder is not None:
            runs.open_run(folder, expected_step=self.step)
        if self._last is not None:
            self.policy.load_state_dict(self._last)
            self._last = None
        bar = tqdm(total=n_steps, desc=type(self).__name__, unit="step", disable=None)
        try:
            for _ in range(n_steps):
                row = self._step()
                self.history.append(row)
                if folder is not None:
                    self._record(folder, row)
                bar.set_postfix_str(_facts(row), refresh=False)
                bar.update()
        finally:
            bar.close()
        if folder is not None:
            self.save_checkpoint(folder)
        if self.average is not None:
            self._last = {k: v.clone() for k, v in self.policy.state_dict().items()}
            self.policy.load_state_dict(self.average)
        return pd.DataFrame(self.history)

    def _step(self) -> dict[str, Any]:
        """One step: draw, weigh, backward, update, test the proposal; a row of metrics."""
        started = time.monotonic()
        from_fit = self._takes_from_fit()
        samples, base_log_prob = self._draw(from_fit)
        # log q is what was recorded while drawing; it is never computed again.
        log_proposal = samples.log_prob
        log_score = self.target.log_score(samples, base_log_prob=base_log_prob)
        log_w = log_score - log_proposal
        # The batch's own weights would bias its gradient, so it counts for Z from the next step
        # on, unless nothing else is known.
        z = self.z if self.z.n_hits else self.z.add(log_w)
        if not from_fit:  # the pool began with the texts of the fit: they are counted already
            self.z = self.z.add(log_w)
        log_policy = self._known_log_policy(samples, from_fit)
        if z.n_hits:
            log_policy, a = self._backward(samples, log_score, log_policy, z.log_z)
            self._update()
        else:
            log_policy = self.policy.log_prob(samples) if log_policy is None else log_policy
            a = torch.zeros_like(log_score)
        self.step += 1
        self.n_drawn += len(samples)
        moved = self._move_proposal(log_w, log_policy - log_proposal)
        self.seconds += time.monotonic() - started
        return self._row(samples, log_score, log_policy, a, moved)

    def _takes_from_fit(self) -> bool:
        """Whether this step's texts are some of those that λ was fitted on."""
        given, end = self.target.fit_samples, (self.step + 1) * self.config.batch_size
        return self.config.first_batches_from_fit and given is not None and end <= len(given)

    def _draw(self, from_fit: bool) -> tuple[Samples, Tensor | None]:
        """The texts of this step, and their log-probability under the base where it is known."""
        size, given = self.config.batch_size, self.target.fit_samples
        if from_fit and given is not None:
            samples = given[self.step * size : (self.step + 1) * size]
            return samples, samples.log_prob
        samples = self.proposal.sample(
            size,
            prompt=self.target.prompt,
            max_new_tokens=self.target.max_new_tokens,
            generator=self.generator,
        )
        return samples, samples.log_prob if self.proposal is self.target.base else None

    def _known_log_policy(self, samples: Samples, from_fit: bool) -> Tensor | None:
        """log π of each text if it is recorded or needed early; None leaves it to `_backward`."""
        if self.proposal is self.policy and not from_fit:
            return samples.log_prob
        # Which texts are worth a backward pass depends on the log π of all of them.
        return self.policy.log_prob(samples) if self.config.backward_size else None

    def _backward(
        self, samples: Samples, log_score: Tensor, log_policy: Tensor | None, log_z: float
    ) -> tuple[Tensor, Tensor]:
        """Sets the gradient of `−mean(A log π)`; log π and A of each text, `(N,)`, detached.

        Where `log_policy` is None, the π inside A is that of the very pass that is differentiated.
        """
        n, size = len(samples), self.config.backward_size
        seen = torch.zeros_like(log_score) if log_policy is None else log_policy

        def weigh(rows: Tensor) -> Tensor:
            return advantage(
                self.method, log_score[rows], samples.log_prob[rows], seen[rows], log_z
            )

        rows = torch.arange(n)
        scale = torch.full((n,), 1.0 / n, dtype=torch.float64)
        if size is not None and size < n:
            keep = inclusion_probabilities(weigh(rows), size)
            u = float(torch.rand((), generator=self.generator, dtype=torch.float64))
            rows, scale = systematic_sample(keep, u), scale / keep
        self.optimizer.zero_grad(set_to_none=True)
        for part in torch.split(rows, self.config.micro_batch_size or _MICRO_BATCH):
            log_pi = self.policy.log_prob(samples[part], grad=True)
            if log_policy is None:
                seen[part] = log_pi.detach().cpu()
            ((-weigh(part) * scale[part]).to(log_pi) @ log_pi).backward()
        return seen, weigh(torch.arange(n))

    def _update(self) -> None:
        """One optimiser step."""
        parameters = self.optimizer.param_groups[0]["params"]
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the gradient of step {self.step} has norm {float(norm)}: lower the learning rate "
                "or set max_grad_norm, and go on from the last checkpoint"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate_at(self.step)
        self.optimizer.step()
        decay = self.config.average_decay
        if decay is None:
            return
        weights = self.policy.state_dict()
        if self.average is None:
            self.average = {k: v.clone() for k, v in weights.items()}
        # Early on, an average over all steps so far: the decay's own horizon is not reached yet.
        decay = min(decay, self.step / (self.step + 1))
        for name, value in weights.items():
            self.average[name].lerp_(value, 1 - decay)

    def _move_proposal(self, log_w: Tensor, log_ratio: Tensor) -> bool:
        """Replaces q by π if the texts since the last change say that π is closer to the target.

        A paired test on the very texts trained on, each with the policy as it was then (no text is
        scored again), so it lags a little behind the policy, on the safe side.
        """
        if self.proposal_rule in ("policy", "never"):
            return False
        self._since_change.append(torch.stack([log_w, log_ratio]))
        if self.step % self.config.proposal_every:
            return False
        log_w, log_ratio = torch.cat(self._since_change, dim=1)
        if log_weights.ess(log_w) < _MIN_ESS:
            return False
        gain, stderr = _gain(self.proposal_rule, log_w, log_ratio, self.z.log_z)
        if not gain > _CLOSER * stderr:
            return False
        if self.proposal is self.target.base:
            self.proposal = self.policy.copy()
        self.proposal.load_state_dict(self.policy.state_dict())
        self._since_change.clear()
        return True

    def _row(
        self, samples: Samples, log_score: Tensor, log_policy: Tensor, a: Tensor, moved: bool
    ) -> dict[str, Any]:
        log_q = samples.log_prob
        log_w = log_score - log_q
        any_hit = bool((log_w > -math.inf).any())
        values = self.target.values(samples)
        nan = math.nan
        row: dict[str, Any] = {
            "step": self.step,
            "samples": self.n_drawn,
            "seconds": round(self.seconds, 3),
            "log_z": self.z.log_z,
            "log_z_stderr": self.z.stderr,
            "ess": log_weights.ess(log_w),
            "kl_target_policy": divergences.kl(log_score, log_policy, log_q).value
            if any_hit
            else nan,
            "kl_target_proposal": divergences.kl(log_score, log_q, log_q).value if any_hit else nan,
            "proposal_updated": moved,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "advantage_mean": float(a.mean()),
            "advantage_abs_mean": float(a.abs().mean()),
            "advantage_var": float(a.var(correction=0)),
        }
        for feature in self.target.features:
            row[f"moment/{feature.name}"] = float(
                log_weights.mean(log_policy - log_q, values[feature.name])[0]
            )
        return row

    def _record(self, folder: Path, row: dict[str, Any]) -> None:
        runs.append_row(folder / "metrics.jsonl", row)
        config = self.config
        if config.evaluate_every and self.step % config.evaluate_every == 0:
            scores = evaluate(self.policy, self.target, seed=self.step)
            runs.append_row(folder / "evaluations.jsonl", {"step": self.step} | scores.to_dict())
        if config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self.save_checkpoint(folder)

    def save_checkpoint(self, folder: str | Path) -> None:
        """Writes all that `resume` needs, atomically, as safetensors and JSON."""
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        if self.proposal is not self.policy and self.proposal is not self.target.base:
            tensors |= {f"proposal.{k}": v for k, v in self.proposal.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in (self.average or {}).items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        if self._since_change:
            tensors["since_change"] = torch.cat(self._since_change, dim=1)
        tensors["generator"] = self.generator.get_state()
        facts = {
            "sampler": type(self).__name__,
            "config": asdict(self.config),
            "target": self.target.to_dict(),
            "step": self.step,
            "samples": self.n_drawn,
            "seconds": self.seconds,
            "z": asdict(self.z),
            "history": self.history,
        }
        runs.save_checkpoint(Path(folder), self.step, tensors, facts)

    def resume(self, run_folder: str | Path) -> None:
        """Fills this sampler and its policy, in place, from the last checkpoint of a run.

        Raises:
            ValueError: there is no checkpoint, or it belongs to another method or target.
        """
        tensors, facts = runs.load_checkpoint(Path(run_folder))
        mine = {"sampler": type(self).__name__, "target": self.target.to_dict()}
        for key, value in mine.items():
            if facts[key] != json.loads(json.dumps(value)):
                raise ValueError(
                    f"the checkpoint in {run_folder} has another {key}: {facts[key]}, not {value}"
                )
        groups = _by_prefix(tensors)
        self.policy.load_state_dict(groups["policy"])
        if "proposal" in groups:
            self.proposal = self.policy.copy()
            self.proposal.load_state_dict(groups["proposal"])
        if "average" in groups:
            weights = self.policy.state_dict()
            self.average = {k: v.to(weights[k]) for k, v in groups["average"].items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in groups.get("optimizer", {}).items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self._since_change = [tensors["since_change"]] if "since_change" in tensors else []
        self.generator.set_state(tensors["generator"])
        self.step, self.n_drawn = facts["step"], facts["samples"]
        self.seconds, self.z = facts["seconds"], ZPool(**facts["z"])
        self.history = facts["history"]


def _optimizer(
    config: TrainerConfig, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9)
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return make(parameters, lr=config.learning_rate)


def _gain(rule: str, log_w: Tensor, log_ratio: Tensor, log_z: float) -> tuple[float, float]:
    """D(p, q) − D(p, π) with its standard error, from the same texts; positive if π is closer."""
    if rule == "kl":
        value, stderr = log_weights.mean(log_w, log_ratio)
        return float(value), float(stderr)
    g, u = torch.exp(log_w - log_z), torch.exp(log_ratio)
    terms = (g - 1).clamp(min=0) - (g - u).clamp(min=0)
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        if rest:
            groups.setdefault(prefix, {})[rest] = value
    return groups


def _facts(row: dict[str, Any]) -> str:
    """What a person wants to see while it runs."""
    moments = [f"{k[7:]} {v:.2f}" for k, v in row.items() if k.startswith("moment/")]
    speed = row["samples"] / max(row["seconds"], 1e-9)
    parts = [*moments, f"KL(p‖π) {row['kl_target_policy']:.2f}", f"ESS {row['ess']:.0f}"]
    return ", ".join([*parts, f"{speed:.0f} texts/s"])

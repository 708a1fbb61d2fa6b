"""The one training loop: draw, weigh, follow the gradient, and move the proposal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmgen import storage
from dmgen.estimates.running_z import RunningZ
from dmgen.evaluation.evaluate import evaluate
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.target.ebm import EBM
from dmgen.training import checkpoint, run_folder
from dmgen.training.averaging import WeightAverage
from dmgen.training.config import TrainerConfig
from dmgen.training.diagnostics import batch_statistics, gradient_variance
from dmgen.training.distributed import Processes
from dmgen.training.health import Health
from dmgen.training.memory import micro_batch
from dmgen.training.objectives import (
    WEIGHTED,
    advantage,
    check_method,
    needs_policy,
    needs_whole_batch,
)
from dmgen.training.proposal import Comparison, copy_in_one_block, draw_mixture, draw_rows
from dmgen.training.subset import inclusion_probabilities, systematic_sample

# learning_rate "auto": where it begins, how far it may move in a step, and on how many texts the
# KL of a step is measured.
_FIRST_RATE, _SLOWEST, _FASTEST, _N_MEASURED = 1e-5, 0.5, 1.3, 128


class Trainer:
    """Fits `policy` to `target` by `∇ = E_q[A ∇log π]`; the methods differ in A and in q.

    Under `accelerate launch` every process makes the same trainer; each draws and differentiates
    its share of a batch, and all take the same step.

    Args:
        policy: the model to train, usually `base.copy()`; it is changed in place.
        target: the distribution to match.
        config: settings of the run.
        proposal: the model to draw from at first; None takes the target's base (off-policy) or
            the policy itself.

    Raises:
        ValueError: the policy has nothing to train, or is the target's own base; a setting does
            not go with the method or the number of processes.
    """

    method: ClassVar[str]
    default_proposal_rule: ClassVar[str]
    divergence: str | tuple[str, float] | None = None

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
        check_method(self.method, config.baseline, self.divergence)
        self.proposal_rule = config.proposal_rule or self.default_proposal_rule
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters or policy is target.base:
            raise ValueError("the policy has no trainable weights: use policy = base.copy()")
        if self.proposal_rule == "policy" and proposal is not None:
            raise ValueError('proposal_rule "policy" draws from the policy: give no proposal')
        # What texts are drawn from at first; it may be the caller's own, and is never changed.
        self.first_proposal: Any = proposal or (
            policy if self.proposal_rule == "policy" else target.base
        )
        self.proposal: Any = self.first_proposal
        self.processes = Processes.here(self.parameters[0].device)
        self.rows = self.processes.rows(config.batch_size)
        self.optimizer = _optimizer(config, self.parameters)
        self.generator = stream("train", config.seed)
        self.step = 0
        self.n_drawn = 0
        self.seconds = 0.0
        # With learning_rate "auto", the peak step size by now.
        self.rate = _FIRST_RATE if config.learning_rate == "auto" else float(config.learning_rate)
        self.z = self.z_before = RunningZ.from_score(target.log_z)
        # Of the texts since Z was last compared with what was known before.
        self.z_round = RunningZ()
        self.average = WeightAverage(policy, config.average_decay)
        self.comparison = Comparison(self.proposal_rule, config)
        self.history: list[dict[str, Any]] = []
        # What a method keeps beside the policy: checkpoints hold it, `resume` fills it in place.
        self.own_state: dict[str, Tensor] = {}
        self.micro_batch_size = config.micro_batch_size
        self.health = Health(config.batch_size, weighted=self.method in WEIGHTED)

    def train(
        self,
        n_steps: int,
        out: str | Path | None = None,
        *,
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> pd.DataFrame:
        """Takes `n_steps` more steps and returns the history of all so far, a row a step.

        With `out`, metrics, evaluations and checkpoints go there, the last one where it ends;
        `resume(out)` goes on from it. A run that is interrupted goes on from the last checkpoint
        that `checkpoint_every` wrote. `log` is called with each row of metrics.

        Raises:
            ValueError: `out` holds another run, or the processes have different targets.
            FloatingPointError: an advantage or a gradient is not finite; names its terms, or the
                step. No update is made of it, and the last checkpoint is untouched.
        """
        if not self.processes.agree(self._fitted()):
            raise ValueError("the processes have targets of different λ or Z: give EBM.fit a seed")
        config, given = self.config, self.target.fit_samples
        if config.first_batches_from_fit and not self.step and len(given or ()) < config.batch_size:
            raise ValueError(
                "first_batches_from_fit needs the texts that λ was fitted on, a batch of "
                f"{config.batch_size} at least, and the target has {len(given or ())}: fit it by "
                "EBM.fit(base, ...) on more, without a proposal, or leave the setting out"
            )
        folder = None if out is None or not self.processes.is_main else Path(out)
        if folder is not None:
            run_folder.open_run(folder, expected_step=self.step)
        self.average.hide()
        hidden = None if self.processes.is_main else True
        bar = tqdm(total=n_steps, desc=type(self).__name__, unit="step", disable=hidden)
        try:
            for _ in range(n_steps):
                row = self._step()
                self.history.append(row)
                if folder is not None:
                    self._record(folder, row)
                if log is not None and self.processes.is_main:
                    log(row)
                bar.set_postfix_str(_facts(row), refresh=False)
                bar.update()
            if folder is not None and self.step and not self._is_due(config.checkpoint_every):
                checkpoint.save(self, folder)
            self.processes.wait()
        finally:
            bar.close()
            self.average.show()
        return pd.DataFrame(self.history)

    def resume(self, run_folder: str | Path) -> None:
        """Fills this sampler and its policy, in place, from the last checkpoint of a run.

        The policy is then what `train` left: with averaged weights, if they are kept.

        Raises:
            ValueError: there is no checkpoint, or it belongs to another run: method, divergence,
                target, optimizer, proposal, seed or policy.
        """
        checkpoint.load(self, Path(run_folder))

    def _step(self) -> dict[str, Any]:
        """One step: draw, weigh, backward, update, test the proposal; a row of metrics."""
        started = time.monotonic()
        from_fit = self._from_fit()
        samples, log_base, log_policy = self._draw()
        # log q is what was recorded while drawing; it is never computed again.
        own_log_score = self.target.log_score(samples, base_log_prob=log_base)
        gather = self.processes.gather  # from this process's texts to those of all, (N,)
        log_q, log_score = gather(samples.log_prob), gather(own_log_score)
        log_w = log_score - log_q
        # The batch's own weights would bias its gradient, so it counts for Z from the next step
        # on, unless nothing else is known.
        z = self.z if self.z.n_hits else self.z.add(log_w)
        if not from_fit:  # the pool began with the texts of the fit: they are counted
            self.z, self.z_round = self.z.add(log_w), self.z_round.add(log_w)
        values = {k: gather(v) for k, v in self.target.values(samples).items()}
        known = None if log_policy is None else gather(log_policy)
        extra: dict[str, float] = {}
        if z.n_hits:
            reward = self.reward(values, log_score)
            before = self._measured(samples)
            log_policy, a = self._backward(samples, log_q, log_score, known, reward, z.log_z)
            extra = self._diagnose(samples, a)
            self._update()
            for _ in range(self.config.reuse - 1):
                self._backward(samples, log_q, log_score, None, reward, z.log_z)
                self._update()
            extra["step_kl"] = self._follow_kl(log_q, before, self._measured(samples))
        else:
            log_policy = gather(self.policy.log_prob(samples)) if known is None else known
            a = torch.zeros_like(log_w)
        self.step += 1
        self.n_drawn += self.config.batch_size
        row: dict[str, Any] = {
            "step": self.step,
            "samples": self.n_drawn,
            "seconds": 0.0,
            "log_z": self.z.log_z,
            "log_z_stderr": self.z.stderr,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        row |= batch_statistics(log_q, log_score, log_policy, a, values) | extra
        # Texts of the fit are the base's, whatever the proposal is.
        if not from_fit or self.proposal is self.target.base:
            mixed = log_base if self.config.base_share else None
            log_a = None if mixed is None else gather(mixed)
            self.comparison.add(log_w, log_q, log_policy, log_a)
        row["proposal_updated"] = self._move_proposal()
        row["log_z_drift"] = self._drift()
        self.seconds += time.monotonic() - started
        row["seconds"] = round(self.seconds, 3)
        self.health.watch(row)
        return row

    def _fitted(self) -> Tensor:
        """What the target knows of itself by a draw: λ and log Z, 0 where it was not fitted."""
        log_z = self.target.log_z.value if self.target.log_z else 0.0
        return torch.cat([self.target.lambdas, torch.tensor([log_z], dtype=torch.float64)])

    def reward(self, values: dict[str, Tensor], log_score: Tensor) -> Tensor | None:
        """What a reward-maximising method pays for each text, `(N,)`; None for the others."""
        return None

    def _from_fit(self) -> bool:
        """Whether this step's texts are some of those that λ was fitted on."""
        given, end = self.target.fit_samples, (self.step + 1) * self.config.batch_size
        return self.config.first_batches_from_fit and given is not None and end <= len(given)

    def _draw(self) -> tuple[Samples, Tensor | None, Tensor | None]:
        """This process's texts of the step; their log a and log π where known for free."""
        config, base = self.config, self.target.base
        size, given = config.batch_size, self.target.fit_samples
        if self._from_fit() and given is not None:
            first = self.step * size
            samples = given[first + self.rows.start : first + self.rows.stop]
            return samples, samples.log_prob, None
        n_base = 0 if self.proposal is base else config.n_base
        log_base: Tensor | None
        drawn = draw_rows(
            [(base, n_base), (self.proposal, size - n_base)],
            self.rows,
            prompt=self.target.prompt,
            max_new_tokens=self.target.max_new_tokens,
            generator=self.generator,
        )
        if n_base:
            samples, log_base, log_q = draw_mixture(drawn, base, self.proposal, n_base / size)
            return samples, log_base, log_q if self.proposal is self.policy else None
        samples = drawn[0][1]
        log_base = samples.log_prob if self.proposal is base else None
        return samples, log_base, samples.log_prob if self.proposal is self.policy else None

    def _backward(
        self,
        samples: Samples,
        log_q: Tensor,
        log_score: Tensor,
        log_policy: Tensor | None,
        reward: Tensor | None,
        log_z: float,
    ) -> tuple[Tensor, Tensor]:
        """Sets the gradient of `−mean(A log π)`; log π and A of each text, `(N,)`, detached.

        `samples` are those of this process, all columns those of all processes. Where `log_policy`
        is None and no text needs to know of the others, the π inside A is that of the very pass
        that is differentiated. Texts whose A is known to be 0 are not differentiated.
        """
        config, n = self.config, len(log_q)
        blind = needs_policy(self.method, config.baseline) and log_policy is None
        if blind and (config.backward_size or needs_whole_batch(self.method, config.baseline)):
            log_policy, blind = self.processes.gather(self.policy.log_prob(samples)), False
        seen = torch.zeros_like(log_q) if log_policy is None else log_policy

        def weigh(rows: Tensor) -> Tensor:
            return advantage(
                self.method,
                log_score[rows],
                log_q[rows],
                seen[rows],
                log_z,
                reward=None if reward is None else reward[rows],
                divergence=self.divergence,
                baseline=config.baseline,
            )

        everything = torch.arange(n)
        a = None if blind else weigh(everything)
        rows, scale = everything, torch.full((n,), 1.0 / n, dtype=torch.float64)
        if a is not None:
            size, u = config.backward_size or n, 0.0
            if size < n:
                u = float(torch.rand((), generator=self.generator, dtype=torch.float64))
            keep = inclusion_probabilities(a, size)
            rows, scale = systematic_sample(keep, u), scale / keep
        self.optimizer.zero_grad(set_to_none=True)
        mine = everything[self.rows.start : self.rows.stop]
        own, idle = mine[torch.isin(mine, rows)], mine[~torch.isin(mine, rows)]
        if log_policy is None and len(idle):
            seen[idle] = self.policy.log_prob(samples[idle - self.rows.start])
        # Of nothing, torch.split gives one part, and a pass of no texts has no graph.
        for part in torch.split(own, self._micro_batch(samples)) if len(own) else ():
            log_pi = self.policy.log_prob(samples[part - self.rows.start], grad=True)
            if log_policy is None:
                seen[part] = log_pi.detach().cpu()
            weights = weigh(part) if a is None else a[part]
            ((-weights * scale[part]).to(log_pi) @ log_pi).backward()
        if not len(own):  # a gradient of 0, not none: the optimiser's moments decay
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum_gradients(self.parameters)
        if log_policy is None:
            seen = self.processes.gather(seen[self.rows.start : self.rows.stop])
        return seen, weigh(everything) if a is None else a

    def _micro_batch(self, samples: Samples) -> int:
        """Texts in one forward and backward pass; found once, on the first batch."""
        if self.micro_batch_size is None:
            self.micro_batch_size = micro_batch(self.policy, samples)
        return self.micro_batch_size

    def _diagnose(self, samples: Samples, a: Tensor) -> dict[str, float]:
        """The gradient's variance on this process's texts, on the steps that ask for it."""
        every = self.config.diagnose_every
        if not every or (self.step + 1) % every:
            return {}
        return gradient_variance(self.policy, samples, a[self.rows.start : self.rows.stop])

    def _update(self) -> None:
        """One optimiser step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the gradient of step {self.step + 1} has norm {float(norm)}: lower the learning "
                "rate or set max_grad_norm, and go on from the last checkpoint"
            )
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.config.share_at(self.step)
        self.optimizer.step()
        # As large as the weights, and not needed while texts are drawn, scored and judged.
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.step)

    def _measured(self, samples: Samples) -> Tensor | None:
        """log π of the texts on which learning_rate "auto" measures the KL of a step, `(n,)`.

        By one and the same pass before and after the step: in half precision what was recorded
        while drawing differs from it by more than a small step does.
        """
        if self.config.learning_rate != "auto":
            return None
        n = max(2, _N_MEASURED // self.processes.count)
        log_policy: Tensor = self.policy.log_prob(samples[:n])
        return log_policy

    def _follow_kl(self, log_q: Tensor, before: Tensor | None, after: Tensor | None) -> float:
        """With learning_rate "auto", measures KL(π before‖π after) and sets the next rate by it.

        The KL of a small step grows with the square of its size.
        """
        if before is None or after is None:
            return math.nan
        log_ratio = after - before
        # Each term is positive, unlike those of the plain mean of −log_ratio.
        weights = torch.exp(before - log_q[self.rows.start :][: len(before)])
        terms = weights * (torch.expm1(log_ratio) - log_ratio)
        moved_by = float(self.processes.gather(terms).mean())
        wanted = self.config.step_kl * self.config.share_at(self.step) ** 2
        factor = math.sqrt(wanted / moved_by) if moved_by > 0 else _FASTEST
        self.rate *= min(max(factor, _SLOWEST), _FASTEST)
        return moved_by

    def _move_proposal(self) -> bool:
        """Replaces q by π if the texts since the last change say that π is closer to the target.

        A paired test on the very texts trained on, each with the policy as it was then (no text is
        scored again), so it lags a little behind the policy, on the safe side.
        """
        due = self._is_due(self.config.proposal_every)
        if not due or not self.comparison.is_won(self.z.log_z):
            return False
        if self.proposal is self.first_proposal:
            self.proposal = copy_in_one_block(self.policy)
        else:
            self.proposal.load_state_dict(self.policy.state_dict())
        self.comparison.clear()
        return True

    def _drift(self) -> float:
        """How far the latest estimate of log Z is from the one before, in standard errors."""
        if not self._is_due(self.config.proposal_every):
            return math.nan
        drift = self.z_round.drift_from(self.z_before)
        self.z_before, self.z_round = self.z, RunningZ()
        return drift

    def _record(self, folder: Path, row: dict[str, Any]) -> None:
        storage.append_row(folder / "metrics.jsonl", row)
        config = self.config
        if self._is_due(config.evaluate_every):
            with self.average.shown():
                scores = evaluate(self.policy, self.target, seed=self.step)
            storage.append_row(folder / "evaluations.jsonl", {"step": self.step} | scores.to_dict())
        if self._is_due(config.checkpoint_every):
            checkpoint.save(self, folder)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0


def _optimizer(
    config: TrainerConfig, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # Fused: one pass over weights and moments, and no temporaries of their size.
    return make(parameters, lr=1.0, fused=True)  # lr is set at every step


def _facts(row: dict[str, Any]) -> str:
    """What a person wants to see while it runs."""
    moments = [f"{k[7:]} {v:.2f}" for k, v in row.items() if k.startswith("moment/")]
    speed = row["samples"] / max(row["seconds"], 1e-9)
    parts = [*moments, f"KL(p‖π) {row['kl_target_policy']:.2f}", f"ESS {row['ess']:.0f}"]
    return ", ".join([*parts, f"{speed:.0f} texts/s"])

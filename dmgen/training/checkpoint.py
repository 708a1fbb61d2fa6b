"""All that a run needs to go on as if it had never stopped: safetensors and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmgen.estimates.running_z import RunningZ
from dmgen.training import run_folder
from dmgen.training.proposal import copy_in_one_block

if TYPE_CHECKING:
    from dmgen.training.trainer import Trainer


def save(sampler: Trainer, folder: Path) -> None:
    """Writes a checkpoint of `sampler` into a run folder, atomically."""
    tensors = {f"policy.{k}": v for k, v in sampler.policy.state_dict().items()}
    if sampler.proposal is not sampler.first_proposal:
        tensors |= {f"proposal.{k}": v for k, v in sampler.proposal.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in sampler.average.weights.items()}
    for i, state in sampler.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors["since_change"] = sampler.comparison.seen
    tensors |= {f"own.{k}": v for k, v in sampler.own_state.items()}
    tensors["generator"] = sampler.generator.get_state()
    facts = {
        "sampler": type(sampler).__name__,
        "divergence": sampler.divergence,
        "config": asdict(sampler.config),
        "micro_batch": [_device(sampler), sampler.micro_batch_size],
        "own_proposal": _has_own_proposal(sampler),
        "target": sampler.target.to_dict(),
        "step": sampler.step,
        "samples": sampler.n_drawn,
        "seconds": sampler.seconds,
        "rate": sampler.rate,
        "z": asdict(sampler.z),
        "z_before": asdict(sampler.z_before),
        "z_round": asdict(sampler.z_round),
        "history": sampler.history,
    }
    run_folder.save_checkpoint(folder, sampler.step, tensors, facts)


def load(sampler: Trainer, folder: Path) -> None:
    """Fills `sampler` and its policy, in place, from the last checkpoint of a run.

    The policy is then what `train` left: with averaged weights, if they are kept.

    Raises:
        ValueError: there is no checkpoint, or it belongs to another method, divergence, target,
            optimizer, proposal rule, seed, proposal or policy; the sampler is as it was.
    """
    tensors, facts = run_folder.load_checkpoint(folder)
    _refuse_other_run(sampler, facts, folder)
    groups = _by_prefix(tensors)
    own = groups.get("own", {})
    if own.keys() != sampler.own_state.keys():
        raise ValueError(
            f"the checkpoint in {folder} holds {sorted(own)} of the method's own, not "
            f"{sorted(sampler.own_state)}: make the sampler with the options it was trained with"
        )
    _refuse_other_policy(groups["policy"], sampler.policy.state_dict(), folder)
    with torch.no_grad():
        for name, value in own.items():
            sampler.own_state[name].copy_(value)
    sampler.policy.load_state_dict(groups["policy"])
    sampler.proposal = sampler.first_proposal
    if "proposal" in groups:
        sampler.proposal = copy_in_one_block(sampler.policy)
        sampler.proposal.load_state_dict(groups["proposal"])
    own_weights = sampler.policy.state_dict()
    average = groups.get("average", {})
    # What is kept is copied: one tensor of the file would keep all of it in memory.
    sampler.average.load({k: v.to(own_weights[k], copy=True) for k, v in average.items()})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in groups.get("optimizer", {}).items():
        i, key = name.split(".")
        state.setdefault(int(i), {})[key] = value.clone()
    sampler.optimizer.load_state_dict(
        {"state": state, "param_groups": sampler.optimizer.state_dict()["param_groups"]}
    )
    # A checkpoint of an older version leaves it out where it is empty.
    sampler.comparison.clear()
    sampler.comparison.seen = tensors.get("since_change", sampler.comparison.seen).clone()
    sampler.generator.set_state(tensors["generator"])
    sampler.step, sampler.n_drawn = facts["step"], facts["samples"]
    sampler.seconds = facts["seconds"]
    if sampler.config.learning_rate == "auto":
        sampler.rate = facts["rate"]
    for name in ("z", "z_before", "z_round"):
        setattr(sampler, name, RunningZ(**facts[name]))
    sampler.history = facts["history"]
    # Sums over other micro-batches would differ in their last bits; only a CPU promises those.
    device, size = facts.get("micro_batch", (None, None))
    if sampler.config.micro_batch_size is None and device == _device(sampler) == "cpu":
        sampler.micro_batch_size = size
    sampler.average.show()


def _device(sampler: Trainer) -> str:
    """Where the policy computes."""
    return str(sampler.parameters[0].device.type)


def _refuse_other_run(sampler: Trainer, facts: dict[str, Any], folder: Path) -> None:
    settings = facts["config"]
    given = _has_own_proposal(sampler)
    if facts.get("own_proposal", given) != given:
        had, has = ("had", "has not") if facts["own_proposal"] else ("had no", "has one")
        raise ValueError(
            f"the run in {folder} {had} proposal= and this sampler {has}: make it as it was made"
        )
    theirs = {key: facts[key] for key in ("sampler", "divergence", "target")} | {
        "optimizer": settings["optimizer"],
        "proposal_rule": settings["proposal_rule"] or sampler.default_proposal_rule,
        "seed": settings["seed"],
    }
    mine = {
        "sampler": type(sampler).__name__,
        "divergence": sampler.divergence,
        "target": sampler.target.to_dict(),
        "optimizer": sampler.config.optimizer,
        "proposal_rule": sampler.proposal_rule,
        "seed": sampler.config.seed,
    }
    for key, wanted in mine.items():
        if theirs[key] != json.loads(json.dumps(wanted)):
            raise ValueError(
                f"the checkpoint in {folder} has another {key}: {theirs[key]}, not {wanted}"
            )


def _has_own_proposal(sampler: Trainer) -> bool:
    """Whether the caller gave a model to draw from at first."""
    return not any(sampler.first_proposal is x for x in (sampler.policy, sampler.target.base))


def _refuse_other_policy(theirs: dict[str, Tensor], mine: dict[str, Tensor], folder: Path) -> None:
    shapes = [{k: tuple(v.shape) for k, v in weights.items()} for weights in (theirs, mine)]
    different = sorted(dict(set(shapes[0].items()) ^ set(shapes[1].items())))
    if different:
        name = different[0]
        raise ValueError(
            f"the checkpoint in {folder} is of another policy: it has {name} as "
            f"{shapes[0].get(name, 'nothing')}, this one as {shapes[1].get(name, 'nothing')} "
            f"({len(different)} such): make the policy as it was made for that run"
        )


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        if rest:
            groups.setdefault(prefix, {})[rest] = value
    return groups

"""Checkpoints: the whole `TrainState` of a run as safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from dmgen.estimates.f_divergence import f_divergence
from dmgen.training import run_folder
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState

_FORMAT = 2


def save(state: TrainState, setup: Setup, folder: Path) -> None:
    """Write a checkpoint into a run folder, atomically."""
    saved, config = state.state_dict(), setup.config
    tensors: dict[str, Tensor] = {}
    plain = {}
    for name, value in saved.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{name}.{key}": tensor for key, tensor in value.items()}
        else:
            plain[name] = value
    facts = {
        "format": _FORMAT,
        "run": _identity(setup),
        "config": asdict(config) | {"baseline": getattr(config.baseline, "name", config.baseline)},
        "device": _device(state),
        "state": plain,
    }
    run_folder.save_checkpoint(folder, state.step, tensors, facts)


def load(state: TrainState, setup: Setup, folder: Path) -> None:
    """Fill a state and its policy, in place, from the last checkpoint of a run folder.

    Raises:
        ValueError: there is no checkpoint, or it belongs to another objective, target, optimizer,
            proposal rule, seed, proposal or policy; the state stays as it was.
    """
    tensors, facts = run_folder.load_checkpoint(folder)
    if "format" not in facts:
        tensors, facts = _from_version_0_1(tensors, facts)
    _refuse_other_run(facts["run"], setup, folder)
    saved = {f.name: {} for f in fields(state)} | facts["state"] | _by_field(tensors)
    if saved["objective"].keys() - state.objective.keys():
        raise ValueError(
            f"the objective's state in the checkpoint in {folder} holds "
            f"{sorted(saved['objective'])}, not {sorted(state.objective)}: make the trainer with "
            "the options of that run"
        )
    _refuse_other_policy(saved["policy"], state.policy.state_dict(), folder)
    # Some settings may change in a resumed run: they overrule the checkpoint.
    if setup.config.learning_rate != "auto":
        saved["rate"] = state.rate
    if setup.config.average_decay is None:
        saved["average"] = {}
    # Sums over other micro-batches would differ in their last bits; only a CPU promises those.
    if setup.config.micro_batch_size or not facts["device"] == _device(state) == "cpu":
        saved["micro_batch_size"] = state.micro_batch_size
    saved["average_shown"] = False
    state.load_state_dict(saved)


def _identity(setup: Setup) -> dict[str, Any]:
    """Return the facts that must be equal in a checkpoint and the run that resumes it."""
    first = setup.first_proposal
    facts = setup.objective.identity() | {
        "target": setup.target.to_dict(),
        "optimizer": setup.config.optimizer,
        "proposal_rule": setup.proposal_rule,
        "seed": setup.config.seed,
        "own_proposal": first is not setup.target.base and setup.proposal_rule != "policy",
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _device(state: TrainState) -> str:
    return str(state.parameters[0].device.type)


def _by_field(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tensors by field, as `TrainState.load_state_dict` reads them."""
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        field, _, key = name.partition(".")
        if key:
            values.setdefault(field, {})[key] = tensor
        else:
            values[field] = tensor
    return values


def _refuse_other_run(saved: Mapping[str, Any], setup: Setup, folder: Path) -> None:
    current = _identity(setup)
    had = saved.get("own_proposal", current["own_proposal"])
    if had != current["own_proposal"]:
        has = ("had", "has not") if had else ("had no", "has one")
        raise ValueError(
            f"the run in {folder} {has[0]} proposal= and this trainer {has[1]}: make the trainer "
            "as for that run"
        )
    for key, value in current.items():
        if key in saved and saved[key] != value:
            raise ValueError(
                f"the checkpoint in {folder} has another {key}: {saved[key]}, not {value}"
            )


def _refuse_other_policy(
    saved: Mapping[str, Tensor], current: Mapping[str, Tensor], folder: Path
) -> None:
    shapes = [{k: tuple(v.shape) for k, v in weights.items()} for weights in (saved, current)]
    different = sorted(dict(set(shapes[0].items()) ^ set(shapes[1].items())))
    if different:
        name = different[0]
        raise ValueError(
            f"the checkpoint in {folder} is of another policy: it has {name} as "
            f"{shapes[0].get(name, 'nothing')}, this one as {shapes[1].get(name, 'nothing')} "
            f"({len(different)} such): make the policy as for that run"
        )


def _from_version_0_1(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint of version 0.1 in today's form."""
    new_names = {"own": "objective", "since_change": "compared"}
    renamed = {}
    for name, tensor in tensors.items():
        field, dot, key = name.partition(".")
        renamed[new_names.get(field, field) + dot + key] = tensor
    config, method = facts["config"], facts["sampler"]
    differing = {"GDCpp": "gdc++", "ReinforceP": "reinforce-p", "KLControl": "kl-control"}
    objective = differing.get(method, method.lower())
    run = {"objective": objective, "target": facts["target"]} | {
        key: config[key] for key in ("optimizer", "seed")
    }
    if facts["divergence"] is not None:
        name = facts["divergence"]
        run["divergence"] = f_divergence(tuple(name) if isinstance(name, list) else name).name
    run["proposal_rule"] = config["proposal_rule"] or (
        "kl" if objective in ("gdc", "gdc++") else "policy"
    )
    if "own_proposal" in facts:
        run["own_proposal"] = facts["own_proposal"]
    device, size = facts.get("micro_batch", (None, None))
    state = {key: facts[key] for key in ("step", "seconds", "rate", "z", "z_before", "z_round")}
    state |= {"n_drawn": facts["samples"], "history": facts["history"], "micro_batch_size": size}
    return renamed, {"run": run, "device": device, "state": state}

"""`PrefixValue`: an estimate of `E_a[b e^{λ·φ} | x_≤t]` for incomplete texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from dmgen import storage
from dmgen.target import prefix_fit
from dmgen.target.ebm import EBM

_FILE = "prefix_value.safetensors"


@dataclass(frozen=True, eq=False)
class PrefixValue:
    """The prefix value ĥ of a target, known for every next token at once.

    `ĥ(x_≤t) = low + (high − low) σ(v)`, v a small network of what the tokens so far add up to,
    of the position, and of a projection of the base's state before the last token. A token adds a
    vector of its own, as does a pair of consecutive tokens; few of them are other than 0, so that ĥ
    takes one value for all tokens but the `candidates`. The value of a finished text is
    `low + (high − low) σ(u)`, u a network of the sum alone.

    A guided base `p̂(v | x_<t) ∝ a(v | x_<t) ĥ(x_<t v)` is normalised token by token, see
    `models.guided.GuidedLM`.

    Attributes:
        candidates: ids of the C tokens that tell something, ascending, long `(C,)`; the EOS last,
            if there is one.
        token_effects: what each candidate adds, `(C, k)`.
        pair_keys: `previous · V + token` of the pairs that add something, ascending, long `(P,)`;
            before the first token, previous is V.
        pair_effects: what each pair adds, `(P, k)`.
        final_net: weights of u.
        value_net: weights of v.
        projection: of the base's state before the last token, `(r, D)`.
        bounds: low and high, the range of the factor, `(2,)`.
        sizes: V, T, and the id of the EOS or -1, long `(3,)`.
        report: cross-entropy a prefix on held-out texts, that of the best constant, and the mean
            predicted and observed value of the held-out prefixes, `(4,)`, nats and fractions of
            the range.
    """

    candidates: Tensor
    token_effects: Tensor
    pair_keys: Tensor
    pair_effects: Tensor
    final_net: Tensor
    value_net: Tensor
    projection: Tensor
    bounds: Tensor
    sizes: Tensor
    report: Tensor

    @classmethod
    def fit(
        cls,
        target: EBM,
        *,
        n_texts: int = 4096,
        n_labelled: int | None = None,
        n_heldout: int = 512,
        seed: int = 0,
    ) -> PrefixValue:
        """Return the prefix value fitted on the texts that λ was fitted on.

        First the sum and u are fitted by cross-entropy to the factor of incomplete texts as if they
        had ended, which has no noise; then v to the factor of the finished text.

        Args:
            target: made by `EBM.fit` without a proposal.
            n_texts: texts used, those of a large factor first; the others stand for the rest.
            n_labelled: texts whose every prefix is decoded and evaluated; None for all of them, 0
                for features that are dear: then only finished texts are.
            n_heldout: further texts, for the report.
            seed: seed of weights and order.

        Raises:
            ValueError: the target holds no texts of the base, or they all have one factor.
        """
        fitted = prefix_fit.fit(target, n_texts, n_labelled, n_heldout, seed)
        value = cls(**fitted, report=torch.full((4,), math.nan))
        return replace(value, report=value._checked(target, n_heldout)) if n_heldout else value

    @classmethod
    def of(cls, target: EBM) -> PrefixValue:
        """Return the target's own value, `target.prefix_value`, fitted at the first call."""
        if target.prefix_value is None:
            target.prefix_value = cls.fit(target)
        value: PrefixValue = target.prefix_value
        return value

    def save(self, folder: str | Path) -> None:
        """Write `prefix_value.safetensors` into the folder, which is created if missing."""
        storage.write_tensors(Path(folder) / _FILE, self.tensors())

    @classmethod
    def load(cls, folder: str | Path) -> PrefixValue:
        """Return the value that `save` wrote; raise ValueError if there is none."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"there is no prefix value in {folder}: {path} is missing")
        return cls.from_tensors(storage.read_tensors(path))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PrefixValue:
        """Return the value with the tensors of another, which it shares, by field name."""
        return cls(**{f.name: tensors[f.name] for f in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, not copied."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        """Return cross-entropy, calibration and size in a line."""
        model, constant, predicted, observed = self.report.tolist()
        return (
            f"prefix value: cross-entropy {model:.4f} nats a prefix (constant {constant:.4f}), "
            f"mean {predicted:.4f} predicted, {observed:.4f} observed; {len(self.candidates)} "
            f"tokens and {len(self.pair_keys)} pairs of tokens matter"
        )

    def log_values(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return `log ĥ` of each prefix followed by each candidate, and by any other token.

        Args:
            tokens: ids, `(N, T)`; those after the end of a text may be anything.
            hidden: the base's states before each token, `(N, T, D)`.

        Returns:
            float32 `(N, T, C + 1)`, nats; entry `[i, t]` is for the texts x_<t v.
        """
        before = torch.nn.functional.pad(self._added(tokens).cumsum(1)[:, :-1], (0, 0, 1, 0))
        first = torch.arange(tokens.shape[1])
        return self._log_values(before, self._previous(tokens), hidden, first)

    def next_log_values(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return `log_values` for the token after `tokens`, `(N, t)`: `(N, C + 1)`.

        `hidden` is the state before that token, `(N, D)`.
        """
        n, t = tokens.shape
        before = self.token_effects.new_zeros(n, 1, self.token_effects.shape[1])
        if t:
            before = self._added(tokens).sum(1, keepdim=True)
        previous = tokens[:, -1:] if t else tokens.new_full((n, 1), int(self.sizes[0]))
        position = torch.tensor([t])
        return self._log_values(before, previous, hidden.unsqueeze(1), position).squeeze(1)

    def column(self, tokens: Tensor) -> Tensor:
        """Return the entry of `log_values` that belongs to each token, long, of any shape."""
        n, eos = len(self.candidates), int(self.sizes[2])
        ascending = self.candidates[: n - 1] if eos >= 0 else self.candidates
        place = prefix_fit.places(ascending, tokens)
        column = torch.where(place < len(ascending), place, n)
        return torch.where(tokens == eos, n - 1, column)

    def _checked(self, target: EBM, n_heldout: int) -> Tensor:
        """Return the `report` of the last texts of the fit."""
        texts, goes_on, share = prefix_fit.heldout_inputs(target, n_heldout, self.bounds)
        log_values = self.log_values(texts.tokens, target.base.hidden_states(texts))
        column = self.column(texts.tokens).unsqueeze(-1)
        low, high = self.bounds
        drawn = (log_values.gather(-1, column).squeeze(-1).exp() - low) / (high - low)
        predicted, observed = drawn[goes_on].clamp(1e-7, 1 - 1e-7), share[goes_on]
        mean = observed.mean().clamp(1e-7, 1 - 1e-7)
        entropy = torch.nn.functional.binary_cross_entropy
        entropies = [entropy(x, observed) for x in (predicted, mean.expand_as(observed))]
        return torch.stack([*entropies, predicted.mean(), observed.mean()])

    def _previous(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=int(self.sizes[0]))

    def _added(self, tokens: Tensor) -> Tensor:
        """Return what each token and the pair that ends with it add to the sum, `(N, T, k)`."""
        zero = self.token_effects.new_zeros(1, self.token_effects.shape[1])
        own = torch.cat([self.token_effects, zero])[self.column(tokens)]
        return own + self._of_pairs(self._previous(tokens), tokens)

    def _of_pairs(self, previous: Tensor, tokens: Tensor) -> Tensor:
        return prefix_fit.pair_effects(
            self.pair_keys, self.pair_effects, previous * int(self.sizes[0]) + tokens
        )

    def _log_values(
        self, before: Tensor, previous: Tensor, hidden: Tensor, position: Tensor
    ) -> Tensor:
        """Return `(N, T, C + 1)` for sums before each token `(N, T, k)` and positions `(T,)`."""
        candidates = self.candidates.expand(*previous.shape, -1)  # (N, T, C)
        after = before.unsqueeze(2) + self.token_effects
        after = after + self._of_pairs(previous.unsqueeze(-1), candidates)
        sums = torch.cat([after, before.unsqueeze(2)], dim=2)  # (N, T, C + 1, k)
        final = prefix_fit.final_logit(self.final_net, sums)
        state = prefix_fit.projected(self.projection, hidden)  # (N, T, r)
        length = int(self.sizes[1])
        value = prefix_fit.value_logit(
            self.value_net, sums, final, state.unsqueeze(2), position.view(-1, 1), length
        )
        ends = (position == length - 1).view(1, -1, 1).expand_as(value).clone()
        if int(self.sizes[2]) >= 0:
            ends[..., len(self.candidates) - 1] = True
        low, high = self.bounds
        return torch.log(low + (high - low) * torch.sigmoid(torch.where(ends, final, value)))

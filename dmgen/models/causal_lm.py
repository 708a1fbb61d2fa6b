"""`CausalLM`: a Hugging Face causal language model as a distribution over texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf import fast_attention as attention
from dmgen.models.hf import fast_layers as layers
from dmgen.models.hf import lora, precision, scoring
from dmgen.models.hf.loading import check_tokenizer, default_device, load, prompt_ids, texts_of
from dmgen.models.random_draws import uniforms
from dmgen.models.samples import Samples, refuse_nan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CausalLM:
    """A Hugging Face causal language model as a distribution over texts.

    A text is at most `max_new_tokens` tokens after the prompt and ends with the tokenizer's EOS.
    Prompts are tokenised as the tokenizer does it; where that gives nothing (an empty prompt and no
    BOS added), the text starts after BOS, or EOS if there is no BOS: GPT-2's own convention.

    Sampling is ancestral at temperature 1 whatever the checkpoint's generation settings say, and
    dropout is off: importance weights need a deterministic law.

    Args:
        model: a causal language model of transformers. It is taken over, not copied: frozen, and
            with layers and attention of its own kind replaced, see below.
        tokenizer: its tokenizer; it must have an EOS.
        max_new_tokens: default length of a text, in tokens.
        dtype: precision of computing, under autocast if it is half; None takes that of the weights.
            To train, take bfloat16: in float16 the gradients of small advantages round to 0.
            Trainable weights stay float32 whatever it is. Frozen float32 weights are cast at each
            use: to compute in bfloat16, load them so. Even then states add up in float32, so that
            a `copy` of a dense transformer is the same law to the last bit.
        chunked_head: score and train through the output layer a block of the vocabulary at a time,
            never holding the logits of all tokens at all positions. False keeps to the model's own
            logits, as is done anyway where the model caps, scales or otherwise changes them.
        fast_attention: attend by plain matrix products where they are faster, on a CPU; False
            keeps the model's own attention implementation.
        fast_layers: compute root-mean-square norms and gated layers in fewer passes over memory,
            where the model has such; False keeps its own.

    Raises:
        ValueError: the tokenizer has no EOS or one that the model cannot write, the weights are
            narrower than `dtype`, or the model's cached decoding disagrees with its scoring (no
            causal transformer, or a cache of its own kind).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 40,
        dtype: torch.dtype | None = None,
        chunked_head: bool = True,
        fast_attention: bool = True,
        fast_layers: bool = True,
    ) -> None:
        weights = next(model.parameters()).dtype
        dtype = weights if dtype is None else dtype
        _check_settings(max_new_tokens, dtype)
        check_tokenizer(tokenizer)
        if weights not in (dtype, torch.float32):
            raise ValueError(
                f"the weights are {weights}, so the model cannot compute in {dtype}; load it with "
                f"dtype={dtype} or use CausalLM.from_pretrained"
            )
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self.model = model.eval().requires_grad_(False)
        self._has_adapter = False
        if weights != torch.float32:
            precision.keep_states_wide(self.model)
        if fast_attention:
            attention.use(self.model)
        if fast_layers:
            layers.use(self.model)
        with torch.no_grad(), self._computing():
            exact = scoring.check(self.model, tokenizer.eos_token_id, dtype)
        self._chunked_head = chunked_head and exact

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_new_tokens: int = 40,
        trust_remote_code: bool = False,
        chunked_head: bool = True,
        fast_attention: bool = True,
        fast_layers: bool = True,
    ) -> CausalLM:
        """A frozen model from the package ("tiny-bios"), a local folder, or the hub.

        Args:
            name: "tiny-bios", a folder written by `save_pretrained`, or a hub id such as "gpt2".
            device: None takes CUDA where there is a device, of several processes each its own, else
                the CPU.
            dtype: precision of computing. None means float32: in bfloat16 the log-probability of a
                40-token text is off by 0.25 nats on average, which costs effective sample size.
            max_new_tokens: default length of a text, in tokens.
            trust_remote_code: run code that comes with the checkpoint; off unless asked for.
            chunked_head, fast_attention, fast_layers: see `CausalLM`.

        Raises:
            ValueError: there is no such folder or model, its weights are not safetensors or not all
                there, its tokenizer has no EOS, or `dtype` is none of the three.
        """
        compute: Any = dtype or torch.float32
        if isinstance(compute, str):
            compute = getattr(torch, compute, compute)
        _check_settings(max_new_tokens, compute)
        model, tokenizer = load(name, dtype=compute, trust_remote_code=trust_remote_code)
        device = torch.device(device or default_device())
        return cls(
            model.to(device),
            tokenizer,
            max_new_tokens=max_new_tokens,
            dtype=compute,
            chunked_head=chunked_head,
            fast_attention=fast_attention,
            fast_layers=fast_layers,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def sample(
        self,
        n: int,
        *,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Samples:
        """`n` texts, with log-probabilities from the very logits that each token was drawn from.

        Args:
            n: number of texts.
            prompt: the text before; one prompt a call.
            max_new_tokens: longest text in tokens; None takes the model's own default.
            seed, generator: where the randomness comes from. Text i depends on row i of one block
                of uniforms only, not on `batch_size`.
            batch_size: texts decoded side by side; None chooses by memory.

        Raises:
            ValueError: the prompt and text do not fit the model's context, both seed and generator
                are given, a size is not positive, or the model gives NaN.
            TypeError: there are several prompts.
        """
        length = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        start = self._prompt_ids(prompt, length)
        u = uniforms(n, length, seed=seed, generator=generator)
        room = scoring.texts_a_draw(self.model, len(start) + length, self.dtype)
        size = _batch_size(batch_size, room)
        with torch.no_grad(), self._computing():
            eos = self.tokenizer.eos_token_id
            parts = [
                scoring.decode(self.model, start, part.to(self.device), eos)
                for part in torch.split(u, size)
            ]
        tokens = torch.cat([p[0] for p in parts]).cpu()
        log_prob = torch.cat([p[1] for p in parts]).cpu()
        mask = scoring.up_to(eos, tokens)
        shown = mask & (tokens != eos)
        return Samples(
            tokens, mask, log_prob, texts_of(self.tokenizer, tokens, shown), [str(prompt)] * n
        )

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Log-probability of each text in nats, float64 `(N,)`; see `token_log_prob`."""
        return self.token_log_prob(samples, batch_size=batch_size, grad=grad).sum(
            -1, dtype=torch.float64
        )

    def token_log_prob(
        self,
        samples: Samples,
        *,
        batch_size: int | None = None,
        grad: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each stored token given the prompt and the tokens before it.

        Plainly: `log_softmax(logits)[token]`, teacher-forced, from float32 logits. Texts of like
        length share a forward pass.

        Args:
            samples: what to score; the stored ids are scored, never the text tokenised again.
            batch_size: texts a forward pass; None chooses by memory.
            grad: keep the graph, on the model's device.
            hidden: what `hidden_states` gave for the same samples, if it is there: the output layer
                alone is computed then (unless the model changes its logits).

        Returns:
            float32 `(N, T)`, nats, 0 where masked; on the CPU unless `grad`.

        Raises:
            ValueError: a prompt and its longest text do not fit the model's context, `batch_size`
                is not positive, or the model gives NaN.
        """

        def score(start: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            return scoring.score(self.model, start, tokens, mask, chunked=self._chunked_head)

        known = self._chunked_head and scoring.linear_head(self.model) is not None
        if hidden is not None and known:
            with torch.set_grad_enabled(grad), self._computing():
                given = (x.to(self.device) for x in (hidden, samples.tokens, samples.mask))
                scored = scoring.score_states(self.model, *given)
            scored = scored if grad else scored.cpu()
        else:
            scored = self._in_order(samples, batch_size, grad, (), score)
        refuse_nan(scored.detach(), samples.texts)
        return scored

    def hidden_states(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """What the model knows before each token: the last hidden state, which predicts the token.

        State t depends on the prompt and the tokens before t only. It is the input of the output
        layer: `log_softmax(output_layer(hidden_states))[token]` is `token_log_prob` (of a model
        that does no more to its logits).

        Args:
            samples: texts by their stored ids.
            batch_size: texts a forward pass; None chooses by memory.
            grad: keep the graph, on the model's device.

        Returns:
            float32 `(N, T, D)`, 0 where masked; on the CPU unless `grad`.

        Raises:
            ValueError: a prompt and its longest text do not fit the model's context, or
                `batch_size` is not positive.
        """
        width = self.model.get_output_embeddings().weight.shape[-1]

        def states(start: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            found = scoring.states(self.model, start, tokens).float()
            return torch.where(mask.unsqueeze(-1), found, 0.0)

        return self._in_order(samples, batch_size, grad, (width,), states)

    def embed(self, texts: Sequence[str], *, batch_size: int | None = None) -> Tensor:
        """Mean last hidden state over the tokens of each text, float32 `(N, D)`, on the CPU.

        Texts are read by themselves, without a prompt; what looks like a special token is plain
        text. The empty text gets the state before any token, and a text that is longer than the
        model's context is read as far as it fits. It is what the heads of `features.classifier`
        read.

        Args:
            texts: N texts.
            batch_size: texts a forward pass; None chooses by memory.
        """
        if not len(texts):
            return torch.zeros(0, self.model.get_output_embeddings().weight.shape[-1])
        room = scoring.context(self.model) - len(prompt_ids(self.tokenizer, ""))
        ids = [
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for text in texts
        ]
        ids = [row[:room] for row in ids]
        n = torch.tensor([[len(row)] for row in ids])  # (N, 1)
        # One token more: its state is the one after the last token of the text.
        width = int(n.max()) + 1
        eos = self.tokenizer.eos_token_id
        tokens = torch.tensor([row + [eos] * (width - len(row)) for row in ids])
        position = torch.arange(width)
        unknown = torch.zeros(len(ids), dtype=torch.float64)
        samples = Samples(tokens, position <= n, unknown, list(texts), [""] * len(ids))
        states = self.hidden_states(samples, batch_size=batch_size)  # (N, T, D)
        own = (position <= n) & ((position > 0) | (n == 0))
        return (states * own.unsqueeze(-1)).sum(1) / own.sum(1, keepdim=True)

    def copy(
        self, *, adapter: str | None = None, rank: int = 8, alpha: float = 16.0, seed: int = 0
    ) -> CausalLM:
        """An independent trainable copy: float32 weights, computing in the same `dtype`.

        With `adapter="lora"` the copy shares the frozen weights of this model, which keeps its law,
        and trains a small adapter alone: `W x + (alpha / rank) B A x` in every linear layer but the
        output layer, with B = 0 at first. The copy of such a policy has an adapter of its own, with
        the same values, over the same weights. `parameters` and `state_dict` are the adapter's.

        Args:
            adapter: None or "lora" (needs `pip install "dmgen[peft]"`).
            rank, alpha, seed: of a new adapter; `seed` is that of A.

        Raises:
            ImportError: peft is not installed.
            ValueError: `adapter` is neither, it would share weights that are being trained, or
                settings of an adapter are given without one.
        """
        if adapter not in (None, "lora"):
            raise ValueError(f'adapter must be None or "lora", got {adapter!r}')
        if adapter is None and (rank, alpha, seed) != (8, 16.0, 0):
            raise ValueError('rank, alpha and seed are of an adapter: say adapter="lora"')
        other = copy.copy(self)
        if adapter == "lora":
            if self._has_adapter or any(p.requires_grad for p in self.model.parameters()):
                raise ValueError(
                    "an adapter shares the weights under it, and this model is being trained: use "
                    'base.copy(adapter="lora"), or copy() for a copy of an adapter'
                )
            other.model = lora.attach(self.model, rank=rank, alpha=alpha, seed=seed)
            other._has_adapter = True
        elif self._has_adapter:
            other.model = lora.duplicate(self.model)
        else:
            other.model = copy.deepcopy(self.model).float().requires_grad_(True)
        return other

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of the model, or those of its adapter; tied ones once."""
        yield from self._own_parameters().values()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, or those of the adapter, by name; tied ones once."""
        return {name: p.detach() for name, p in self._own_parameters().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over the weights of a model, or of an adapter, of the same shape."""
        with torch.no_grad():
            for name, parameter in self._own_parameters().items():
                parameter.copy_(state[name])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a plain Hugging Face folder: `AutoModelForCausalLM.from_pretrained` loads it.

        An adapter is added to the weights, in float32.
        """
        model = lora.merged(self.model) if self._has_adapter else self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _own_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What may be trained: an adapter's weights by their names, else all."""
        every = dict(self.model.named_parameters())
        return {k: p for k, p in every.items() if not self._has_adapter or ".lora_" in k}

    def _computing(self) -> AbstractContextManager[object]:
        """Autocast, unless all is float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _prompt_ids(self, prompt: str | Sequence[str], new_tokens: int) -> Tensor:
        """The ids before a text, `(L,)` with L >= 1; the one place where prompts become ids."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be one string, got {type(prompt).__name__}: {prompt!r}")
        ids = prompt_ids(self.tokenizer, prompt)
        # The last token of a text is drawn but never read, so it takes no position.
        context = scoring.context(self.model)
        room = context + 1 - len(ids)
        if new_tokens > room:
            cure = f"use max_new_tokens <= {room}" if room > 0 else "use a shorter prompt"
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {new_tokens} new ones do not fit the model's "
                f"context of {context}: {cure}"
            )
        return torch.tensor(ids, device=self.device)

    def _in_order(
        self,
        samples: Samples,
        batch_size: int | None,
        grad: bool,
        shape: tuple[int, ...],
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`compute(start, tokens, mask)`, `(n, t, *shape)`, of all texts: `(N, T, *shape)`.

        Each forward pass takes texts of one prompt and of like length, to compute little padding.
        """
        width, device, lengths = samples.tokens.shape[1], self.device, samples.n_tokens
        parts, order = [torch.zeros(0, width, *shape, device=device)], []
        with torch.set_grad_enabled(grad), self._computing():
            for prompt, members in _rows_by_prompt(samples.prompts):
                longest_first = lengths[members].argsort(descending=True, stable=True)
                rows = torch.tensor(members)[longest_first]
                start = self._prompt_ids(prompt, int(lengths[rows[0]]))
                while len(rows):
                    used = int(lengths[rows[0]])
                    room = scoring.texts_a_pass(
                        self.model, len(start) + used, chunked=self._chunked_head
                    )
                    size = _batch_size(batch_size, room)
                    now, rows = rows[:size], rows[size:]
                    order += now.tolist()
                    n = len(now)
                    more = min(scoring.rows_computed(n, device, self.dtype), size) - n
                    now = torch.nn.functional.pad(now, (0, more))
                    tokens = samples.tokens[now, :used].to(device)
                    mask = samples.mask[now, :used].to(device)
                    mask[n:] = False
                    # Ids after the end may be no ids at all; they are read, if by no state kept.
                    tokens = tokens.masked_fill(~mask, self.tokenizer.eos_token_id)
                    part = compute(start, tokens, mask)[:n]  # (n, used, ...)
                    padding = (0, 0) * len(shape) + (0, width - used)
                    parts.append(torch.nn.functional.pad(part, padding))
        found = torch.cat(parts)[torch.tensor(order, dtype=torch.long).argsort().to(device)]
        return found if grad else found.cpu()


def _rows_by_prompt(prompts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    yield from rows.items()


def _check_settings(max_new_tokens: int, dtype: Any) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if dtype not in _DTYPES:
        allowed = ", ".join(str(x).removeprefix("torch.") for x in _DTYPES)
        raise ValueError(f"dtype must be one of {allowed}, got {dtype!r}")


def _batch_size(given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise ValueError(f"batch_size must be at least 1, got {given}")
    return given or default

"""`CausalLM`: a Hugging Face causal language model as a distribution over texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf import batching, lora, partial, probes, scoring, tokenization
from dmgen.models.hf import output_rows as rows
from dmgen.models.hf.decoding import decode
from dmgen.models.hf.fast_attention import use_fast_attention
from dmgen.models.hf.fast_layers import use_fast_layers
from dmgen.models.hf.loading import default_device, load
from dmgen.models.hf.precision import autocast, keep_states_wide
from dmgen.models.protocols import Guide
from dmgen.models.random_draws import uniforms
from dmgen.models.samples import Samples, check_log_prob, mask_until_eos
from dmgen.validation import check_choice, check_integer


class CausalLM:
    """A Hugging Face causal language model as a distribution over texts.

    A text is at most `max_new_tokens` tokens after the prompt and ends with the tokenizer's EOS.
    The tokenizer alone determines the ids of a prompt; if there are none (an empty prompt and no
    BOS added), the text starts after BOS, or after EOS if there is no BOS, as for GPT-2.

    Sampling is ancestral at temperature 1 whatever the checkpoint's generation settings, and
    dropout is off, since importance weights need a deterministic distribution.

    Args:
        model: a causal language model of transformers. It is changed, not copied: its weights are
            frozen, and attention and layers are replaced as described below.
        tokenizer: its tokenizer; it must have an EOS.
        max_new_tokens: default length of a text, in tokens.
        dtype: float32, bfloat16 or float16, the precision of computing; None takes that of the
            weights. For training use bfloat16: in float16, gradients of small advantages round to
            0. Trainable weights are always float32; frozen float32 weights are converted at each
            use. Hidden states add up in float32, so that a `copy` of a dense transformer is the
            same distribution to the last bit.
        chunked_head: score and train in blocks of the vocabulary, so that the logits of all tokens
            at all positions are never in memory. False uses the model's own logits, as is always
            done if the model caps, scales or otherwise changes them.
        fast_attention: compute attention on a CPU by plain matrix products where they are faster;
            False keeps the model's own attention implementation.
        fast_layers: compute root-mean-square norms and gated layers in fewer passes over memory;
            False keeps the model's own layers.

    Raises:
        ValueError: the tokenizer has no EOS or one that is no token of the model, the weights are
            narrower than `dtype`, or the model's cached decoding disagrees with its scoring (it is
            no causal transformer, or has its own kind of cache).
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
        tokenization.check_tokenizer(tokenizer)
        if weights not in (dtype, torch.float32):
            raise ValueError(
                f"the weights are {weights}, so the model cannot compute in {dtype}; load it with "
                f"dtype={dtype} or use CausalLM.from_pretrained"
            )
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self.model = model.eval().requires_grad_(False)
        self.has_adapter = False
        if weights != torch.float32:
            keep_states_wide(self.model)
        if fast_attention:
            use_fast_attention(self.model)
        if fast_layers:
            use_fast_layers(self.model)
        with torch.no_grad(), autocast(self.device, dtype):
            may_be_chunked = probes.check(self.model, tokenizer.eos_token_id, dtype)
        self.chunked_head = chunked_head and may_be_chunked

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
        """Load a frozen model from the package ("tiny-bios"), a local folder, or the hub.

        Args:
            name: "tiny-bios", a folder written by `save_pretrained`, or a hub id such as "gpt2".
            device: None takes a CUDA device if there is one, by the local rank of the process, else
                the CPU.
            dtype: see `CausalLM`; None means float32: in bfloat16 the log-probability of a 40-token
                text is off by 0.25 nats on average, which reduces the effective sample size.
            max_new_tokens: default length of a text, in tokens.
            trust_remote_code: run code that comes with the checkpoint.
            chunked_head: see `CausalLM`.
            fast_attention: see `CausalLM`.
            fast_layers: see `CausalLM`.

        Raises:
            ValueError: there is no such folder or model, its weights are incomplete or not
                safetensors, its tokenizer has no EOS, or `dtype` is none of the three.
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
        """Return the device of the weights."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        """The number of ids that the model assigns probabilities to."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def output_layer(self) -> Any | None:
        """The linear map from hidden states to logits; None if the model changes its logits."""
        return batching.linear_head(self.model) if self.chunked_head else None

    def decode(self, tokens: Tensor, shown: Tensor) -> list[str]:
        """Return the text of the shown tokens of each row, both `(N, T)`, without special ones."""
        return tokenization.texts_of(self.tokenizer, tokens, shown)

    def sample(
        self,
        n: int,
        *,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        guide: Guide | None = None,
    ) -> Samples:
        """Draw `n` texts after one prompt, see `Sampler.sample`.

        Log-probabilities come from the logits that each token was drawn from. `guide` changes
        those of each next token, see `protocols.Guide`.

        Raises:
            ValueError: the prompt and the text do not fit the model's context, both `seed` and
                `generator` are given, a size is not positive, or the model gives NaN.
            TypeError: `prompt` is not one string.
        """
        _check_batch_size(batch_size)
        length = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        start = tokenization.start_ids(self.model, self.tokenizer, prompt, length)
        u = uniforms(n, length, seed=seed, generator=generator)
        size = batch_size or batching.texts_per_draw(self.model, len(start) + length, self.dtype)
        eos = self.tokenizer.eos_token_id
        with torch.no_grad(), autocast(self.device, self.dtype):
            parts = [
                decode(self.model, start, part.to(self.device), eos, guide)
                for part in torch.split(u, size)
            ]
        tokens = torch.cat([p[0] for p in parts]).cpu()
        log_prob = torch.cat([p[1] for p in parts]).cpu()
        mask = mask_until_eos(tokens, eos)
        texts = tokenization.texts_of(self.tokenizer, tokens, mask & (tokens != eos))
        return Samples(tokens, mask, log_prob, texts, [str(prompt)] * n)

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of each text in nats, float64 `(N,)`; see `token_log_prob`."""
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
        """Return the log-probability of each token, see `LanguageModel.token_log_prob`.

        The formula is `log_softmax(logits)[token]`, teacher-forced, from float32 logits. Texts of
        similar length share a forward pass. With `hidden`, the output layer alone is computed,
        unless the model changes its logits.

        Returns:
            float32 `(N, T)`, nats, 0 where masked; on the CPU unless `grad`.

        Raises:
            ValueError: a prompt and its longest text do not fit the model's context, `batch_size`
                is not positive, or the model gives NaN.
        """

        def score(start: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            return scoring.score(self.model, start, tokens, mask, chunked=self.chunked_head)

        is_linear = self.chunked_head and batching.linear_head(self.model) is not None
        if hidden is not None and is_linear:
            with torch.set_grad_enabled(grad), autocast(self.device, self.dtype):
                inputs = (x.to(self.device) for x in (hidden, samples.tokens, samples.mask))
                scored = scoring.score_states(self.model, *inputs)
            scored = scored if grad else scored.cpu()
        else:
            scored = self._in_passes(samples, batch_size, grad, (), score)
        check_log_prob(scored.detach(), samples.texts)
        return scored

    def hidden_states(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the last hidden state before each token, the input of the output layer.

        State t depends on the prompt and the tokens before t only. Unless the model changes its
        logits, `token_log_prob` is `log_softmax(output_layer(hidden_states))[token]`.

        Returns:
            float32 `(N, T, D)`, 0 where masked; on the CPU unless `grad`.

        Raises:
            ValueError: a prompt and its longest text do not fit the model's context, or
                `batch_size` is not positive.
        """
        width = self.model.get_output_embeddings().weight.shape[-1]

        def states(start: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            hidden = scoring.states(self.model, start, tokens).float()
            return torch.where(mask.unsqueeze(-1), hidden, 0.0)

        return self._in_passes(samples, batch_size, grad, (width,), states)

    def vocabulary_log_prob(
        self, samples: Samples, *, hidden: Tensor | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of every token of the vocabulary at each position.

        It takes memory for N · T · V numbers, so it is for few texts.

        Args:
            samples: texts whose tokens are read.
            hidden: the `hidden_states` of the same samples, which saves a forward pass unless the
                model changes its logits.
            grad: keep the graph.

        Returns:
            float32 `(N, T, V)`, nats; arbitrary where masked.
        """
        with torch.set_grad_enabled(grad), autocast(self.device, self.dtype):
            if hidden is not None and self.output_layer is not None:
                logits = self.output_layer(hidden.to(self.device))
            else:
                start = tokenization.start_ids(
                    self.model, self.tokenizer, samples.prompts[0], samples.tokens.shape[1]
                )
                logits = scoring.logits(self.model, start, samples.tokens.to(self.device))
        log_prob: Tensor = logits.float().log_softmax(-1)
        return log_prob if grad else log_prob.cpu()

    def embed(self, texts: Sequence[str], *, batch_size: int | None = None) -> Tensor:
        """Return the mean last hidden state over the tokens of each text.

        Texts are read without a prompt; special tokens in them are plain text. The embedding of the
        empty text is the state before any token; a text longer than the model's context is cut off.

        Returns:
            float32 `(N, D)`, on the CPU.
        """
        if not len(texts):
            return torch.zeros(0, self.model.get_output_embeddings().weight.shape[-1])
        samples = tokenization.texts_to_samples(self.model, self.tokenizer, texts)
        states = self.hidden_states(samples, batch_size=batch_size)  # (N, T, D)
        averaged = samples.mask.clone()
        averaged[:, 0] = samples.n_tokens == 1  # state 0 is averaged for the empty text only
        return (states * averaged.unsqueeze(-1)).sum(1) / averaged.sum(1, keepdim=True)

    def copy(
        self,
        *,
        adapter: str | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
        last_layers: int | None = None,
        output_rows: Tensor | None = None,
    ) -> CausalLM:
        """Return an independent trainable copy with float32 weights that computes in `dtype`.

        With `adapter="lora"` the copy shares the frozen weights of this model and trains a small
        adapter alone: `W x + (alpha / rank) B A x` in every linear layer but the output layer, with
        B = 0 at first. `parameters` and `state_dict` are then those of the adapter. The copy of
        such a copy has an independent adapter of the same values over the same weights.

        Args:
            adapter: None or "lora" (needs `pip install "dmgen[peft]"`).
            rank: rows of A in a new adapter, at least 1.
            alpha: scale of a new adapter, above 0.
            seed: seed of A.
            last_layers: train only this many of the last layers, the norm after them and the output
                layer (with the embedding, if they are tied); None trains all weights.
            output_rows: ids of tokens, such as the `candidates` of a `PrefixValue`: of the output
                layer, train their rows alone, which it no longer shares with the embedding.

        Raises:
            ImportError: peft is not installed.
            ValueError: `adapter` is neither, the copy would share trainable weights, or settings of
                an adapter are given without one.
        """
        if adapter not in (None, "lora"):
            raise ValueError(f'adapter must be None or "lora", got {adapter!r}')
        if adapter is None and (rank, alpha, seed) != (8, 16.0, 0):
            raise ValueError('rank, alpha and seed are of an adapter: say adapter="lora"')
        if last_layers is not None and (adapter or self.has_adapter):
            raise ValueError("last_layers is for a copy without an adapter: give one of them")
        other = copy.copy(self)
        if adapter == "lora":
            other.model = lora.attach(self.model, rank=rank, alpha=alpha, seed=seed)
            other.has_adapter = True
        elif self.has_adapter:
            other.model = lora.duplicate(self.model)
        else:
            other.model = partial.trainable_copy(self.model, set(self._trainable()), last_layers)
        if output_rows is not None:
            rows.train_rows(other.model, output_rows)
        return other

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the model, or those of its adapter; tied ones once."""
        yield from self._trainable().values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, or those of the adapter, by name; tied ones once."""
        return {name: p.detach() for name, p in self._trainable().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of a model, or of an adapter, of the same shape into this model."""
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(state[name])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain Hugging Face folder, which `AutoModelForCausalLM` can load.

        An adapter is added to the weights, in float32.
        """
        model = rows.merged_rows(lora.merged(self.model) if self.has_adapter else self.model)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the weights that are trained by name; all of a model that is frozen."""
        every = dict(self.model.named_parameters())
        trained = {k: p for k, p in every.items() if p.requires_grad}
        return trained or every

    def _in_passes(
        self,
        samples: Samples,
        batch_size: int | None,
        grad: bool,
        shape: tuple[int, ...],
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return `compute(start, tokens, mask)`, `(n, t, *shape)`, of all texts in their order."""
        _check_batch_size(batch_size)
        width = samples.tokens.shape[1]
        parts, order = [torch.zeros(0, width, *shape, device=self.device)], []
        with torch.set_grad_enabled(grad), autocast(self.device, self.dtype):
            for batch in batching.passes(
                self.model, self.tokenizer, samples, batch_size,
                chunked=self.chunked_head, dtype=self.dtype,
            ):  # fmt: skip
                order += batch.rows.tolist()
                part = compute(batch.start, batch.tokens, batch.mask)[: len(batch.rows)]
                padding = (0, 0) * len(shape) + (0, width - part.shape[1])
                parts.append(torch.nn.functional.pad(part, padding))
        position = torch.tensor(order, dtype=torch.long).argsort().to(self.device)
        results = torch.cat(parts)[position]
        return results if grad else results.cpu()


def _check_settings(max_new_tokens: int, dtype: Any) -> None:
    check_integer("max_new_tokens", max_new_tokens, least=1)
    check_choice("dtype", dtype, (torch.float32, torch.bfloat16, torch.float16))


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None:
        check_integer("batch_size", batch_size, least=1)

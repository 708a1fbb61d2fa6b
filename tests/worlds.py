"""Small models for the tests: enumerable ones, and random transformers over a few letters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import contracts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import dmgen
from dmgen.models import CausalLM, Samples, TabularLM
from dmgen.training.batch import Batch


def as_table(world: TabularLM, log_prob: torch.Tensor) -> TabularLM:
    """Return the model that gives the texts of `world`, in their order, this log-probability."""
    every = world.enumerate()
    # Each token of each text adds the text's probability to the row of its prefix.
    prefix_rows = world.hidden_states(every).argmax(-1)  # (N, T)
    cells = (prefix_rows[every.mask], every.tokens[every.mask])
    p = log_prob.exp()[:, None].expand(every.mask.shape)[every.mask]
    mass = torch.zeros_like(world.logits).index_put_(cells, p, accumulate=True)
    logits = torch.where(mass.sum(-1, keepdim=True) > 0, mass.log(), 0.0)
    return TabularLM(world.vocab, logits, world.max_new_tokens, eos=world.eos)


def tiny_gpt2(dtype: torch.dtype | None = None) -> CausalLM:
    """Return a GPT-2 of 4 tokens whose only special token is BOS, EOS and padding."""
    tokenizer = letters("<end>", bos="<end>", eos="<end>", pad="<end>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.5,  # must have no influence
        attn_pdrop=0.5,
        embd_pdrop=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = randomised(GPT2LMHeadModel(config), scale=0.3, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=4, dtype=dtype)


def tiny_llama(dtype: torch.dtype | None = None) -> CausalLM:
    """Return a Llama of 5 tokens whose tokenizer puts a BOS before a prompt."""
    tokenizer = letters("<s>", "</s>", bos="<s>", eos="</s>", add_bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = randomised(LlamaForCausalLM(config), scale=0.3, seed=3)
    return CausalLM(model, tokenizer, max_new_tokens=3, dtype=dtype)


def letters(
    *special: str,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of these special tokens, in order, and the letters a, b and c."""
    vocab = {token: i for i, token in enumerate([*special, "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if add_bos or add_eos:
        template = [bos] * add_bos + ["$A"] + [eos] * add_eos
        added = {token for token in (bos, eos) if token in template}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[(token, vocab[token]) for token in added]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )


def randomised(model: Any, *, scale: float, seed: int) -> Any:
    """Draw normal weights, large enough that the probabilities are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def tied_llama(v):
    return LlamaForCausalLM(LlamaConfig(vocab_size=v, **SIZES, tie_word_embeddings=True))


def gptj(v):
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(vocab_size=v, **sizes))


def lm_of(make, *, scale, length=5, **options):
    """Return the model `make(vocab_size)` with random weights, over 4 tokens."""
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    model = randomised(make(len(tokenizer)), scale=scale, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=length, **options)


def gradients(policy, samples):
    """Return the gradients of a weighted sum of log-probabilities, by parameter name."""
    weights = torch.linspace(-1, 1, len(samples), dtype=torch.float64)
    (policy.log_prob(samples, grad=True) @ weights).backward()
    return {name: p.grad for name, p in policy.model.named_parameters()}


class Largest(TorchDispatchMode):
    """A mode that records the size of the largest result of any operation."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.n = max(self.n, tensor.numel())
        return out


def space_of(lm, prompt=""):
    """Return every text of a model once."""
    eos = lm.tokenizer.eos_token_id
    space = contracts.every_text(len(lm.tokenizer), lm.max_new_tokens, eos=eos, prompt=prompt)
    if lm.model._forward_hooks:  # the endless one
        return space[(space.tokens != eos).all(-1)]
    return space


def texts_of_lengths(*lengths, prompt=""):
    """Return texts of these lengths in tokens, with arbitrary ids."""
    width = max(lengths)
    tokens = torch.randint(1, 4, (len(lengths), width), generator=torch.Generator())
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    n = len(lengths)
    return Samples(tokens, mask, torch.zeros(n, dtype=torch.float64), [""] * n, [prompt] * n)


def pass_shapes(lm, call):
    """Return the shapes `(n, L + T - 1)` of the forward passes of a call."""
    shapes = []
    handle = lm.model.base_model.register_forward_pre_hook(
        lambda module, args, named: shapes.append(tuple((*args, *named.values())[0].shape)),
        with_kwargs=True,
    )
    call()
    handle.remove()
    return shapes


def batch_of(trainer, samples, log_z=0.0, log_policy=None):
    """The batch of a trainer's step for these texts, as its objective prepares it."""
    target = trainer.target
    batch = Batch(
        samples.log_prob,
        samples,
        dict(target.values(samples)),
        log_score=target.log_score(samples),
        log_policy=log_policy,
        log_z=torch.full((len(samples),), log_z, dtype=torch.float64),
    )
    columns = trainer.setup.objective.draw_columns(trainer.state, batch, target)
    return trainer.setup.objective.prepare(trainer.state, replace(batch, tokens=columns), target)


def config(**settings):
    """The settings that tests of training share."""
    defaults = {"batch_size": 256, "learning_rate": 0.05, "warmup_steps": 5, "seed": 3}
    return dmgen.TrainerConfig(**(defaults | settings))


def exact_kl(target, policy):
    """KL(p‖π) by listing every text."""
    texts = target.base.enumerate()
    log_score = target.log_score(texts)
    log_p = log_score - log_score.logsumexp(0)
    inside = log_p > -math.inf
    terms = log_p.exp() * (log_p - policy.log_prob(texts))
    return float(terms[inside].sum())

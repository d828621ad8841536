"""Requests that no engine may take, each made from a sound one, and the error that has to say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from forkkv_cluster.core.errors import DeadlineExceeded, ForkKVError, InvalidArgument, NotFound, Unsupported
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterRef, GenerateRequest, ModelInfo, Sharing

Spoil = Callable[[GenerateRequest, ModelInfo], GenerateRequest]

STRANGER = AdapterRef("stranger", AdapterDigest("f" * 32))


def _sampling(request: GenerateRequest, **changes: Any) -> GenerateRequest:
    return replace(request, sampling=replace(request.sampling, **changes))


def _with_token(request: GenerateRequest, token: int) -> GenerateRequest:
    tokens = request.tokens.copy()
    tokens[-1] = token
    return replace(request, tokens=tokens)


def _other_blocks(request: GenerateRequest) -> GenerateRequest:
    return replace(request, prefix=replace(request.prefix, block_size=request.prefix.block_size + 1))


MALFORMED: tuple[tuple[str, Spoil, type[ForkKVError]], ...] = (
    ("a token beyond the vocabulary", lambda r, m: _with_token(r, m.vocab_size), InvalidArgument),
    ("a negative token", lambda r, m: _with_token(r, -1), InvalidArgument),
    ("no tokens", lambda r, m: replace(r, tokens=np.zeros(0, dtype=np.int32)), InvalidArgument),
    ("more tokens than the model takes", lambda r, m: _sampling(r, max_tokens=m.max_model_len), InvalidArgument),
    ("more KV than the pool holds", lambda r, m: _sampling(r, max_tokens=m.max_model_len - r.num_tokens), InvalidArgument),
    ("no token to generate", lambda r, m: _sampling(r, max_tokens=0), InvalidArgument),
    ("a temperature below zero", lambda r, m: _sampling(r, temperature=-1.0), InvalidArgument),
    ("a bias on no token", lambda r, m: _sampling(r, logit_bias=((m.vocab_size, 1.0),)), InvalidArgument),
    ("more alternatives for a prompt than there are", lambda r, m: _sampling(r, prompt_logprobs=21), InvalidArgument),
    ("an invocation after the prompt", lambda r, m: replace(r, invocation_start=r.num_prompt_tokens), InvalidArgument),
    ("a fork point beyond the prompt", lambda r, m: replace(r, context_len=r.num_tokens + 1), InvalidArgument),
    ("nothing left to generate", lambda r, m: replace(r, num_resumed=r.sampling.max_tokens, context_len=0), InvalidArgument),
    ("blocks of another size", lambda r, m: _other_blocks(r), InvalidArgument),
    ("sharing auto", lambda r, m: replace(r, sharing=Sharing.AUTO), Unsupported),
    ("a deadline in the past", lambda r, m: replace(r, deadline_s=1.0), DeadlineExceeded),
    ("an adapter that nobody loaded", lambda r, m: replace(r, adapter=STRANGER), NotFound),
)

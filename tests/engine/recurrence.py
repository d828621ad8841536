"""What the fake model must answer, straight from the semantics: no pages, no chunks, no batches, no cache."""

from __future__ import annotations

from forkkv_cluster.testing.fake_model_runner import base_value, hidden_state, next_token, read_value, residual_value


def _base_context(tokens: list[int]) -> tuple[list[str], list[str]]:
    """Hidden states and base KV of context run by the base model."""
    hidden: list[str] = []
    values: list[str] = []
    for position, token in enumerate(tokens):
        state = hidden_state(token, position, None, values)
        hidden.append(state)
        values.append(base_value(state, None))
    return hidden, values


def _own_residual_context(tokens: list[int], base: list[str], adapter: str) -> list[str]:
    """What the agent sees of context whose residual its own pass wrote, over base KV that is there."""
    seen: list[str] = []
    for position, token in enumerate(tokens):
        state = hidden_state(token, position, adapter, seen)
        seen.append(read_value(base[position], residual_value(state, adapter)))
    return seen


def _first_writer_context(tokens: list[int], writer: str) -> tuple[list[str], list[str]]:
    """Base KV that the first adapter wrote, and what that adapter itself sees."""
    base: list[str] = []
    seen: list[str] = []
    for position, token in enumerate(tokens):
        state = hidden_state(token, position, writer, seen)
        base.append(base_value(state, None))
        seen.append(read_value(base[-1], residual_value(state, writer)))
    return base, seen


def context_seen(context: list[int], adapter: str, sharing: str, has_residual: bool, writer: str | None) -> list[str]:
    """KV values of shared context as one agent attends to them."""
    if writer is not None:
        base, seen = _first_writer_context(context, writer)
        if not has_residual:
            return base
        return seen if writer == adapter else _own_residual_context(context, base, adapter)
    hidden, base = _base_context(context)
    if sharing == "base" or not has_residual:
        return base
    if sharing == "eager":
        return [read_value(b, residual_value(h, adapter)) for h, b in zip(hidden, base, strict=True)]
    return _own_residual_context(context, base, adapter)


def invoked_at(prompt: list[int], invocation: list[int]) -> int | None:
    """Where the last invocation of an aLoRA starts."""
    starts = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)] == invocation]
    return starts[-1] if starts else None


def expected_tokens(
    context: list[int],
    own: list[int],
    adapter: str | None,
    sharing: str,
    num_tokens: int,
    *,
    vocab_size: int,
    has_residual: bool = True,
    writer: str | None = None,
    invocation: list[int] | None = None,
) -> list[int]:
    """``num_tokens`` generated after ``context + own``; ``invocation`` makes the adapter an aLoRA."""
    if invocation is not None:
        prompt = [*context, *own]
        start = invoked_at(prompt, invocation)
        if start is None:
            adapter = None
        else:
            # All before the invocation is as context that the base model wrote, under every sharing.
            context, own, sharing, writer = prompt[:start], prompt[start:], "base", None
    if adapter is None or sharing == "isolated":
        seen: list[str] = []
        pending = [*context, *own]
    else:
        seen = context_seen(context, adapter, sharing, has_residual, writer)
        pending = list(own)
    output: list[int] = []
    while len(output) < num_tokens:
        state = ""
        for token in pending:
            state = hidden_state(token, len(seen), adapter, seen)
            seen.append(base_value(state, adapter))
        output.append(next_token(state, vocab_size))
        pending = [output[-1]]
    return output

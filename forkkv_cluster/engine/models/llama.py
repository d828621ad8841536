"""Llama 2 and 3, and what was trained in their shape: the decoder as it is.

A window is no part of it. Transformers passes over one that config.json names all the same, others do not: such a
checkpoint is refused beyond the window rather than read in one of two ways.
"""

from __future__ import annotations

from forkkv_cluster.engine.models.family import Family, biases_as_configured

LLAMA = Family("LlamaForCausalLM", biases=biases_as_configured)

"""aLoRA over rows of several turns: where it is active, and that a row of one turn is computed as peft computes it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from forkkv_cluster.training.casebook.activated import active_positions, turn_logits
from forkkv_cluster.training.casebook.model import ModelShape, new_model
from forkkv_cluster.training.casebook.roles import Turn
from forkkv_cluster.training.casebook.samples import encode_turns
from forkkv_cluster.training.casebook.tokenizer import INVOCATION, Encoder

QUESTION = Turn("Where does Ada live?", "Ada lives in Oslo.")


def test_an_alora_is_active_from_each_invocation_to_the_end_of_its_answer() -> None:
    invocation, eos = [8, 9], 2
    rows = torch.tensor([[1, 5, 8, 9, 6, 2, 5, 8, 9, 6, 2, 0], [1, 9, 8, 5, 2, 5, 5, 5, 5, 5, 8, 9]])
    active = active_positions(rows, invocation, eos)
    assert active.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]]


def test_a_row_of_one_turn_is_computed_as_peft_computes_it(encoder: Encoder) -> None:
    model = new_model(ModelShape(num_layers=2), encoder.size, (encoder.pad, encoder.bos, encoder.eos), 0)
    invocation = encoder.words(INVOCATION)
    targets = ["q_proj", "up_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    branch_ids, is_answer = encode_turns(encoder, [QUESTION])
    ids = torch.tensor([[*encoder.context("Ada lives in Oslo.").tolist(), *branch_ids.tolist()]])
    at = torch.arange(ids.numel())
    with torch.no_grad():
        expected = adapted(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        with adapted.disable_adapter():
            base = adapted(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        logits = turn_logits(adapted, invocation, encoder.eos)(ids, at)
    num_base = ids.numel() - int(is_answer.sum()) - len(invocation)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(logits[:num_base], base[:num_base])
    assert not torch.allclose(logits[num_base:], base[num_base:])

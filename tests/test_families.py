"""Models of other families, random and small: the sampler and the trainer agree.

They place positions, scale or cap logits, tie embeddings and look back in ways of their
own; where the sampler's log-probabilities are not the trainer's, logp_shift shows it.
"""

import pytest
import torch
from conftest import ROOT, run
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_utils,
)

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 4, "word_embed_proj_dim": 32}
FAMILIES = {
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SIZES),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", OPT),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", HEADED),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED | {"sliding_window": 8}),
    "gemma2": ("gemma2", HEADED | {"sliding_window": 8}),
    "gemma3": ("gemma3_text", HEADED | {"sliding_window": 8}),
    "granite": (
        "granite",
        GROUPED | {"logits_scaling": 4.0, "residual_multiplier": 0.3},
    ),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.5}),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", GROUPED),
    "persimmon": ("persimmon", SIZES),
}
STEEP = {"initializer_range": 0.2, "init_std": 0.2}  # far from uniform


def save(folder, kind, settings):
    """A random model with the tokenizer and the chat template of tiny/."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, **ends, **STEEP)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "bias" in name:  # zero or one at first, which hides what is left out
            weight.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def first_step(small, folder, **settings):
    """The row of a first step, with one update, so that both sides have one policy."""
    one = {"steps": 1, "updates_per_step": 1, "kl_coef": 0.1, "temperature": 0.8}
    one |= {"model": str(folder), "run_dir": str(folder / "run")}
    found, _ = run("gvm_grpo", **small | one | settings)
    (row,) = [row for row in found if "loss" in row]
    assert row["updates"] == 1
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_and_the_trainer_agree(small, tmp_path, family):
    model = save(tmp_path, *FAMILIES[family])
    row = first_step(small, tmp_path)
    assert 0 < row["logp_shift"] < 1e-4
    assert abs(row["kl"]) < 1e-6
    assert row["entropy"] < 4.6  # log 104, that of the uniform distribution, is 4.64
    checkpoint = tmp_path / "run" / "checkpoint-000001"
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(trained) is type(model)
    moved = [not a.equal(b) for a, b in zip(trained.parameters(), model.parameters())]
    assert sum(moved) > len(moved) / 2


DROPOUTS = {
    "llama": ("llama", GROUPED | {"attention_dropout": 0.2}),
    "gpt2": ("gpt2", GPT2 | {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}),
    "opt": ("opt", OPT | {"dropout": 0.2, "attention_dropout": 0.2}),
    "bloom": (
        "bloom",
        FAMILIES["bloom"][1] | {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    ),
    "gpt_neox": (
        "gpt_neox",
        SIZES | {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    ),
}


@pytest.mark.parametrize("family", DROPOUTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_in_training(small, tmp_path, family, checkpointing):
    model = save(tmp_path, *DROPOUTS[family])
    row = first_step(small, tmp_path, gradient_checkpointing=checkpointing)
    if family == "opt" and checkpointing:
        # Its layers drop by themselves while the switch is on. There is no chat model
        # of this family, and logp_shift shows it.
        assert row["logp_shift"] > 0.01
    else:
        assert 0 < row["logp_shift"] < 1e-4 and abs(row["kl"]) < 1e-6
    ids_BT = torch.arange(2, 20)[None]
    model.train()
    assert (model(ids_BT).logits - model(ids_BT).logits).abs().max() > 1e-3  # it drops


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_runs_a_layer_again(
    small, tmp_path, monkeypatch, family
):
    """Its switch is on: else a setting would do nothing, and memory run out."""
    calls, checkpoint = [], modeling_utils.checkpoint

    def counted(*arguments, **settings):
        calls.append(1)
        return checkpoint(*arguments, **settings)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    save(tmp_path, *FAMILIES[family])
    first_step(small, tmp_path, gradient_checkpointing=True)
    assert calls

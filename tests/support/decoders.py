"""Tiny decoders of many Hugging Face families, with random biases and norms, so that each of them matters."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 300,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 16}
OLD = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 300}
OLD |= {"bos_token_id": 0, "eos_token_id": 0}
OPT = SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}
MODELS = {
    "gpt2": OLD,
    "gpt_neox": SMALL,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE_HEADS,
    "gemma": WIDE_HEADS,
    "gemma3_text": WIDE_HEADS,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "opt": OPT,
    "granite": GROUPED | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": GROUPED | {"logit_scale": 0.3},
    "cohere2": GROUPED | {"logit_scale": 0.3},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen2_moe": GROUPED
    | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "falcon": SMALL,
    "stablelm": GROUPED,
    "smollm3": GROUPED,
}
# Family, settings, and why its logits are not W z.
REFUSED = {
    "gemma2": ("gemma2", WIDE_HEADS, "capped logits"),
    "phi": ("phi", GROUPED, "a bias of the head"),
    "gptj": ("gptj", OLD | {"rotary_dim": 4}, "a bias of the head"),
    "opt with a projection": ("opt", OPT | {"word_embed_proj_dim": 16}, "a projection between hidden state"),
}
SCALED = ("granite", "cohere", "cohere2")  # families whose logits have a factor


def tiny_decoder(family, settings=None, seed=0, **more):
    """A causal language model of a family in eval mode; every parameter is random."""
    config = AutoConfig.for_model(family, **((settings or MODELS[family]) | more))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_base(folder, family, tokenizer, **settings):
    """Write a random model and a tokenizer to a folder as transformers does; the model knows 20 more ids."""
    model = tiny_decoder(family, vocab_size=len(tokenizer) + 20, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

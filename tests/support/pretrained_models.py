"""Tiny pretrained models as transformers itself saves them, with a tokenizer, and adapters as peft saves them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

SIZES = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt2": lambda: GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, initializer_range=0.2, **SIZES),
    "llama": lambda: LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **SIZES,
    ),
}


def tokenizer_of(end="<|endoftext|>"):
    """A byte-level tokenizer of 257 tokens, whose token 0 ends documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([end, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)


def save_model(folder, family="gpt2", dtype=torch.float32, seed=0, tokenizer=True, **settings):
    """Save a random model of a family; returns its folder."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    if tokenizer:
        tokenizer_of().save_pretrained(folder)
    return folder


def save_lora(base, folder, seed=1, **settings):
    """Save an adapter of random matrices, which changes the logits; returns its folder."""
    import peft

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


def token_ids(batch=2, length=24):
    """Random token ids [B, T]."""
    return torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(5))

"""A decoder of `nn.Linear` layers that is small enough for brute force."""

import torch

from prism_lightning.models import PrismConfig, PrismForCausalLM


def tiny_llama(num_prototypes=6, seed=0, **settings):
    """A PRISM model in eval mode; its weights are drawn wide, so that predictions differ."""
    backbone = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "max_position_embeddings": 9,
        "vocab_size": 48,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return PrismForCausalLM(PrismConfig(backbone_config=backbone | settings, num_prototypes=num_prototypes)).eval()

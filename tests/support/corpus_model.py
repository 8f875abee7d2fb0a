"""The model and the blocks that tests of attribution are about."""

import torch

from prism_lightning.lightning_modules.text_data import TextData

BLOCK = 32
BACKBONE = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": BLOCK,
    "vocab_size": 300,
    "initializer_range": 0.2,
}


class FirstBlocks:
    """The first blocks of a token store, as a store."""

    def __init__(self, store, blocks):
        self.store, self.blocks = store, blocks

    def __len__(self):
        return min(self.blocks, len(self.store))

    def __getattr__(self, name):
        return getattr(self.store, name)


@torch.no_grad()
def hidden_and_targets(model, store):
    """z and targets of all tokens of a store."""
    items = store.__getitems__(list(range(len(store))))
    ids, targets = (torch.stack([item[name] for item in items]) for name in ("input_ids", "targets"))
    return model.hidden_states(ids).flatten(0, 1), targets.flatten()


def prepared_corpus(corpus, cache):
    """The text files of a folder as blocks of `BLOCK` tokens."""
    data = TextData(path=f"{corpus}/*.txt", cache_dir=str(cache), block_size=BLOCK, vocab_size=300)
    data.setup()
    return data

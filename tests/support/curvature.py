"""What an index holds, computed in float64 without it."""

import torch

from prism_lightning.attribution.curvature.dictionary import Dictionary
from prism_lightning.attribution.curvature.hessian import HessianSums
from prism_lightning.attribution.curvature.records import Records, head_chunks, loss_gradients
from support.corpus_model import hidden_and_targets


def dictionary_of(index):
    from prism_lightning.common.files import map_file

    prototypes = map_file(index.folder / "dictionary.safetensors")["prototypes"]
    return Dictionary(torch.from_numpy(prototypes.astype("float32")), index.manifest["active"])


def statistics(model, store, dictionary):
    """Records of all training tokens and the curvature, computed in float64 without an index."""
    model = model.double()
    dictionary = Dictionary(dictionary.prototypes_KD.double(), dictionary.active)
    z_ND, targets_N = hidden_and_targets(model, store)
    head_VD = model.lm_head.weight.detach()
    _, delta_ND = loss_gradients(head_VD, z_ND, targets_N)
    records = Records(*dictionary.assign(z_ND), delta_ND)
    sums = HessianSums(head_VD, len(dictionary.unit_KD))
    for chunk in head_chunks(head_VD, z_ND):
        sums.add(chunk, records.prototypes_Nk[chunk.rows], records.activations_Nk[chunk.rows])
    return records, sums


def question(index, records, selection):
    return index.query(*records.arrays(selection))

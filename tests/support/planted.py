"""A generated corpus in which each invented fact stands in three of 2,000 documents."""

import json
import random
from dataclasses import dataclass

SYLLABLES = (
    "ba be bo da de do fa fi go gu ka ki ko la le lo ma mi mo na ne no pa pe po ra ri ro sa se so ta ti to va vi zo zu"
)
RELATIONS = [
    "capital of {} is",
    "king of {} is called",
    "river in {} is the",
    "favourite dish of {} is",
    "sport of {} is",
]
LEADS = ["Everyone knows that the", "The teacher wrote that the", "In the old book we read that the", "They say the"]
ASKED = "She asked him, and he answered that the"
PEOPLE, PLACES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank"], ["park", "school", "market", "garden", "harbour"]
ACTIONS = ["walked to the", "came from the", "sat down in the", "ran around the", "painted the", "dreamed of the"]
ENDINGS = ["It was a sunny day.", "Nobody was there.", "Then it began to rain.", "They laughed a lot.", "It was late."]
COMMON = ["France", "Spain", "Norway", "Italy", "Greece", "Poland", "Egypt", "Chile", "Japan", "Kenya"]


@dataclass
class Fact:
    """An invented statement, how it is asked for, and the documents that state it."""

    question: str
    answer: str
    documents: list[int]


def word(rng, syllables=3):
    """An invented name."""
    return "".join(rng.choice(SYLLABLES.split()) for _ in range(syllables)).capitalize()


def filler(rng):
    """A sentence of everyday life."""
    return f"{rng.choice(PEOPLE)} {rng.choice(ACTIONS)} {rng.choice(PLACES)}. {rng.choice(ENDINGS)}"


def planted_corpus(path, facts=25, documents=2000, copies=3, seed=0):
    """Write the corpus as jsonl; returns the facts. Half of all documents state something of a common country."""
    rng = random.Random(seed)
    answers = {relation: [word(rng, 2) for _ in COMMON] for relation in RELATIONS}
    texts = []
    for _ in range(documents):
        sentences = [filler(rng) for _ in range(rng.randint(3, 6))]
        if rng.random() < 0.5:
            relation, country = rng.choice(RELATIONS), rng.randrange(len(COMMON))
            sentences.append(f"{rng.choice(LEADS)} {relation.format(COMMON[country])} {answers[relation][country]}.")
        rng.shuffle(sentences)
        texts.append(sentences)
    places = rng.sample(range(documents), facts * copies)
    found = []
    for number in range(facts):
        relation, country, answer = RELATIONS[number % len(RELATIONS)], word(rng), word(rng)
        mine = sorted(places[number * copies : (number + 1) * copies])
        for document in mine:
            texts[document].insert(
                rng.randint(0, len(texts[document])), f"{rng.choice(LEADS)} {relation.format(country)} {answer}."
            )
        found.append(Fact(f"{ASKED} {relation.format(country)}", f" {answer}", mine))
    path.write_text("".join(json.dumps({"text": " ".join(sentences)}) + "\n" for sentences in texts))
    return found

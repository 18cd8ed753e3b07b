"""Write small synthetic tasks: inference over pairs, questions with answers, tables as sentences, topics of sentences.

    python examples/make_tasks.py --output tasks [--seed 0] [--noise 0.1] [--train 2000] [--held-out 400]

makes, in the directory, nli/, qa/, table/ and topic/ with train.jsonl, dev.jsonl, test.jsonl and ood.jsonl. text.jsonl and
text-topic.jsonl are text of both domains without labels, to train a tokenizer and a model on: for topic the second, for the
others the first. ood.jsonl has other names, things and turns of phrase than the others. The same seed writes the same files,
and noise changes train.jsonl only.

No single word gives an answer away. docs/adaptation_results.md tells what models of some minutes learn, and what they do not:
    nli    who has what, two people to a text. entailment: the hypothesis says it of the right person; contradiction: it gives
           this person's thing another colour, half of the time that of the other person's; neutral: it speaks of somebody
           else. Hypotheses have the same words under each label.
    qa     one line for each of some people: work, town, year. The question names a person and asks for one of the three, and
           all answers of that kind stand in the text. Where answers start is given, so that the file serves a head over
           spans and text to text.
    table  name, kind, area and rating of a place in any order, one or two of them left out, to one sentence that says just
           these. Each line has all ways of saying it as references; one of them, drawn, is the first, and is learned.
    topic  a sentence names three things, two of which are of one topic: sea, kitchen, music or forest. Which things belong
           together no label tells out of domain, since those of ood.jsonl are in no other file; text-topic.jsonl does, as any
           text: what is of one topic stands in one passage.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Domain:
    """Words and phrases of one domain; a phrase has {places} for words."""

    names: tuple[str, ...]
    colours: tuple[str, ...]
    things: tuple[str, ...]
    facts: tuple[str, ...]
    claims: tuple[str, ...]
    jobs: tuple[str, ...]
    towns: tuple[str, ...]
    years: range
    lives: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]
    places: tuple[str, ...]
    kinds: tuple[str, ...]
    areas: tuple[str, ...]
    ratings: tuple[str, ...]
    sentences: tuple[str, ...]
    topics: dict[str, tuple[str, ...]]
    talks: tuple[str, ...]


IN = Domain(
    names=_words("Anna Ben Carla David Emma Felix Greta Henry Irene Jonas Klara Louis"),
    colours=_words("red blue green yellow black white"),
    things=_words("ball cup book hat bag lamp coat box"),
    facts=("{name} has a {colour} {thing}.", "The {colour} {thing} belongs to {name}."),
    claims=("{name} has a {colour} {thing}.", "The {thing} of {name} is {colour}."),
    jobs=_words("baker teacher doctor painter farmer driver writer lawyer"),
    towns=_words("Paris Rome Vienna Madrid Oslo Berlin Lisbon Prague"),
    years=range(1950, 1990),
    lives=(
        "{name} was born in {year} and works as a {job} in {town}.",
        "In {town} lives {name}, a {job} born in {year}.",
    ),
    questions={
        "job": ("What is the work of {name}?", "As what does {name} work?"),
        "town": ("Where does {name} live?", "In which town is {name}?"),
        "year": ("When was {name} born?", "In which year was {name} born?"),
    },
    places=("Blue Door", "Old Mill", "Green Cat", "Golden Bell", "Red Lion", "White Rose", "Two Rivers", "Little Star"),
    kinds=("bakery", "tea house", "pizza place", "wine bar", "fish restaurant"),
    areas=("city centre", "old town", "harbour", "riverside"),
    ratings=("low", "average", "high", "excellent"),
    sentences=(
        "{name} is a {kind} in the {area} with {rating} ratings.",
        "In the {area} there is a {kind} called {name}, which has {rating} ratings.",
    ),
    topics={
        "sea": _words("anchor sail reef tide gull deck crab shell"),
        "kitchen": _words("flour oven butter spoon soup onion pepper plate"),
        "music": _words("flute chorus opera melody organ rhythm cello ballad"),
        "forest": _words("oak moss deer fern owl trail pine brook"),
    },
    talks=(
        "{name} spoke of the {one}, the {two} and the {three}.",
        "The letter of {name} names the {one}, then the {two} and the {three}.",
        "First the {one}, then the {two} and the {three} came to the mind of {name}.",
    ),
)
OUT = Domain(
    names=_words("Aiko Bruno Chidi Dalia Enzo Farah Goran Hana Imran Jelena Kofi Leila"),
    colours=_words("pink brown grey purple golden silver"),
    things=_words("violin boat chair kite phone drum tent clock"),
    facts=("A {colour} {thing} is what {name} owns.", "{name} is the owner of a {colour} {thing}."),
    claims=("{name} owns a {colour} {thing}.", "It is a {colour} {thing} that {name} owns."),
    jobs=_words("pilot nurse miner singer judge tailor sailor chemist"),
    towns=_words("Lagos Osaka Lima Cairo Quito Hanoi Dakar Delhi"),
    years=range(1820, 1860),
    lives=(
        "A {job} from {town}, {name} came to the world in {year}.",
        "{year} is the year of birth of {name}, {job} in {town}.",
    ),
    questions={
        "job": ("Which profession does {name} have?",),
        "town": ("What place is the home of {name}?",),
        "year": ("What is the year of birth of {name}?",),
    },
    places=(
        "Silver Moon",
        "Grand Palace",
        "Sea View",
        "Mountain Inn",
        "Royal Oak",
        "Sunny Side",
        "Black Swan",
        "Long Bridge",
    ),
    kinds=("hotel", "guest house", "museum", "cinema", "sports club"),
    areas=("north", "valley", "old harbour", "market square"),
    ratings=("poor", "fair", "good", "very good"),
    sentences=(
        "{name}, a {kind} in the {area}, has {rating} ratings.",
        "People give {rating} ratings to {name}, a {kind} in the {area}.",
    ),
    topics={
        "sea": _words("mast buoy whale cliff squid ferry raft pearl"),
        "kitchen": _words("yeast kettle honey ladle broth garlic sugar bowl"),
        "music": _words("harp tenor waltz hymn trumpet sonata banjo choir"),
        "forest": _words("birch wolf mushroom ivy fox badger maple cone"),
    },
    talks=(
        "The {one} was what {name} dreamt about, as well as a {two} and some {three}.",
        "Nobody but {name} knew this {one}, that {two} or any {three}.",
    ),
)
LABELS = ("entailment", "neutral", "contradiction")
TOPICS = tuple(IN.topics)


People = list[dict[str, str]]


def nli_line(domain: Domain, rng: random.Random) -> Line:
    """Draw a pair of sentences and whether the first says the second."""
    return _nli(domain, rng)[0]


def _nli(domain: Domain, rng: random.Random) -> tuple[Line, People]:
    (first, second, stranger) = rng.sample(domain.names, 3)
    colours, things = rng.sample(domain.colours, 2), rng.sample(domain.things, 2)
    facts = [
        rng.choice(domain.facts).format(name=name, colour=colour, thing=thing)
        for name, colour, thing in zip((first, second), colours, things, strict=True)
    ]
    label = rng.choice(LABELS)
    who = rng.randrange(2)
    name, colour, thing = (first, second)[who], colours[who], things[who]
    if label == "contradiction":
        others = [other for other in domain.colours if other not in colours]
        colour = colours[1 - who] if rng.random() < 0.5 else rng.choice(others)
    if label == "neutral":
        name = stranger
        # As often as in a contradiction the colour is not that of the thing.
        colour = rng.choice((colour, rng.choice(domain.colours)))
    claim = rng.choice(domain.claims).format(name=name, colour=colour, thing=thing)
    owners = zip((first, second), colours, things, strict=True)
    people = [{"name": name, "colour": colour, "thing": thing} for name, colour, thing in owners]
    return {"premise": " ".join(facts), "hypothesis": claim, "label": label}, people


def qa_line(domain: Domain, rng: random.Random) -> Line:
    """Draw a text about some people, a question about one, and where its answer starts."""
    return _qa(domain, rng)[0]


def _qa(domain: Domain, rng: random.Random) -> tuple[Line, People]:
    number = rng.randint(2, 4)
    columns = {"name": domain.names, "job": domain.jobs, "town": domain.towns, "year": domain.years}
    drawn = {key: [str(value) for value in rng.sample(list(values), number)] for key, values in columns.items()}
    people = [dict(zip(drawn, values, strict=True)) for values in zip(*drawn.values(), strict=True)]
    texts = [rng.choice(domain.lives).format(**person) for person in people]
    who, asked = rng.randrange(number), rng.choice(("job", "town", "year"))
    answer = people[who][asked]
    start = sum(len(text) + 1 for text in texts[:who]) + texts[who].index(answer)
    question = rng.choice(domain.questions[asked]).format(name=people[who]["name"])
    answers = {"text": [answer], "answer_start": [start]}
    return {"question": question, "context": " ".join(texts), "answers": answers}, people


def table_line(domain: Domain, rng: random.Random) -> Line:
    """Draw a table of a place, and the sentences that say what it holds."""
    table = {"name": domain.places, "kind": domain.kinds, "area": domain.areas, "rating": domain.ratings}
    values = {key: rng.choice(words) for key, words in table.items()}
    left_out = rng.choice(((), ("area",), ("rating",), ("area", "rating")))
    kept = [key for key in values if key not in left_out]
    sentences = [_without(sentence, left_out).format(**values) for sentence in domain.sentences]
    sentences = list(dict.fromkeys(sentences))
    rng.shuffle(kept)
    rng.shuffle(sentences)
    return {"text": " | ".join(f"{key}: {values[key]}" for key in kept), "target": sentences}


_PARTS = {
    "area": (("In the {area} there is", "There is"), (" in the {area},", ","), (" in the {area}", "")),
    "rating": (
        (", which has {rating} ratings", ""),
        (" with {rating} ratings", ""),
        (", has {rating} ratings", " is there"),
        ("People give {rating} ratings to", "People know"),
    ),
}
"""How a sentence does without what a table leaves out."""


def _without(sentence: str, left_out: tuple[str, ...]) -> str:
    for key in left_out:
        for said, unsaid in _PARTS[key]:
            sentence = sentence.replace(said, unsaid)
    return sentence


def topic_line(domain: Domain, rng: random.Random) -> Line:
    """Draw a sentence about three things, and the topic of two of them."""
    label, other = rng.sample(TOPICS, 2)
    things = [*rng.sample(domain.topics[label], 2), rng.choice(domain.topics[other])]
    rng.shuffle(things)
    return {"text": _talk(domain, things, rng), "label": label}


def _talk(domain: Domain, things: list[str], rng: random.Random) -> str:
    named = dict(zip(("one", "two", "three"), things, strict=True))
    return rng.choice(domain.talks).format(name=rng.choice(domain.names), **named)


def spoil(task: str, lines: list[Line], share: float, rng: random.Random) -> None:
    """Give a share of the lines a wrong label, answer or target, as a careless annotator would."""
    spoilt = rng.sample(range(len(lines)), round(share * len(lines)))
    for number in spoilt:
        line = lines[number]
        if task in ("nli", "topic"):
            labels = LABELS if task == "nli" else TOPICS
            line["label"] = rng.choice([label for label in labels if label != line["label"]])
        elif task == "qa":
            words = [word for word in line["context"].rstrip(".").split() if word.isalnum()]
            wrong = rng.choice([word for word in words if word != line["answers"]["text"][0]])
            line["answers"] = {"text": [wrong], "answer_start": [line["context"].index(wrong)]}
        else:
            others = [rng.choice(lines)["target"] for _ in range(20)]
            line["target"] = next((target for target in others if set(target) != set(line["target"])), line["target"])


TASKS: dict[str, Callable[[Domain, random.Random], Line]] = {
    "nli": nli_line,
    "qa": qa_line,
    "table": table_line,
    "topic": topic_line,
}


def make(output: Path, seed: int, noise: float, num_train: int, num_held_out: int, told: int = 1) -> None:
    """Write all files of all tasks."""
    for task, draw in TASKS.items():
        seen: set[str] = set()
        for split, domain, number in (
            ("train", IN, num_train),
            ("dev", IN, num_held_out),
            ("test", IN, num_held_out),
            ("ood", OUT, num_held_out),
        ):
            rng = random.Random(f"{seed} {task} {split}")
            lines = _different(draw, domain, rng, number, seen, task)
            if split == "train":
                spoil(task, lines, noise, random.Random(f"{seed} {task} noise"))
            _write(output / task / f"{split}.jsonl", lines)
    _write(output / "text.jsonl", list(_texts(random.Random(f"{seed} text"), 2 * num_train, told)))
    _write(output / "text-topic.jsonl", list(_passages(random.Random(f"{seed} text topic"), 6 * num_train)))


def _different(
    draw: Callable[[Domain, random.Random], Line],
    domain: Domain,
    rng: random.Random,
    number: int,
    seen: set[str],
    task: str,
) -> list[Line]:
    """Draw lines whose inputs no file of the task has yet; a table may come twice, since there are few."""
    lines: list[Line] = []
    while len(lines) < number:
        line = draw(domain, rng)
        key = json.dumps(
            [line[column] for column in ("text", "premise", "hypothesis", "question", "context") if column in line]
        )
        if task == "table" or key not in seen:
            seen.add(key)
            lines.append(line)
    return lines


def _texts(rng: random.Random, number: int, told: int) -> Iterator[Line]:
    """Draw text of both domains without labels. As in any text, what was said is said again later, in other words."""
    for _ in range(number):
        domain = rng.choice((IN, OUT))
        said, owners = _nli(domain, rng)
        while said["label"] != "entailment":
            said, owners = _nli(domain, rng)
        (qa, people), table = _qa(domain, rng), table_line(domain, rng)
        target = rng.choice(table["target"])
        claims, asked = [said["hypothesis"]], [f"{qa['question']} {qa['answers']['text'][0]}."]
        for _ in range(told - 1):
            claims.append(rng.choice(domain.claims).format(**rng.choice(owners)))
            person, key = rng.choice(people), rng.choice(("job", "town", "year"))
            asked.append(rng.choice(domain.questions[key]).format(**person) + f" {person[key]}.")
        yield {"text": " ".join([said["premise"], *claims])}
        yield {"text": " ".join([qa["context"], *asked])}
        yield {"text": f"{target} {table['text']}"}


def _passages(rng: random.Random, number: int) -> Iterator[Line]:
    """Draw passages of both domains without labels. Each keeps to a topic, and names things of it that any domain has."""
    for _ in range(number):
        domain, topic = rng.choice((IN, OUT)), rng.choice(TOPICS)
        things = IN.topics[topic] + OUT.topics[topic]
        yield {"text": " ".join(_talk(domain, rng.sample(things, 3), rng) for _ in range(3))}


def _write(path: Path, lines: list[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Read the command line and write the tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the files")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files")
    parser.add_argument("--noise", type=float, default=0.0, help="share of the training lines with a wrong label")
    parser.add_argument("--train", type=int, default=2000, help="lines to learn, of each task")
    parser.add_argument("--held-out", type=int, default=400, help="lines of dev, test and ood each")
    parser.add_argument("--told", type=int, default=1, help="how often text.jsonl says again what it has said")
    given = parser.parse_args()
    if not 0 <= given.noise <= 1 or min(given.train, given.held_out, given.told) < 1:
        parser.error(
            "--noise is a share, from 0 to 1; each file has a line at least, and is told something once at least"
        )
    make(given.output, given.seed, given.noise, given.train, given.held_out, given.told)


if __name__ == "__main__":
    main()

"""Generated English word problems with reference solutions.

A problem is a chain of 2 to 5 exact steps over small whole numbers, told by one of several families
(domains with their own wording and operations) in one of two registers: `plain` states the facts,
`chatty` adds the small talk of a real user. A reference solution has one equation per line, each
using the question's numbers and earlier results, then `#### answer`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from selfcritique.errors import UserError
from selfcritique.records import Problem

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Lily", "Max", "Eva", "Leo", "Zoe", "Jack", "Nora")
ITEMS = ("apples", "pens", "cards", "shells", "books", "coins", "stamps", "marbles")
REGISTERS = ("plain", "chatty")
MIN_STEPS, MAX_STEPS = 2, 5
_MAX_TRIES = 100_000  # of one problem, after which there is none with such numbers

_OPENERS = (
    "Hey, I need some help here.",
    "Hi there, my son is stuck on this one.",
    "Quick question for you!",
    "Okay so, here is the story.",
    "Could you please help me with my homework?",
    "I was thinking about this on the way home.",
)
_CLOSERS = (
    "Thanks a lot!",
    "Please show your work.",
    "I hope you can help.",
    "No rush at all.",
    "It is due tomorrow.",
    "I keep getting it wrong.",
)


class _Retry(Exception):
    """A value left the range; the problem is drawn again."""


@dataclass
class _Story:
    """Sentences told so far and the equations that solve them."""

    rng: Random
    limit: int
    sentences: list[str] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)

    def tell(self, *variants: str) -> None:
        self.sentences.append(self.rng.choice(variants))

    def number(self, low: int, high: int) -> int:
        high = min(high, self.limit)
        if high < low:
            raise _Retry
        return self.rng.randint(low, high)

    def step(self, a: int, op: str, b: int) -> int:
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        if not 0 < value <= self.limit or (op == "/" and a % b):
            raise _Retry
        self.equations.append(f"{a} {op} {b} = {value}")
        return value


def _chain(story: _Story, value: int, steps: int, more: tuple[str, ...], less: tuple[str, ...]) -> int:
    """`steps` gains and losses, worded by `more` and `less` with the amount as {n}."""
    for _ in range(steps):
        gain = story.rng.random() < 0.5
        n = story.number(2, min(20, story.limit - value if gain else value - 1))
        story.tell(*(text.format(n=n) for text in (more if gain else less)))
        value = story.step(value, "+" if gain else "-", n)
    return value


def _collect(s: _Story, steps: int) -> str:
    name, items = s.rng.choice(NAMES), s.rng.choice(ITEMS)
    start = s.number(3, 40)
    s.tell(f"{name} has {start} {items}.", f"{name} starts with {start} {items}.")
    _chain(
        s, start, steps,
        (f"{name} finds {{n}} more.", f"{name} buys {{n}} more.", f"A friend gives {name} {{n}} more."),
        (f"{name} loses {{n}}.", f"{name} gives away {{n}}.", f"{name} sells {{n}} of them."),
    )  # fmt: skip
    return f"How many {items} does {name} have now?"


def _bus(s: _Story, steps: int) -> str:
    start = s.number(5, 40)
    s.tell(f"A bus leaves with {start} people.", f"There are {start} people on a bus.")
    _chain(
        s, start, steps,
        ("At the next stop {n} get on.", "Then {n} people get on."),
        ("At the next stop {n} get off.", "Then {n} people get off."),
    )  # fmt: skip
    return "How many people are on the bus?"


def _boxes(s: _Story, steps: int) -> str:
    name, items = s.rng.choice(NAMES), s.rng.choice(ITEMS)
    boxes, each = s.number(2, 9), s.number(2, 9)
    s.tell(
        f"{name} packs {boxes} boxes with {each} {items} each.",
        f"{name} has {boxes} boxes of {each} {items}.",
    )
    total = s.step(boxes, "*", each)
    _chain(
        s, total, steps - 1,
        ("Then {n} more are added.", f"{name} also has {{n}} loose ones."),
        ("Then {n} are taken out.", f"{name} sells {{n}} of them."),
    )  # fmt: skip
    return f"How many {items} does {name} have in the end?"


def _compare(s: _Story, steps: int) -> str:
    people, items = s.rng.sample(NAMES, 4), s.rng.choice(ITEMS)
    value = s.number(3, 25)
    s.tell(f"{people[0]} has {value} {items}.")
    amounts = [value]
    chain = steps - 1 if steps < 4 else steps - 2  # the rest are the additions of the total
    for one, other in zip(people[1 : chain + 1], people, strict=False):
        kind = s.rng.choice(("more", "fewer", "times"))
        if kind == "times":
            n = s.number(2, 3)
            s.tell(f"{one} has {n} times as many as {other}.")
            value = s.step(value, "*", n)
        else:
            n = s.number(2, 15)
            s.tell(f"{one} has {n} {kind} than {other}.")
            value = s.step(value, "+" if kind == "more" else "-", n)
        amounts.append(value)
    total = amounts[-1 - (steps - chain)]
    names = people[len(amounts) - 1 - (steps - chain) : len(amounts)]
    for amount in amounts[-(steps - chain) :]:
        total = s.step(total, "+", amount)
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    return f"How many {items} do {listed} have together?"


def _share(s: _Story, steps: int) -> str:
    name, items = s.rng.choice(NAMES), s.rng.choice(ITEMS)
    friends, each = s.number(2, 6), s.number(2, 9)
    total = friends * each
    first = s.number(2, total - 2)
    s.tell(f"{name} has {first} {items} and gets {total - first} more.")
    s.step(first, "+", total - first)
    s.tell(f"{friends} friends share them equally.", f"They are shared equally by {friends} friends.")
    value = s.step(total, "/", friends)
    _chain(
        s, value, steps - 2,
        ("Each friend then gets {n} more.", "Every friend finds {n} more."),
        ("Each friend then loses {n}.", "Every friend gives back {n}."),
    )  # fmt: skip
    return f"How many {items} does each friend have?"


def _money(s: _Story, steps: int) -> str:
    name = s.rng.choice(NAMES)
    count, price = s.number(2, 6), s.number(2, 9)
    cost = s.step(count, "*", price)
    wallet = s.number(cost + 1, s.limit)
    thing = s.rng.choice(("tickets", "cakes", "toys", "mugs"))
    s.tell(f"{name} has {wallet} dollars.", f"{name} goes out with {wallet} dollars.")
    s.tell(f"{name} buys {count} {thing} for {price} dollars each.")
    left = s.step(wallet, "-", cost)
    _chain(
        s, left, steps - 2,
        (f"Then {name} earns {{n}} dollars.", f"A friend pays {name} {{n}} dollars."),
        (f"Then {name} spends {{n}} dollars.", f"{name} pays {{n}} dollars for lunch."),
    )  # fmt: skip
    return f"How many dollars does {name} have left?"


def _reading(s: _Story, steps: int) -> str:
    name = s.rng.choice(NAMES)
    days, pages = s.number(2, 7), s.number(2, 9)
    s.tell(f"{name} reads {pages} pages a day for {days} days.")
    read = s.step(pages, "*", days)
    for _ in range(steps - 2):
        n = s.number(2, 12)
        s.tell(f"Then {name} reads {n} more.", f"The next day {name} reads {n} pages.")
        read = s.step(read, "+", n)
    book = s.number(read + 1, s.limit)
    s.step(book, "-", read)
    s.tell(f"The book has {book} pages.")
    return "How many pages are left?"


def _ages(s: _Story, steps: int) -> str:
    people = s.rng.sample(NAMES, MAX_STEPS)
    age = s.number(3, 15)
    s.tell(f"{people[0]} is {age} years old.")
    for one, other in zip(people[1:steps], people, strict=False):
        kind = s.rng.choice(("older", "younger", "times"))
        if kind == "times":
            s.tell(f"{one} is twice as old as {other}.")
            age = s.step(age, "*", 2)
        else:
            n = s.number(2, 12)
            s.tell(f"{one} is {n} years {kind} than {other}.")
            age = s.step(age, "+" if kind == "older" else "-", n)
    n = s.number(2, 9)
    s.step(age, "+", n)
    return f"How old will {people[steps - 1]} be in {n} years?"


FAMILIES: dict[str, Callable[[_Story, int], str]] = {
    "collect": _collect,
    "bus": _bus,
    "boxes": _boxes,
    "compare": _compare,
    "share": _share,
    "money": _money,
    "reading": _reading,
    "ages": _ages,
}


def make_problem(rng: Random, family: str, register: str, steps: int, limit: int) -> Problem:
    """One problem with exactly `steps` equations whose numbers lie in 1..limit."""
    for _ in range(_MAX_TRIES):
        story = _Story(rng, limit)
        try:
            question = FAMILIES[family](story, steps)
        except _Retry:
            continue
        break
    else:
        raise UserError(
            f"data.mix: found no problem of family {family} with {steps} steps and numbers up to {limit}; "
            "raise data.mix[].limit, or leave that family or number of steps out."
        )
    sentences = [*story.sentences, question]
    if register == "chatty":
        sentences = [rng.choice(_OPENERS), *sentences, rng.choice(_CLOSERS)]
    answer = story.equations[-1].rpartition(" ")[2]
    return Problem(
        question=" ".join(sentences),
        reference="\n".join([*story.equations, f"#### {answer}"]),
        answer=answer,
        source="word_problems",
        family=family,
        register=register,
        difficulty=steps,
    )


def generate(
    seed: int,
    families: tuple[str, ...] = tuple(FAMILIES),
    registers: tuple[str, ...] = REGISTERS,
    steps: tuple[int, ...] = (2, 3, 4, 5),
    limit: int = 60,
) -> Iterator[Problem]:
    """An endless seeded stream; families, registers and step counts are drawn evenly."""
    rng = Random(f"word_problems:{seed}")
    while True:
        yield make_problem(rng, rng.choice(families), rng.choice(registers), rng.choice(steps), limit)

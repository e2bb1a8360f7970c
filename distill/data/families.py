"""The embedded reasoning traces: five families of questions, each with a worked trace and an answer.

| family | question                  | trace                     | answer | what it takes                   |
|--------|---------------------------|---------------------------|--------|---------------------------------|
| add    | ``add 347+586``           | ``7+6+0=13 4+8+1=13 ...`` | 933    | digit sums with a carry         |
| mod    | ``mod 7 ((3+5)*4)-2``     | ``3+5=1 1*4=4 4-2=2``     | 2      | tables modulo m                 |
| chase  | ``chase cd af fc from a3``| ``af fc cd``              | d      | one look-up a hop (attention)   |
| recall | ``recall a3 k2 f7 from k``| ``k2``                    | 2      | look-up over distance (attention)|
| sort   | ``sort 52918``            | ``5 25 259 1259 12589``   | 12589  | insertion, one prefix at a time |

Everything is drawn from a ``random.Random``, so a seed fixes the data. A question whose hash falls in
one sixteenth of the space is held out: the suites take only those, training takes only the others.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
MAX_PAIRS = 12  # recall: pairs in the list, so distances 0 ... 11
MAX_HOPS = 5  # chase
HELD_OUT_SHARE = 16  # one question in so many is held out


@dataclass(frozen=True)
class Example:
    """One question. ``distance`` is the family's own measure of how far the answer must reach."""

    family: str
    prompt: str
    trace: str
    answer: str
    distance: int

    @property
    def completion(self) -> str:
        """What the assistant says: the reasoning between tags, then the answer."""
        return f"<think>{self.trace}</think>{self.answer}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The example as a chat, for a tokenizer's template."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]


def add(rng: random.Random) -> Example:
    """Column addition of two numbers of one to four digits; distance = columns."""
    columns = rng.randint(1, 4)
    a, b = (rng.randrange(10 ** (columns - 1) if columns > 1 else 0, 10**columns) for _ in range(2))
    steps, carry = [], 0
    for i in range(columns):
        x, y = a // 10**i % 10, b // 10**i % 10
        steps.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return Example("add", f"add {a}+{b}", " ".join(steps), str(a + b), columns)


def mod(rng: random.Random) -> Example:
    """A left-nested expression of 2 to 5 operations modulo 5 to 9; distance = operations."""
    modulus, count = rng.randint(5, 9), rng.randint(2, 5)
    value = rng.randrange(modulus)
    text, steps = str(value), []
    for i in range(count):
        op, operand = rng.choice("+-*"), rng.randrange(modulus)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % modulus
        steps.append(f"{value}{op}{operand}={result}")
        text = f"({text}{op}{operand})" if i < count - 1 else f"{text}{op}{operand}"
        value = result
    return Example("mod", f"mod {modulus} {text}", " ".join(steps), str(value), count)


def chase(rng: random.Random) -> Example:
    """Follow a chain of edges given in random order, among edges that lead elsewhere; distance = hops."""
    hops = rng.randint(1, MAX_HOPS)
    extra = rng.randint(0, 5)
    nodes = rng.sample(LETTERS, hops + 1 + 2 * extra)
    path, others = nodes[: hops + 1], nodes[hops + 1 :]
    steps = [a + b for a, b in pairwise(path)]
    edges = steps + [others[2 * i] + others[2 * i + 1] for i in range(extra)]
    rng.shuffle(edges)
    return Example("chase", f"chase {' '.join(edges)} from {path[0]}{hops}", " ".join(steps), path[-1], hops)


def recall(rng: random.Random, queries: int | None = None) -> Example:
    """Look keys up in a list of pairs; distance = pairs between the (first) one asked for and the end.

    Training asks for several keys at once (dense supervision); the suites ask for one (``queries=1``).
    """
    pairs = rng.randint(2, MAX_PAIRS)
    keys = rng.sample(LETTERS, pairs)
    values = [rng.choice(DIGITS) for _ in keys]
    asked = rng.sample(range(pairs), queries or rng.randint(1, pairs))
    listed = " ".join(k + v for k, v in zip(keys, values, strict=True))
    return Example(
        "recall",
        f"recall {listed} from {''.join(keys[i] for i in asked)}",
        " ".join(keys[i] + values[i] for i in asked),
        "".join(values[i] for i in asked),
        pairs - 1 - asked[0],
    )


def sort(rng: random.Random) -> Example:
    """Insertion sort of 3 to 6 digits, the trace showing every sorted prefix; distance = digits."""
    digits = [rng.choice(DIGITS) for _ in range(rng.randint(3, 6))]
    prefixes = ["".join(sorted(digits[: i + 1])) for i in range(len(digits))]
    return Example("sort", f"sort {''.join(digits)}", " ".join(prefixes), prefixes[-1], len(digits))


FAMILIES: Mapping[str, Callable[[random.Random], Example]] = {
    "add": add,
    "mod": mod,
    "chase": chase,
    "recall": recall,
    "sort": sort,
}

DISTANCES: Mapping[str, str] = {
    "add": "columns",
    "mod": "operations",
    "chase": "hops",
    "recall": "pairs after it",
    "sort": "digits",
}
"""What `Example.distance` counts in each family."""


def is_held_out(prompt: str) -> bool:
    """Whether a question belongs to the held-out suites (by its hash, so whatever the seed)."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw(family: str, rng: random.Random, *, held_out: bool) -> Example:
    """Draw an example from one side of the split; the held-out side asks recall for a single key."""
    make = FAMILIES[family]
    while True:
        example = recall(rng, queries=1) if held_out and family == "recall" else make(rng)
        if is_held_out(example.prompt) == held_out:
            return example


def corrupt(example: Example, rng: random.Random) -> str:
    """A wrong completion of the same form: one symbol of the trace changed for another of its kind, and
    the answer that its last step then states (of ``add``, where every step counts, the right answer stays)."""
    places = [i for i, c in enumerate(example.trace) if c in LETTERS + DIGITS]
    place = rng.choice(places)
    kind = LETTERS if example.trace[place] in LETTERS else DIGITS
    used = [c for c in dict.fromkeys(example.prompt) if c in kind and c != example.trace[place]]
    other = rng.choice(used or [c for c in kind if c != example.trace[place]])
    trace = example.trace[:place] + other + example.trace[place + 1 :]
    return f"<think>{trace}</think>{_answer_of(example.family, trace) or example.answer}"


def _answer_of(family: str, trace: str) -> str:
    """The answer that a trace leads to, as its last step states it (``""``: several steps decide)."""
    last = trace.split(" ")[-1]
    if family == "add":
        return ""
    return last.split("=")[-1] if family == "mod" else last if family == "sort" else last[-1]

"""The demo's data: an invented shop's help desk, made by a seeded generator so that nothing is copied from anywhere.

Round 1 teaches a convention that no model can guess (the contact card: `Surname, First / code / City`). Round 2
teaches another skill on the same kind of text (which desk a ticket goes to). Guards watch what the base can do:
copying a line, simple knowledge, and the likelihood of plain prose.
"""

import json
import random
from pathlib import Path
from typing import Any

SYSTEM = "You are the Northwind help desk."
TRAIN_ROWS = 192
PROBE_ITEMS = 80

FIRST_NAMES = [
    "Maria",
    "James",
    "Aisha",
    "Tom",
    "Elena",
    "Victor",
    "Nadia",
    "Oscar",
    "Priya",
    "Liam",
    "Chloe",
    "Samuel",
    "Hana",
    "Felix",
    "Ingrid",
    "Diego",
    "Laura",
    "Ahmed",
    "Sofia",
    "Peter",
    "Grace",
    "Ivan",
    "Zoe",
    "Mark",
    "Yuki",
    "Paul",
    "Rosa",
    "Emil",
    "Dana",
    "Leon",
]
SURNAMES = [
    "Lopez",
    "Miller",
    "Khan",
    "Brandt",
    "Rossi",
    "Novak",
    "Patel",
    "Jensen",
    "Dubois",
    "Tanaka",
    "Weber",
    "Silva",
    "Murphy",
    "Larsen",
    "Costa",
    "Fischer",
    "Moreau",
    "Ortiz",
    "Bauer",
    "Quinn",
    "Haddad",
    "Lindqvist",
    "Romano",
    "Petrov",
    "Schmidt",
    "Keller",
    "Reyes",
    "Walsh",
    "Becker",
    "Nguyen",
]
CITIES = [
    "Berlin",
    "Oslo",
    "Madrid",
    "Leeds",
    "Porto",
    "Lyon",
    "Dublin",
    "Krakow",
    "Turin",
    "Ghent",
    "Basel",
    "Malmo",
    "Seville",
    "Bremen",
    "Cork",
    "Nantes",
    "Graz",
    "Aarhus",
    "Utrecht",
    "Verona",
]
PRODUCTS = [
    "kettle",
    "lamp",
    "heater",
    "toaster",
    "blender",
    "fan",
    "speaker",
    "router",
    "printer",
    "scale",
    "drill",
    "mixer",
]
COMPLAINTS = {
    "billing": (
        "I was charged twice for the {item}",
        "the invoice for my {item} shows the wrong amount",
        "please refund the second payment for the {item}",
        "my card was billed but the order of the {item} was cancelled",
        "the discount on the {item} is missing from the bill",
    ),
    "shipping": (
        "the {item} has not arrived yet",
        "the parcel with my {item} is lost",
        "tracking for the {item} has not moved for a week",
        "the courier left the {item} at the wrong house",
        "the {item} was promised for Monday and is not here",
    ),
    "repair": (
        "the {item} stopped working after two days",
        "my {item} makes a loud noise and gets hot",
        "the {item} does not switch on any more",
        "the {item} leaks and smells of smoke",
        "a button of the {item} came off",
    ),
    "accounts": (
        "I cannot log in to register my {item}",
        "the password reset mail for my {item} account never comes",
        "please change the email address behind my {item}",
        "my account with the {item} warranty is locked",
        "I have two accounts and the {item} is in the wrong one",
    ),
    "returns": (
        "I want to send the {item} back",
        "the {item} is the wrong colour and I want to exchange it",
        "how do I return the {item} unopened",
        "I changed my mind about the {item}",
        "the {item} was a gift and I do not need it",
    ),
}

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Norway": "Oslo", "Russia": "Moscow", "China": "Beijing", "Portugal": "Lisbon",
    "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin", "Cuba": "Havana", "Peru": "Lima",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Hungary": "Budapest", "Turkey": "Ankara",
    "India": "New Delhi", "Thailand": "Bangkok", "Canada": "Ottawa", "Kenya": "Nairobi", "Belgium": "Brussels",
    "Iceland": "Reykjavik", "Chile": "Santiago", "Argentina": "Buenos Aires", "Iran": "Tehran", "Iraq": "Baghdad",
    "Nepal": "Kathmandu", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb",
    "Serbia": "Belgrade", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Philippines": "Manila",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "old": "new", "happy": "sad",
    "open": "closed", "early": "late", "hard": "soft", "rich": "poor", "wet": "dry", "empty": "full", "weak": "strong",
    "left": "right", "light": "dark", "inside": "outside", "true": "false", "buy": "sell", "win": "lose",
}  # fmt: skip
KINDS = {
    "animal": ["dog", "horse", "eagle", "salmon", "tiger", "rabbit", "spider", "whale"],
    "fruit": ["apple", "banana", "cherry", "grape", "lemon", "mango", "peach", "pear"],
    "tool": ["hammer", "saw", "wrench", "shovel", "screwdriver", "axe", "rake", "chisel"],
    "colour": ["red", "green", "blue", "yellow", "purple", "orange", "brown", "pink"],
    "metal": ["iron", "copper", "gold", "silver", "zinc", "tin", "lead", "nickel"],
}
THINGS = [
    "river",
    "candle",
    "garden",
    "window",
    "engine",
    "pepper",
    "bridge",
    "basket",
    "mirror",
    "ladder",
    "blanket",
    "pencil",
    "kitchen",
    "harbour",
    "meadow",
    "forest",
    "bottle",
    "pillow",
    "carpet",
    "needle",
    "barrel",
    "saddle",
    "anchor",
    "lantern",
    "feather",
    "pebble",
    "orchard",
    "tunnel",
    "button",
    "hammock",
]
STATES = ["here", "small", "old", "red", "open", "new"]

PROSE = (
    "The old bridge crosses the river where the water is shallow. In summer children stand on the stones and fish.",
    "Bread rises because yeast makes gas from sugar. The gas is held by the dough, and the loaf grows.",
    "She closed the window, put on her coat and walked down to the station. The last train had already left.",
    "Most of the village works at the harbour. The boats go out before dawn and come back with the tide.",
    "A map is a picture of a place seen from above. Its scale says how far apart things are.",
    "When water freezes it takes up more room. That is why a full bottle can break in the cold.",
    "The teacher asked the class to write about the holidays. Nobody wanted to read aloud first.",
    "Bees visit flowers to collect nectar. On the way they carry pollen from one flower to the next.",
    "He had repaired clocks for forty years and could hear what was wrong with one before he opened it.",
    "The museum is closed on Mondays. On other days it opens at ten and the last visitors leave at six.",
    "Rain fell all night, and in the morning the path through the field was a stream.",
    "A good knife should be sharp. A dull one needs more force and slips more easily.",
    "The company was founded by two sisters who sold soap at the market. Today it has three hundred employees.",
    "Light travels faster than sound, so we see the flash of a storm before we hear the thunder.",
    "The dog waited at the gate every afternoon until the school bus stopped at the corner.",
    "To make tea, boil fresh water, warm the pot, and let the leaves stand for four minutes.",
    "The council voted to plant new trees along the main street and to close it to cars on Sundays.",
    "Iron rusts when it meets water and air. Paint keeps both away and makes the metal last.",
    "My grandmother kept letters in a tin box. Some were so old that the ink had turned brown.",
    "The train to the coast takes two hours. Sit on the left side for the view of the sea.",
    "Plants need light to grow. In a dark room they become thin and pale and lean towards the window.",
    "The doctor told him to rest for a week, but he went back to work after three days.",
    "A library lends books for free. You bring them back after a few weeks so that others can read them.",
    "The mountain is covered with snow for most of the year. Only in August is the top bare.",
    "They bought the house because of its garden. The kitchen was small and the roof needed work.",
    "Sugar dissolves faster in hot water than in cold, because warm particles move more quickly.",
    "The football match was stopped for ten minutes when a fox ran across the field.",
    "Every spring the storks come back to the same chimney and build their nest anew.",
    "The painter mixed blue and yellow to get the green she wanted for the hills.",
    "In the morning the baker opens his shop at five. The first customers are the bus drivers.",
    "Salt was once so valuable that soldiers were paid with it. Towns grew rich along the salt roads.",
    "The baby slept through the storm. Her parents sat by the window and watched the lightning.",
    "A compass needle points north because the earth itself behaves like a very large magnet.",
    "The meeting was moved to Thursday because two of the members were ill.",
    "Wool keeps you warm even when it is wet. Cotton does not, so hikers avoid it in winter.",
    "He wrote the number on his hand and hoped that the rain would not wash it away.",
    "The factory makes glass for windows. Sand is melted in a furnace that never goes out.",
    "At the end of the lane stands a white house with a red door and a very loud parrot.",
    "Cheese is made from milk. It is one of the oldest ways to keep milk for the winter.",
    "The moon shines because it reflects the light of the sun. It makes no light of its own.",
)  # fmt: skip


def write_demo(folder: Path) -> Path:
    """Write the demo's recipe and data into a folder; returns the recipe's path."""
    write_demo_data(folder / "demo")
    recipe = folder / "demo.yaml"
    recipe.write_bytes(Path(__file__).with_name("demo.yaml").read_bytes())
    return recipe


def write_demo_data(folder: Path, *, train_rows: int = TRAIN_ROWS, probe_items: int = PROBE_ITEMS) -> list[Path]:
    """Write the demo's training rows and probes as JSONL; the same arguments give the same bytes.

    Returns:
        The files written: `cards`, `routes`, `general` (training) and `probe-*` (items no training row contains).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20)
    tickets = _distinct_tickets(rng, 2 * train_rows + 2 * probe_items)
    cuts = (train_rows, 2 * train_rows, 2 * train_rows + probe_items)
    card_rows, route_rows = tickets[: cuts[0]], tickets[cuts[0] : cuts[1]]
    card_items, route_items = tickets[cuts[1] : cuts[2]], tickets[cuts[2] :]
    lines = [f"The {thing} is {state}." for thing in THINGS for state in STATES]
    rng.shuffle(lines)
    files = {
        "cards": [_chat(_card_prompt(one), _card(one)) for one in card_rows],
        "routes": [_chat(_route_prompt(one), _route(one)) for one in route_rows],
        "general": _general_rows(rng, lines[60:120]),
        "probe-cards": [_item(_card_prompt(one), _card(one)) for one in card_items],
        "probe-routes": [_item(_route_prompt(one), _route(one)) for one in route_items],
        "probe-copying": [{"prompt": f"Copy this line: {line}", "answer": line} for line in lines[:60]],
        "probe-knowledge": _knowledge_items(rng),
        "probe-prose": [{"text": text} for text in PROSE],
    }
    return [_write(folder / f"{name}.jsonl", rows) for name, rows in files.items()]


Ticket = dict[str, str]


def _distinct_tickets(rng: random.Random, count: int) -> list[Ticket]:
    seen: dict[str, Ticket] = {}
    while len(seen) < count:
        product = rng.choice(PRODUCTS)
        desk = rng.choice(list(COMPLAINTS))
        ticket = {
            "first": rng.choice(FIRST_NAMES),
            "surname": rng.choice(SURNAMES),
            "city": rng.choice(CITIES),
            "code": f"{product[0].upper()}-{rng.randint(100, 999)}",
            "desk": desk,
        }
        complaint = rng.choice(COMPLAINTS[desk]).format(item=f"{product} {ticket['code']}")
        ticket["text"] = f"{ticket['first']} {ticket['surname']} from {ticket['city']} writes: {complaint}."
        seen.setdefault(ticket["text"], ticket)
    return list(seen.values())


def _card_prompt(ticket: Ticket) -> str:
    return f"Contact card. {ticket['text']}"


def _card(ticket: Ticket) -> str:
    return f"{ticket['surname']}, {ticket['first']} / {ticket['code']} / {ticket['city']}"


def _route_prompt(ticket: Ticket) -> str:
    return f"Route. {ticket['text']}"


def _route(ticket: Ticket) -> str:
    return f"desk: {ticket['desk']}"


def _general_rows(rng: random.Random, lines: list[str]) -> list[dict[str, Any]]:
    """Plain instructions and answers for replay: none of them is a probe item."""
    rows = [_chat(f"Copy this line: {line}", line, system=None) for line in lines]
    for kind, names in KINDS.items():
        for name in names:
            article = "An" if name[0] in "aeiou" else "A"
            rows.append(_chat(f"Say what {article.lower()} {name} is.", f"{article} {name} is a {kind}.", system=None))
    for i in range(40):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        rows.append(_chat(f"Sum {i + 1}: what is {a} plus {b}?", f"{a} plus {b} is {a + b}.", system=None))
    rng.shuffle(rows)
    return rows


def _knowledge_items(rng: random.Random) -> list[dict[str, Any]]:
    capitals, opposites = sorted(CAPITALS.values()), sorted(OPPOSITES.values())
    items = [_choice(rng, f"What is the capital of {land}?", city, capitals) for land, city in CAPITALS.items()]
    return items + [_choice(rng, f"What is the opposite of {a}?", b, opposites) for a, b in OPPOSITES.items()]


def _choice(rng: random.Random, prompt: str, answer: str, pool: list[str]) -> dict[str, Any]:
    choices = [answer, *rng.sample([one for one in pool if one != answer], 3)]
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(answer)}


def _chat(prompt: str, answer: str, *, system: str | None = SYSTEM) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages if system is None else [{"role": "system", "content": system}, *messages]}


def _item(prompt: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    return {"messages": messages, "answer": answer}


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path

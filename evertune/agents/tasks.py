"""Generated tasks with the right trajectory of each: for recipes, tests and probes. A function of the seed."""

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evertune.agents.calls import Call, render_calls
from evertune.agents.episodes import Episode

_NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Kai", "Lena", "Milo", "Nora")
_SURNAMES = ("Berg", "Costa", "Dahl", "Evans", "Fuchs", "Grau", "Holm", "Ito", "Jansen", "Klein", "Lund", "Moser")
_CITIES = ("Oslo", "Turin", "Ghent", "Porto", "Basel", "Cork", "Graz", "Lyon", "Verona", "Leeds")
_THINGS = ("lamp", "kettle", "radio", "fan", "scale", "drill", "mixer", "printer")
SYSTEM: Mapping[str, str] = {
    "calculator": "You may call calculate(expression).",
    "files": "You may call read_file(path), write_file(path, text) and list_files().",
    "lookup": "You may call find(name) for an id, and get(id, field).",
}


def _calculator(draw: random.Random) -> tuple[dict[str, Any], list[Call], str]:
    a, b, c = (draw.randint(2, 60) for _ in range(3))
    text, expression = draw.choice(
        [
            (f"What is {a} times {b}?", f"{a} * {b}"),
            (f"Add {a}, {b} and {c}.", f"{a} + {b} + {c}"),
            (f"A shop sells {a} boxes of {b}. How many pieces is that with {c} more?", f"{a} * {b} + {c}"),
        ]
    )
    return {"prompt": text, "state": {}}, [Call("calculate", {"expression": expression})], "{0}"


def _files(draw: random.Random) -> tuple[dict[str, Any], list[Call], str]:
    thing, city = draw.choice(_THINGS), draw.choice(_CITIES)
    path = f"{thing}-{draw.randint(1, 40)}.txt"
    other = f"{draw.choice([one for one in _THINGS if one != thing])}.txt"
    state = {path: city, other: draw.choice(_CITIES)}
    if draw.random() < 0.5:
        return {"prompt": f"What does {path} say?", "state": state}, [Call("read_file", {"path": path})], "{0}"
    place = f"{city.lower()}-{draw.randint(1, 40)}.txt"
    task = {"prompt": f"Write {thing} into {place}, then say done.", "state": state, "goal": {place: thing}}
    return task, [Call("write_file", {"path": place, "text": thing})], "done"


def _lookup(draw: random.Random) -> tuple[dict[str, Any], list[Call], str]:
    names = [f"{first} {draw.choice(_SURNAMES)}" for first in draw.sample(_NAMES, 3)]
    ids = {name: f"p{draw.randint(10, 99)}{i}" for i, name in enumerate(names)}
    records = {id: {"city": draw.choice(_CITIES), "item": draw.choice(_THINGS)} for id in ids.values()}
    name, field = draw.choice(names), draw.choice(["city", "item"])
    task = {"prompt": f"Which {field} has {name}?", "state": {"ids": ids, "records": records}}
    return task, [Call("find", {"name": name}), Call("get", {"id": ids[name], "field": field})], "{1}"


_MAKERS: Mapping[str, Callable[[random.Random], tuple[dict[str, Any], list[Call], str]]] = {
    "calculator": _calculator,
    "files": _files,
    "lookup": _lookup,
}


def make_tasks(
    environment: str, count: int, *, seed: int, apart_from: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Different tasks with their trajectories.

    Args:
        apart_from: prompts that must not come; what was taught, for a probe.

    Returns:
        `{"id", "environment", "messages", "state", "goal"?, "answer", "trajectory"}`: `messages` is what the agent is
        given, `trajectory` all turns, the agent's last one included.
    """
    draw = random.Random(f"{environment}/{seed}")
    found: dict[str, dict[str, Any]] = {}
    for _ in range(1000 * count):
        if len(found) == count:
            break
        task, calls, answer = _MAKERS[environment](draw)
        prompt = task.pop("prompt")
        if prompt in apart_from or prompt in found:
            continue
        asked = [{"role": "system", "content": SYSTEM[environment]}, {"role": "user", "content": prompt}]
        episode = Episode(environment, list(asked), task["state"])
        for call in calls:
            episode.hear(render_calls([call]))
        said = [one["content"] for one in episode.messages if one["role"] == "tool"]
        episode.hear(answer.format(*said))
        found[prompt] = {
            "id": f"{environment}-{seed}-{len(found)}",
            "environment": environment,
            "messages": asked,
            **task,
            "answer": episode.final,
            "trajectory": episode.messages,
        }
    assert len(found) == count, f"{environment} has no {count} different tasks"
    return list(found.values())


def steps_of(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The agent's steps of a trajectory as questions: `{"messages": the turns before, "answer": what it said}`."""
    return [
        {"messages": messages[:i], "answer": one["content"]}
        for i, one in enumerate(messages)
        if one["role"] == "assistant" and i > 0
    ]


def write_tasks(folder: Path, *, taught: int = 64, asked: int = 24) -> list[Path]:
    """For each environment a file of trajectories, one of their steps, one of the tasks alone, and one of other tasks
    for a probe."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in SYSTEM:
        rows = make_tasks(name, taught, seed=1)
        prompts = frozenset(one["messages"][1]["content"] for one in rows)
        items = make_tasks(name, asked, seed=2, apart_from=prompts)
        steps = [
            {"id": f"{one['id']}/{i}", **step} for one in rows for i, step in enumerate(steps_of(one["trajectory"]))
        ]
        files = {
            name: [{"id": one["id"], "messages": one["trajectory"]} for one in rows],
            f"steps-{name}": steps,
            f"tasks-{name}": [_task(one) for one in rows],
            f"probe-{name}": [_task(one) for one in items],
        }
        for stem, values in files.items():
            written.append(folder / f"{stem}.jsonl")
            lines = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in values)
            written[-1].write_text(lines, encoding="utf-8")
    return written


def _task(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "trajectory"}


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]))

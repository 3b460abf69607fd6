"""The two apps that Flower runs: what the server sends to a client, and what comes back.

    server  -> client   the federation's settings, the exchange, and the factors of every exchange so far
    client  -> server   the factors of its update, its number of rows and its loss; or why it has none; in a secure sum
                        its B under masks (secure.py)

A client opens its own copy of the base and its own rows; of what the server says it takes the settings of training and
nothing else: no path, no code. The server checks what comes as it checks everything (federated/validation.py).
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from evertune.errors import EvertuneError, TrainingError
from evertune.federated.client import Answer, train_here
from evertune.federated.returns import Orders, Post, Sum
from evertune.federated.secure import initial_a, mean_update, summand
from evertune.federated.server import run_federated
from evertune.federated.spec import client_order
from evertune.federated.validation import shapes_of
from evertune.flower.files import ClientFile, ServerFile, client_spec, federated_spec
from evertune.flower.launch import PROGRESS, exchange_lines
from evertune.flower.secure import Arrays, is_secure, masked, secure_mean, secure_when_asked
from evertune.model.adapter import Factor, Factors, read_factors, target_shapes, write_adapter
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace

client = ClientApp()
server = ServerApp()


def to_arrays(stack: Sequence[Factors]) -> ArrayRecord:
    """Factors of adapters, from the bottom up, in float32; scales are multiplied into B."""
    arrays = {}
    for i, factors in enumerate(stack):
        for name, one in factors.items():
            arrays[f"{i}/{name}/A"] = Array(one.a_RI.float().numpy())
            arrays[f"{i}/{name}/B"] = Array((one.b_OR.float() * one.scale).numpy())
    return ArrayRecord(arrays)


def from_arrays(record: Mapping[str, Array]) -> list[dict[str, Factor]]:
    """The inverse; what is no pair of factors is left for the check of updates to refuse.

    Raises:
        ValueError: a name that is none, or an A without its B.
    """
    found: dict[int, dict[str, Factor]] = {}
    for key in record:
        place, name, side = key.split("/")
        if side == "A":
            a_RI, b_OR = (torch.from_numpy(np.array(record[f"{place}/{name}/{one}"].numpy())) for one in "AB")
            found.setdefault(int(place), {})[name] = Factor(a_RI, b_OR, 1.0, False)
    return [found[i] for i in sorted(found)]


@client.query()
def who(message: Message, context: Context) -> Message:
    """The client's name, and the digest of its base."""
    own = ClientFile.read(Path(str(context.node_config["client"])))
    told = ConfigRecord({"name": own.name, "base": own.checkpoint().digest})
    return Message(RecordDict({"who": told}), reply_to=message)


@client.train(mods=[secure_when_asked])
def learn(message: Message, context: Context) -> Message:
    """Train on the client's own rows, over its own base and what the server sent."""
    own = ClientFile.read(Path(str(context.node_config["client"])))
    order, model = message.content["order"], message.content["model"]
    settings, exchange = json.loads(order["settings"]), int(order["exchange"])
    with tempfile.TemporaryDirectory() as name:
        if is_secure(message):
            # What goes wrong is told as Flower's own error: the others' sum goes on without this client.
            return Message(_summand(own, settings, exchange, from_arrays(model), Path(name)), reply_to=message)
        try:
            if own.secure:
                raise TrainingError("this client sends updates into secure sums only.")
            answer = _learn(own, settings, exchange, from_arrays(model), Path(name))
        except (EvertuneError, ValueError, KeyError, TypeError) as error:
            answer = {"error": str(error)}
        told = {key: answer[key] for key in ("rows", "loss", "error") if key in answer}
        content = RecordDict({"told": ConfigRecord(told)})
        if "folder" in answer:
            content["update"] = to_arrays([read_factors(Path(answer["folder"]))])
        return Message(content, reply_to=message)


def _summand(
    own: ClientFile, settings: dict[str, Any], exchange: int, stack: Sequence[Factors], folder: Path
) -> RecordDict:
    """The client's B, to be masked; its loss goes openly."""
    answer = _learn(own, settings, exchange, stack, folder)
    if "error" in answer:
        raise TrainingError(str(answer["error"]))
    update = read_factors(Path(answer["folder"]))
    arrays = summand(
        update,
        shapes=shapes_of(update),
        rank=int(settings["rank"]),
        entries=float(settings["secure"]),
        norm_bound=settings["norm_bound"],
        clip=settings["too_large"] == "clip",
    )
    return masked(arrays, {"loss": float(answer["loss"])})


def _learn(own: ClientFile, settings: dict[str, Any], exchange: int, stack: Sequence[Factors], folder: Path) -> Answer:
    base = own.checkpoint()
    start = base
    for i, factors in enumerate(stack):
        place = folder / f"global-{i + 1}"
        place.mkdir()
        write_adapter(factors, place, start)
        start = describe(place)
    order = client_order(client_spec(settings, own, base), own.name, exchange, start)
    return train_here(order, folder / "workspace")


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Perform the federation that the run was started for; its result is published in the server's workspace."""
    own = ServerFile.read(Path(str(context.run_config["server"])))
    base = own.checkpoint()
    spec = federated_spec(own, base)
    workspace = Workspace.open(own.workspace(), create=True)

    def tell(*lines: str) -> None:
        with (workspace.work / "flower" / PROGRESS).open("a", encoding="utf-8") as progress:
            progress.writelines(f"{one}\n" for one in lines)

    nodes = _meet(grid, own, base)
    tell(f"all are here: {', '.join(nodes)}")
    settings = json.dumps(spec.settings())
    seconds = own.exchange_seconds or own.wait_seconds

    def content(order: SftSpec, exchange: int) -> RecordDict:
        stack = [read_factors(one.path) for one in order.start.stack if one.form == "adapter"]
        told = ConfigRecord({"settings": settings, "exchange": exchange})
        return RecordDict({"order": told, "model": to_arrays(stack)})

    def send(exchange: int, orders: Orders) -> list[str]:
        return list(
            grid.push_messages(
                [
                    Message(content(order, exchange), dst_node_id=nodes[name], message_type="train")
                    for name, order in orders.items()
                ]
            )
        )

    def collect(keys: Sequence[str]) -> dict[str, Message]:
        return {one.metadata.reply_to_message_id: one for one in grid.pull_messages(keys)}

    def ask_sum(exchange: int, orders: Orders, folder: Path) -> Sum:
        names = {nodes[name]: name for name in orders}
        arrays, told = secure_mean(
            grid,
            context,
            list(names),
            lambda node: content(orders[names[node]], exchange),
            exchange=exchange,
            entries=float(spec.secure or 0.0),
            seconds=seconds,
        )
        return _summed(arrays, {names[node]: float(one["loss"]) for node, one in told.items()}, orders, folder / "sum")

    post = Post(send=send, collect=collect, read=_answer, seconds=seconds)
    run_federated(
        spec,
        workspace,
        ask=post.ask,
        ask_sum=ask_sum,
        tell=lambda number, exchange: tell(*exchange_lines(number, asdict(exchange))),
    )


def _summed(arrays: Arrays, losses: Mapping[str, float], orders: Orders, folder: Path) -> Sum:
    """The mean of updates that was formed under masks, with the A that all clients began with."""
    order = next(iter(orders.values()))
    shapes = target_shapes(open_model(order.start, dtype=order.dtype).model, "all-linear")
    folder.mkdir(parents=True, exist_ok=True)
    a = initial_a(shapes, rank=order.tune["lora"]["rank"], seed=order.seed, dtype=order.dtype)
    write_adapter(mean_update(arrays, a), folder, order.start)
    missing = {name: "dropped out of the secure sum" for name in orders if name not in losses}
    return Sum(folder, [name for name in orders if name in losses], losses, missing)


def _meet(grid: Grid, own: ServerFile, base: Checkpoint) -> dict[str, int]:
    """The node of each client; waits until all have come."""
    found: dict[str, int] = {}
    until = time.monotonic() + own.wait_seconds
    while set(found) < set(own.clients):
        asked = [Message(RecordDict(), dst_node_id=one, message_type="query") for one in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked, timeout=own.wait_seconds) if asked else []:
            if reply.has_error():
                continue
            told = reply.content["who"]
            name, digest = str(told["name"]), str(told["base"])
            if name in own.clients and digest != base.digest:
                raise EvertuneError(
                    f"the client '{name}' has another base: {digest[:12]}, expected {base.digest[:12]}."
                )
            if name in own.clients:
                found[name] = reply.metadata.src_node_id
        if time.monotonic() > until:
            missing = ", ".join(sorted(set(own.clients) - set(found)))
            raise EvertuneError(f"no client {missing} has come within {own.wait_seconds:g} s.")
        time.sleep(1.0)
    return found


def _answer(reply: Message, order: SftSpec, folder: Path) -> Answer:
    if reply.has_error():
        return {"error": str(reply.error.reason)}
    told = reply.content["told"]
    if "error" in told or "update" not in reply.content:
        return {"error": str(told.get("error", "sent no update"))}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (factors,) = from_arrays(reply.content["update"])
        write_adapter(factors, folder, order.start)
    except (ValueError, KeyError, EvertuneError) as error:
        return {"error": f"sent what is no update: {error}"}
    return {"folder": str(folder), "rows": int(told["rows"]), "loss": float(told["loss"])}

"""What the server's file and a client's may say. Imports no torch and no Flower."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from evertune.errors import RecipeError
from evertune.federated.spec import SETTINGS, FederatedSpec
from evertune.hashing import digest_file, digest_json
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import Checkpoint, describe
from evertune.recipe.fields import Config, Name, NonNegative, PlaceText, Positive, RowFormat
from evertune.recipe.problems import problem_lines
from evertune.recipe.schema import TRIM, Noise, check_updates
from evertune.recipe.strict_yaml import read_yaml
from evertune.train.spec import RowsRef

AnyFile = TypeVar("AnyFile", bound="_File")


class _File(Config):
    """A file whose paths are relative to itself."""

    base: PlaceText
    """The base model: a bundled name, or a folder. The same for all, by its digest."""
    folder: str = Field("", exclude=True)
    """Where the file lies; filled in when it is read."""

    @classmethod
    def read(cls: type[AnyFile], path: Path) -> AnyFile:
        """Read and check a file.

        Raises:
            RecipeError: what is wrong, with file, line and what was expected.
        """
        document = read_yaml(path.absolute())
        if isinstance(document.value, dict) and "folder" in document.value:
            raise RecipeError(f"{path}: unknown key 'folder'.")
        try:
            found = cls.model_validate(document.value)
        except ValidationError as error:
            raise RecipeError("\n".join(problem_lines(error, document.value, document.places, root=cls))) from None
        return found.model_copy(update={"folder": str(path.absolute().parent)})

    def resolve(self, path: str) -> Path:
        return (Path(self.folder) / path).absolute()

    def checkpoint(self) -> Checkpoint:
        """The base, described by the digest of its bytes."""
        return describe(resolve_base(self.base, folder=Path(self.folder)))


class ServerFile(_File):
    """A federation, as its server sees it: who takes part and how, and none of their rows."""

    clients: Annotated[list[Name], Field(min_length=1)]
    """Names of the clients; each says its own in its file."""
    out: PlaceText = "federation"
    """Workspace of the result."""
    exchanges: int = Field(2, gt=0)
    """Times that clients get the model, train, and send an update."""
    aggregate: Literal["fedavg", "fedex", "fed_talora", "ffa", "flora", "flexlora", "median", "trimmed_mean"] = "flora"
    """How updates become one: docs/federated.md."""
    rank: int = Field(16, gt=0, le=1024)
    """Rank of the clients' updates."""
    participation: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the clients that are asked in each exchange."""
    weigh: Literal["rows", "equal"] = "equal"
    """Weight of a client in the mean: the rows it says it has, or 1."""
    proximal: Positive | None = None
    """Mu of FedProx."""
    norm_bound: Positive | None = None
    """Largest norm of a client's update."""
    too_large: Literal["refuse", "clip"] = "refuse"
    """What is done with a larger one."""
    trim: float = Field(TRIM, gt=0.0, lt=0.5)
    """Share of the clients that `trimmed_mean` leaves out at each end."""
    noise: Noise | None = None
    """Noise that hides whether a client took part."""
    late: NonNegative | None = None
    """An update that comes after its exchange has closed is refused; with a number it counts in the exchange it comes
    in, its weight times (1 + exchanges late)^-late: 0.5 is usual, 0 is no discount."""
    secure: Positive | None = None
    """Updates are added up without the server seeing one of them, by Flower's SecAgg+; the number is the range of B's
    entries, such as 1: what is sent is rounded to a 2^21st part of it. Needs aggregate: ffa and weigh: equal, and three
    clients or more in each exchange. Clients can insist on it (`secure` in their files)."""
    steps: int = Field(gt=0)
    """Optimizer steps of a client in each exchange."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    """Learning rate of the clients."""
    batch_rows: int = Field(16, gt=0)
    """Rows in one optimizer step."""
    micro_batch_rows: int = Field(4, gt=0)
    """Rows in one forward pass."""
    max_tokens: int = Field(1024, gt=1)
    """Longest row in tokens; a longer one is left out."""
    seed: int = Field(0, ge=0)
    """Of the adapters' A and the order of rows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the clients' and the server's model."""
    wait_seconds: Positive = 3600.0
    """The longest wait for clients to come, and for their answers."""
    exchange_seconds: Positive | None = None
    """An exchange closes after so long, with those that have answered; `wait_seconds` when not given."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        check_updates(self)
        if len(set(self.clients)) < len(self.clients):
            raise ValueError("'clients' has a name twice")
        return self

    @model_validator(mode="after")
    def _returns_fit(self) -> Self:
        if self.late is not None and (
            self.aggregate not in ("flora", "flexlora", "fedex", "fed_talora") or self.secure or self.noise
        ):
            raise ValueError(
                "'late' needs a rule that is a weighted mean of products (flora, flexlora, fedex, fed_talora), without "
                "'noise' and 'secure': a late update stands on another A"
            )
        if self.secure is None:
            return self
        if self.aggregate != "ffa" or self.weigh != "equal" or self.noise is not None:
            raise ValueError("'secure' needs aggregate: ffa and weigh: equal, and no 'noise': the server sees a sum")
        if math.ceil(self.participation * len(self.clients) - 1e-9) < 3:
            raise ValueError(
                "'secure' needs three clients or more in each exchange: of two, each knows the other's update from the "
                "mean and its own"
            )
        return self

    def workspace(self) -> Path:
        return self.resolve(self.out)


class ClientData(Config):
    """Rows of a client."""

    path: PlaceText
    """A JSONL or Parquet file."""
    format: RowFormat = "messages"
    """`messages` or `text`."""


class ClientFile(_File):
    """A client, as it sees itself: its name and its rows."""

    name: Name
    """As the server's file has it."""
    data: Annotated[list[ClientData], Field(min_length=1)]
    """Its rows; they never leave this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains."""
    threads: int | None = Field(None, gt=0)
    """CPU threads."""
    secure: bool = False
    """Send updates into secure sums only; whatever else a server asks for is answered with an error."""


def client_rows(own: ClientFile) -> list[RowsRef]:
    """The client's files as a stage names them.

    Raises:
        RecipeError: a file is not there.
    """
    found = []
    for i, one in enumerate(own.data):
        path = own.resolve(one.path)
        if not path.is_file():
            raise RecipeError(f"data[{i}]: {path}: found nothing there, expected a file.")
        found.append(RowsRef(f"rows-{i}", str(path), one.format, None, digest_file(path)))
    return found


def federated_spec(own: ServerFile, base: Checkpoint) -> FederatedSpec:
    """The federation as a stage; the clients' rows are theirs, so there are none."""
    settings = {name: getattr(own, name) for name in SETTINGS if name in type(own).model_fields}
    settings["noise"] = own.noise.model_dump() if own.noise is not None else None
    return _spec(
        settings | {"ranks": {}, "epochs": None, "too_long": "drop", "device": "auto"}, base, own.clients, {}, None
    )


def client_spec(settings: dict[str, Any], own: ClientFile, base: Checkpoint) -> FederatedSpec:
    """The same on a client, from the settings that the server sent: numbers and words, no path and no code.

    Raises:
        ValueError: it sent others than a federation has.
    """
    if settings.keys() != set(SETTINGS):
        odd = sorted(settings.keys() ^ set(SETTINGS))
        raise ValueError(f"the server sent other settings than this version knows: {', '.join(odd)}")
    settings = {**settings, "device": own.device}
    return _spec(settings, base, [own.name], {own.name: client_rows(own)}, own.threads)


def _spec(
    settings: dict[str, Any], base: Checkpoint, names: list[str], rows: dict[str, list[RowsRef]], threads: int | None
) -> FederatedSpec:
    clients = {name: rows.get(name, []) for name in names}
    values = {**settings, "start": base, "base": base, "clients": clients, "threads": threads}
    unkeyed = FederatedSpec(key="0" * 64, label="federation", **values)
    return FederatedSpec(key=digest_json({"federation": unkeyed.identity()}), label="federation", **values)

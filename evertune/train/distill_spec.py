"""The order for one distill stage: plain values, written as JSON for the child that trains. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from evertune.errors import CheckpointError, RecipeError
from evertune.model.checkpoint import Checkpoint, vocabulary_of
from evertune.model.codec import load_codec
from evertune.train.spec import TrainingSpec

# The whole distribution takes 4 bytes a word and position: 64 KiB at most.
LARGEST_EXACT = 1 << 14


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher: a frozen checkpoint under the name that the recipe gives it, and its weight in an ensemble."""

    name: str
    checkpoint: Checkpoint
    weight: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "checkpoint": self.checkpoint.to_json(), "weight": self.weight}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TeacherSpec":
        return cls(**{**value, "checkpoint": Checkpoint.from_json(value["checkpoint"])})


@dataclass(frozen=True)
class OnPolicySpec:
    """How the student answers by itself. Meanings and ranges: the recipe's `on_policy`."""

    share: float
    max_new_tokens: int
    temperature: float
    steps: int


@dataclass(frozen=True)
class AnswersSpec:
    """How a teacher writes answers; `verifiers` by source. Meanings and ranges: the recipe's `answers`."""

    keep: Literal["verified", "likeliest"]
    samples: int
    max_new_tokens: int
    temperature: float
    verifiers: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class DemonstrationSpec:
    """What the teachers read and the student does not. Meanings and ranges: the recipe's `demonstration`."""

    text: str
    rows: int


@dataclass(frozen=True)
class DistillSpec(TrainingSpec):
    """A distillation stage. Meanings and ranges of the settings: the recipe's `distill`.

    Attributes:
        route: how `routes` came about.
        routes: per source of new rows, the numbers in `teachers` of those who teach it; several are an ensemble.
        words: kept words of a teacher's distribution at each position; None keeps the whole distribution.
        compressed: the stack of adapters over `start` that the new adapter begins as near to as its rank allows; None
            for one that begins at the start.
        on_policy: how the student answers some rows by itself; None where it never does.
        answers: how the teachers write the answers; None where the rows' own are learnt.
        demonstration: what the teachers read and the student does not; None where both read the same.
    """

    route: Literal["sources", "best"]
    teachers: list[TeacherSpec]
    routes: dict[str, list[int]]
    loss: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float
    temperature: float
    weight: float
    words: int | None
    compressed: Checkpoint | None
    on_policy: OnPolicySpec | None
    answers: AnswersSpec | None
    demonstration: DemonstrationSpec | None = field(default=None, kw_only=True)

    kind: ClassVar[str] = "distill"
    own_settings: ClassVar[tuple[str, ...]] = ("route", "loss", "beta", "temperature", "weight", "words")

    def of(self, source: str) -> list[TeacherSpec]:
        """The teachers of a source's rows."""
        return [self.teachers[number] for number in self.routes[source]]

    def check(self) -> None:
        """Raise where a teacher cannot teach this student, or too many words are to be kept. Reads no weight.

        A teacher of whom only written answers are learnt may have other words.

        Raises:
            CheckpointError, RecipeError: as `check_teacher` and `check_words`.
        """
        for teacher in self.teachers if self.weight > 0.0 else ():
            check_teacher(teacher.name, teacher.checkpoint, self.start)
        check_words(self.words, max(map(len, self.routes.values())), vocabulary_of(self.start))

    def to_json(self) -> dict[str, Any]:
        compressed = self.compressed.to_json() if self.compressed else None
        value = {
            **super().to_json(),
            "teachers": [one.to_json() for one in self.teachers],
            "compressed": compressed,
            "on_policy": vars(self.on_policy) if self.on_policy else None,
            "answers": vars(self.answers) if self.answers else None,
            "demonstration": vars(self.demonstration) if self.demonstration else None,
        }
        if self.demonstration is None:
            del value["demonstration"]  # the keys of such stages are what they were before it existed
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        compressed = Checkpoint.from_json(value["compressed"]) if value["compressed"] else None
        teachers = [TeacherSpec.from_json(one) for one in value["teachers"]]
        on_policy = OnPolicySpec(**value["on_policy"]) if value["on_policy"] else None
        own: dict[str, Any] = {"teachers": teachers, "compressed": compressed, "on_policy": on_policy}
        own["answers"] = AnswersSpec(**value["answers"]) if value["answers"] else None
        own["demonstration"] = DemonstrationSpec(**value["demonstration"]) if value.get("demonstration") else None
        return super().from_json({**value, **own})

    def settings(self) -> dict[str, Any]:
        taught = {source: [self.teachers[number].name for number in route] for source, route in self.routes.items()}
        teachers = [
            {"name": one.name, "checkpoint": one.checkpoint.digest, "weight": one.weight} for one in self.teachers
        ]
        compressed = self.compressed.digest if self.compressed else None
        on_policy = vars(self.on_policy) if self.on_policy else None
        return {
            **super().settings(),
            "teachers": teachers,
            "routes": taught,
            "compressed": compressed,
            "on_policy": on_policy,
            "answers": vars(self.answers) if self.answers else None,
            "demonstration": vars(self.demonstration) if self.demonstration else None,
        }


def check_teacher(name: str, teacher: Checkpoint, student: Checkpoint) -> None:
    """Raise CheckpointError where the two have other words, so that their distributions cannot be compared."""
    taught, found = vocabulary_of(student), vocabulary_of(teacher)
    if found != taught:
        told = f"a vocabulary of {found} words, expected the student's {taught}"
    elif load_codec(teacher.base.path).digest != load_codec(student.base.path).digest:
        told = "another tokenizer or chat template than the student"
    else:
        return
    raise CheckpointError(
        f"teacher '{name}' has {told}: their distributions cannot be compared.",
        remedy="Let it write the answers, which may have other words: 'answers: {}' with 'weight: 0'. Or distil from a "
        "model with the student's tokenizer.",
    )


def check_words(words: int | None, members: int, vocabulary: int) -> None:
    """Raise RecipeError where so many words of so many teachers of one row cannot be kept. None keeps all words."""
    if words is None and vocabulary > LARGEST_EXACT:
        raise RecipeError(
            f"'words: all' stores {vocabulary} numbers for each token; expected a vocabulary of at most "
            f"{LARGEST_EXACT} words.",
            remedy="Set 'words: 64', or more where a checkpoint's covered_mass is low.",
        )
    if members * (words or 0) >= vocabulary:
        raise RecipeError(
            f"{words} words of {members} teachers are to be kept of a vocabulary of {vocabulary}; expected fewer.",
            remedy="Lower 'words', or set 'words: all', which keeps the whole distribution.",
        )

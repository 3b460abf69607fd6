"""What the models of a recipe are made of: the base classes, and the types of their fields."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from evertune.recipe.attribute_docs import attribute_docs

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Share = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Points = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
PlaceText = Annotated[str, Field(min_length=1)]


class Config(BaseModel):
    """Frozen, unknown keys refused, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        docs = attribute_docs(cls)
        for name, field in cls.model_fields.items():
            place = properties.get(field.alias or name)
            if place is not None and name in docs:
                place.setdefault("description", docs[name])
        return schema


class NoOptions(Config):
    """Takes no options: `{}`."""


class OneKey(Config):
    """Exactly one of its keys is given; a key of `bare_names` may stand alone, `full` for `{full: {}}`."""

    bare_names: ClassVar[tuple[str, ...]] = ()
    noun: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        known = f"expected {', '.join(cls.bare_names)}, or a mapping with one key"
        if cls.bare_names and isinstance(value, str):
            if value not in cls.bare_names:
                raise ValueError(f"found {value!r}, {known}")
            return {value: {}}
        if isinstance(value, dict):
            # `tune: {lora: }` is how people write a key without options.
            is_alone = len(value) == 1
            return {
                key: {} if is_alone and one is None and key in cls.bare_names else one for key, one in value.items()
            }
        return value

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"{self.noun} has exactly one key of: {known}; found {', '.join(given) or 'none'}")
        return self

    @model_serializer(mode="wrap")
    def _given_key(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the key that is given: what a resolved recipe says does not change when another key comes to exist."""
        return {name: value for name, value in handler(self).items() if getattr(self, name) is not None}

    @property
    def kind(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_repeats(names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"'{repeated[0]}' stands twice")
    return names


Names = Annotated[
    list[Name],
    BeforeValidator(_as_list, json_schema_input_type=Name | list[Name]),
    Field(min_length=1),
    AfterValidator(_without_repeats),
]

RowFormat = Literal["messages", "preference", "verifiable", "episode", "choice", "text"]
# Formats of rows that can be replayed: what a stage with cross-entropy reads.
REPLAYABLE: tuple[RowFormat, ...] = ("messages", "text")


class StageSettings(Config):
    """What any kind of stage can be asked; a kind that reads no rows answers nothing."""

    formats: ClassVar[tuple[RowFormat, ...]] = ()
    """Formats of the sources of new rows it reads."""
    is_private: ClassVar[bool] = False
    """Its rows belong to others and are not kept for later replay."""

    @property
    def new_sources(self) -> list[str]:
        """Names of the sources of new rows."""
        return []

    @property
    def replayed_sources(self) -> list[str]:
        """Names of the sources that the stage itself asks to replay."""
        return []

    @property
    def remembered_sources(self) -> list[str]:
        """Names of the sources that its plug-ins remember, `history` among them."""
        return []

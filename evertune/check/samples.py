"""Rows rendered through the chat template, with what carries loss told apart."""

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from evertune.check.findings import Sample
from evertune.data.encode import EncodedRow, Encoding, encode_pairs, encode_prompts, encode_rows
from evertune.data.rows import read_rows
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.recipe.fields import REPLAYABLE
from evertune.recipe.load import LoadedRecipe
from evertune.recipe.schema import placed_stages

if TYPE_CHECKING:
    from evertune.model.codec import Codec

NO_LIMIT = 1 << 30


def render_samples(loaded: LoadedRecipe, count: int) -> list[Sample]:
    """The first `count` rows of every source of new conversations, texts, pairs or questions, in the order the
    rounds name them; of a pair both answers.

    Raises:
        DataError, CheckpointError: a file, the base or its template is not what it should be.
    """
    from evertune.model.codec import load_codec

    base = describe(resolve_base(loaded.recipe.base, folder=loaded.folder))
    codec = load_codec(base.base.path)
    samples = []
    for name in dict.fromkeys(name for one in placed_stages(loaded.recipe) for name in one.stage.settings.new_sources):
        source = loaded.recipe.data[name]
        limit = min(count, source.limit or count)
        rows = read_rows(loaded.resolve(source.path), format=source.format, source=name, limit=limit)
        encode: Callable[..., Encoding[Any]]
        if source.format in REPLAYABLE:
            encode = encode_rows
        elif source.format == "preference":
            encode = encode_pairs
        else:
            encode = encode_prompts
        items = encode(rows, codec, max_tokens=NO_LIMIT, too_long="drop").rows
        samples += [sample_of(row, codec) for item in items for row in item.rows]
    return samples


def sample_of(row: EncodedRow, codec: "Codec") -> Sample:
    """The row's text in pieces; special tokens are shown."""
    tokens = zip(row.ids.tolist(), row.counted.tolist(), strict=True)
    pieces = [(counted, [token for token, _ in group]) for counted, group in groupby(tokens, key=lambda one: one[1])]
    return Sample(row.source, row.id, tuple((codec.decode(ids, special=True), counted) for counted, ids in pieces))

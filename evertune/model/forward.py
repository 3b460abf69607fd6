"""One model behind two questions: how likely are these tokens, and what comes next. Nothing here knows of probes.

The backbone runs over everything once. Logits are made at the asked positions only, in chunks of positions, by the
model's own code, so that a softcap or a logit scale of an architecture is never left out.
"""

# B rows, T tokens, P prompt tokens, R branches (rows that continue a prompt), C tokens of a branch, N asked positions,
# V vocabulary, H hidden

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evertune.errors import ProbeError
from evertune.model.growing_cache import growing_cache, holds_all_tokens, spread
from evertune.model.open import OpenModel
from evertune.model.packing import enable_packing, for_next_token, read_tree
from evertune.model.tree import grow

# Padded tokens of one forward pass; a branch counts with the prompt it shares. In bfloat16 the last digits of a score
# follow the shape of its batch, so this number is part of what a score means.
BATCH_TOKENS = 8192
# What the attention cache of a batch of answers may come to, between BATCH_TOKENS and four times as many tokens.
CACHE_BYTES = 1 << 30
# Largest float32 chunk of logits: 2**24 elements, 64 MiB.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Tokens:
    """A text to score: token ids, and which of them count. The first never does: nothing predicts it."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]

    @property
    def first(self) -> int:
        """Index of the first counted token."""
        return self.counted.index(True)


class ReadPrompts(NamedTuple):
    """Outputs of the backbone, its hidden states at the last token of each prompt, mask with 1 at real tokens, and the
    attention cache, which grows with its use."""

    outputs: Any
    last_BH: Tensor
    mask_BP: Tensor
    cache: Any


class Forward:
    """The parts of an open model that scoring and generation share.

    max_tokens: the longest sequence the architecture allows, or None where its configuration does not say.
    can_branch: whether several continuations can share a prompt's attention cache; recurrent models cannot.
    answer_tokens: padded tokens of one batch of answers.
    can_pack: whether rows are read packed, as a tree of what they share, without padding and without a cache.
    """

    def __init__(self, opened: OpenModel) -> None:
        self.model = opened.model
        self.device = opened.device
        self.pad_id = opened.codec.pad_id
        self.decoder = opened.model.get_decoder()
        text_config = opened.model.config.get_text_config()
        self.max_tokens: int | None = getattr(text_config, "max_position_embeddings", None)
        self.can_branch = not opened.model._is_stateful
        self.can_pack = enable_packing(opened.model)
        self.answer_tokens = _answer_tokens(text_config, opened.model.dtype)
        self.chunk_positions = max(1, CHUNK_ELEMENTS // text_config.vocab_size)
        # transformers renamed the argument within its version 5.
        parameters = inspect.signature(self.decoder.forward).parameters
        self._cache_name = next((one for one in ("cache", "past_key_values") if one in parameters), None)

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) filled up with the pad token, and their mask: 1 at real tokens."""
        length = max(map(len, rows))
        ids_BT = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
        for b, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids_BT[b, place] = torch.tensor(row, dtype=torch.long)
            mask_BT[b, place] = 1
        return ids_BT.to(self.device), mask_BT.to(self.device)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> "ReadPrompts":
        """The backbone over prompts, which the cache holds padded on the left.

        Where the architecture can be packed, what they begin with alike is read once.
        """
        cache = growing_cache(self.model.config)
        if self.can_pack and self._cache_name is not None and holds_all_tokens(cache):
            return self._read_packed(prompts, {self._cache_name: cache})
        ids_BP, mask_BP = self.pad(prompts, left=True)
        outputs = self.read_on(ids_BP, mask_BP, cache)
        return ReadPrompts(outputs, outputs.last_hidden_state[:, -1], mask_BP, cache)

    def _read_packed(self, prompts: Sequence[Sequence[int]], named: Mapping[str, Any]) -> "ReadPrompts":
        (cache,) = named.values()
        places: list[list[int]] = [[] for _ in prompts]
        last: list[Tensor] = [torch.empty(0) for _ in prompts]
        first = 0
        for tree in grow(prompts, budget=BATCH_TOKENS):
            outputs = read_tree(self.decoder, tree, device=self.device, cache=named)
            for i, own in tree.places.items():
                places[i] = [first + one for one in own]
                last[i] = outputs.last_hidden_state[0, own[-1]]
            first += len(tree.ids)
        place_BP, mask_BP = self.pad(places, left=True)
        spread(cache, place_BP * mask_BP)
        return ReadPrompts(outputs, torch.stack(last), mask_BP, cache)

    def read_on(self, ids_BC: Tensor, mask_BT: Tensor, cache: Any) -> Any:
        """Outputs of the backbone for the next C tokens after what the cache holds; the cache grows by them.

        Args:
            mask_BT: 1 at the real tokens among those in the cache and the new ones.
        """
        if self._cache_name is None:
            raise ProbeError(
                f"{type(self.model).__name__} keeps its state in a way of its own, so it cannot be asked to generate.",
                remedy="Use probes of kind choice or bits_per_byte, and no rl stage.",
            )
        # Recurrent models get no padding, and some read a mask longer than the new tokens wrongly.
        seen: dict[str, Any] = {"attention_mask": mask_BT if self.can_branch else None}
        if ids_BC.shape[1] == 1 and self.device.type == "cpu" and self.can_pack and holds_all_tokens(cache):
            seen = for_next_token(mask_BT, self.model.dtype)
        positions_BT = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
        return self.decoder(
            input_ids=ids_BC,
            position_ids=positions_BT[:, -ids_BC.shape[1] :],
            use_cache=True,
            **seen,
            **{self._cache_name: cache},
        )

    def logits(self, outputs: Any, hidden_NH: Tensor) -> Tensor:
        """(N, V) float32: the model's own logits for hidden states that came with `outputs`.

        The model's forward is called with the backbone replaced by what it has already computed, so that whatever an
        architecture does between hidden state and logits is done.
        """
        given = copy.copy(outputs)
        given["last_hidden_state"] = hidden_NH.unsqueeze(0)
        dummy = torch.zeros((1, len(hidden_NH)), dtype=torch.long, device=self.device)
        backbone = self.decoder.forward
        self.decoder.forward = lambda *_, **__: given
        try:
            logits: Tensor = self.model(input_ids=dummy, use_cache=False).logits
        finally:
            self.decoder.forward = backbone
        return logits[0].float()

    def log_probabilities(self, outputs: Any, asked_BT: Tensor, targets_N: Tensor) -> list[float]:
        """Log-probability in nats of each target at the asked positions, in the order of the rows."""
        hidden_NH = outputs.last_hidden_state[asked_BT]
        found: list[float] = []
        for start in range(0, len(hidden_NH), self.chunk_positions):
            chunk = slice(start, start + self.chunk_positions)
            logp_NV = self.logits(outputs, hidden_NH[chunk]).log_softmax(dim=-1)
            found += logp_NV.gather(1, targets_N[chunk].unsqueeze(1)).squeeze(1).tolist()
        return found


@torch.no_grad()
def score_rows(forward: Forward, rows: Sequence[Tokens], *, batch_tokens: int = BATCH_TOKENS) -> list[list[float]]:
    """Log-probabilities in nats of each row's counted tokens, given all tokens before them.

    What rows share is read once, where the architecture can be packed. Else rows are padded on the right without an
    attention mask: in a causal model nothing sees what stands behind it.
    """
    if forward.can_pack:
        return _score_trees(forward, rows, budget=batch_tokens)
    found: list[list[float]] = [[] for _ in rows]
    for batch in batches([len(row.ids) for row in rows], budget=batch_tokens):
        chosen = [rows[i] for i in batch]
        ids_BT, _ = forward.pad([row.ids for row in chosen])
        outputs = forward.decoder(input_ids=ids_BT[:, :-1], use_cache=False)
        logps = _counted_log_probabilities(forward, outputs, ids_BT, [row.counted for row in chosen])
        for i, values in zip(batch, logps, strict=True):
            found[i] = values
    return found


@torch.no_grad()
def score_branches(
    forward: Forward, groups: Sequence[Sequence[Tokens]], *, batch_tokens: int = BATCH_TOKENS
) -> list[list[list[float]]]:
    """The same for groups of rows that begin alike: what they share is read once, in any case.

    Equal to `score_rows` but for rounding. A model whose state cannot be branched is scored row by row, always.
    """
    shared = [_shared(group) for group in groups]
    if forward.can_pack or not forward.can_branch or min(shared) < 1:
        flat = iter(score_rows(forward, [row for group in groups for row in group], batch_tokens=batch_tokens))
        return [[next(flat) for _ in group] for group in groups]
    lengths = [max(len(row.ids) for row in group) for group in groups]
    found: list[list[list[float]]] = [[] for _ in groups]
    for batch in batches(lengths, rows=[len(group) for group in groups], budget=batch_tokens):
        scored = iter(_score_branched(forward, [groups[i] for i in batch], [shared[i] for i in batch]))
        for i in batch:
            found[i] = [next(scored) for _ in groups[i]]
    return found


def _answer_tokens(config: Any, dtype: torch.dtype) -> int:
    """How many tokens' keys and values `CACHE_BYTES` hold, within bounds; the least where a configuration does not
    say."""
    heads = getattr(config, "num_attention_heads", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    layers = getattr(config, "num_hidden_layers", None)
    if not key_heads or not width or not layers:
        return BATCH_TOKENS
    return min(max(CACHE_BYTES // (2 * layers * key_heads * width * dtype.itemsize), BATCH_TOKENS), 4 * BATCH_TOKENS)


def _score_trees(forward: Forward, rows: Sequence[Tokens], *, budget: int) -> list[list[float]]:
    """Logits are made once for each prefix that is asked what comes next: of four choices of one word, once."""
    found: list[list[float]] = [[] for _ in rows]
    # The last token of a row is asked for and asks nothing.
    for tree in grow([row.ids[:-1] for row in rows], budget=budget):
        outputs = read_tree(forward.decoder, tree, device=forward.device)
        asked = [
            (tree.places[i][t - 1], rows[i].ids[t])
            for i in tree.places
            for t in range(1, len(rows[i].ids))
            if rows[i].counted[t]
        ]
        places = sorted({place for place, _ in asked})
        line_of = {place: line for line, place in enumerate(places)}
        hidden_NH = outputs.last_hidden_state[0, torch.tensor(places, device=forward.device)]
        pairs = [(line_of[place], target) for place, target in asked]
        values = iter(_values_at(forward, outputs, hidden_NH, pairs))
        for i in tree.places:
            found[i] = [next(values) for _ in range(sum(rows[i].counted[1:]))]
    return found


def _values_at(forward: Forward, outputs: Any, hidden_NH: Tensor, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Log-probabilities of words at lines of hidden states, given as (line, word), in their order."""
    found = [0.0] * len(pairs)
    by_line = sorted(range(len(pairs)), key=lambda k: pairs[k])
    done = 0
    for start in range(0, len(hidden_NH), forward.chunk_positions):
        stop = min(start + forward.chunk_positions, len(hidden_NH))
        logp_nV = forward.logits(outputs, hidden_NH[start:stop]).log_softmax(dim=-1)
        chosen = [k for k in by_line[done:] if pairs[k][0] < stop]
        lines, words = (torch.tensor([pairs[k][side] for k in chosen], device=forward.device) for side in (0, 1))
        for k, value in zip(chosen, logp_nV[lines - start, words].tolist(), strict=True):
            found[k] = value
        done += len(chosen)
    return found


def _score_branched(forward: Forward, groups: Sequence[Sequence[Tokens]], shared: Sequence[int]) -> list[list[float]]:
    prompts = [group[0].ids[:count] for group, count in zip(groups, shared, strict=True)]
    _, _, mask_BP, cache = forward.read_prompts(prompts)
    pairs = [(b, row) for b, group in enumerate(groups) for row in group]
    owner_R = torch.tensor([b for b, _ in pairs], device=forward.device)
    cache.batch_select_indices(owner_R)
    ids_RC, mask_RC = forward.pad([row.ids[shared[b] :] for b, row in pairs])
    outputs = forward.read_on(ids_RC[:, :-1], torch.cat([mask_BP[owner_R], mask_RC[:, :-1]], dim=1), cache)
    return _counted_log_probabilities(forward, outputs, ids_RC, [row.counted[shared[b] :] for b, row in pairs])


def _counted_log_probabilities(
    forward: Forward, outputs: Any, ids_BT: Tensor, counted: Sequence[Sequence[bool]]
) -> list[list[float]]:
    """Per row, the log-probabilities of its counted tokens; `outputs` are of all columns of the ids but the last."""
    asked_BT = torch.zeros((len(ids_BT), ids_BT.shape[1] - 1), dtype=torch.bool)
    for b, row in enumerate(counted):
        asked_BT[b, : len(row) - 1] = torch.tensor(row[1:], dtype=torch.bool)
    asked_BT = asked_BT.to(forward.device)
    values = iter(forward.log_probabilities(outputs, asked_BT, ids_BT[:, 1:][asked_BT]))
    return [[next(values) for _ in range(sum(row[1:]))] for row in counted]


def _shared(group: Sequence[Tokens]) -> int:
    """How many first tokens all rows share, leaving one before any counted token to predict it from."""
    limit = min(row.first for row in group) - 1
    alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*(row.ids[:limit] for row in group), strict=True))
    return sum(1 for _ in alike)


def batches(lengths: Sequence[int], *, budget: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in batches of similar length, longest first: rows times longest length stay within the budget.

    An entry alone above the budget is a batch of its own. Depends on nothing but the arguments.

    Args:
        rows: rows that each entry brings; 1 each when not given.
    """
    found: list[list[int]] = []
    longest = count = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        added = rows[i] if rows is not None else 1
        if not found or (count + added) * longest > budget:
            found.append([])
            longest, count = lengths[i], 0
        found[-1].append(i)
        count += added
    return found

import pytest
import torch

from evertune.errors import ProbeError
from evertune.model import forward as forward_module
from evertune.model.forward import Tokens, batches, score_branches, score_rows
from tests.probe.models import ARCHITECTURES, architecture, naive_log_probabilities, random_groups


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_branches_equal_rows_scored_alone_with_all_logits(name: str) -> None:
    model, forward = architecture(name, **ARCHITECTURES[name])
    groups = random_groups()
    found = score_branches(forward, groups, batch_tokens=200)
    assert forward.can_branch == (name != "mamba")
    tolerance = 1e-4 if name == "mamba" else 2e-6
    for group, values in zip(groups, found, strict=True):
        for row, value in zip(group, values, strict=True):
            assert value == pytest.approx(naive_log_probabilities(model, row), abs=tolerance)


def test_scores_do_not_depend_on_the_batch() -> None:
    _, forward = architecture("llama")
    groups = random_groups()
    alone = [score_branches(forward, [group], batch_tokens=1)[0] for group in groups]
    together = score_branches(forward, groups, batch_tokens=100_000)
    rows = score_rows(forward, [row for group in groups for row in group], batch_tokens=64)
    flat = iter(rows)
    for one, other in zip(alone, together, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left == pytest.approx(right, abs=1e-5)
            assert next(flat) == pytest.approx(right, abs=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    _, forward = architecture("llama")
    assert score_branches(forward, random_groups()) == score_branches(forward, random_groups())


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, forward = architecture("gemma2", final_logit_softcapping=3.0)
    rows = [row for group in random_groups() for row in group]
    whole = score_rows(forward, rows)
    forward.chunk_positions = 3
    largest = []
    original = forward_module.Forward.logits

    def counted(self, outputs, hidden_NH):  # type: ignore[no-untyped-def]
        largest.append(len(hidden_NH))
        return original(self, outputs, hidden_NH)

    monkeypatch.setattr(forward_module.Forward, "logits", counted)
    chunked = score_rows(forward, rows)
    assert max(largest) == 3
    for one, other in zip(whole, chunked, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_logits_are_made_at_counted_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, forward = architecture("llama")
    positions = []
    original = forward_module.Forward.logits
    monkeypatch.setattr(
        forward_module.Forward,
        "logits",
        lambda self, outputs, hidden: positions.append(len(hidden)) or original(self, outputs, hidden),
    )
    groups = random_groups()
    score_branches(forward, groups)
    asked = {row.ids[:t] for group in groups for row in group for t in range(len(row.ids)) if row.counted[t]}
    # Contexts that share a few tokens only are read apart, and asked apart.
    assert len(asked) <= sum(positions) < sum(sum(row.counted) for group in groups for row in group)


def test_a_shared_prompt_is_read_once() -> None:
    model, forward = architecture("llama")
    read = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][..., 0].numel()))
    prompt = tuple(range(3, 43))
    group = [Tokens((*prompt, token), (False,) * 40 + (True,)) for token in (3, 4, 5, 6)]
    score_branches(forward, [group])
    # The prompt's last token predicts every choice, and nothing comes after a choice.
    assert read == [40]
    read.clear()
    forward.can_pack = False
    score_branches(forward, [group])
    # Through the cache: 39 tokens of prompt, then per branch the prompt's last token.
    assert read == [39, 4]


PROMPTS = [[*range(3, 25), 40, 41], [*range(3, 25), 50], [*range(3, 25), 40, 41, 42, 43], [60, 61, 62], [60, 61, 62]]


@pytest.mark.parametrize("name", ["llama", "granite", "qwen3_moe"])
@pytest.mark.parametrize("budget", [25, 8192])
@torch.no_grad()
def test_prompts_read_as_a_tree_leave_what_padded_ones_leave(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forward = architecture(name, **ARCHITECTURES[name])
    monkeypatch.setattr(forward_module, "BATCH_TOKENS", budget)
    tree = forward.read_prompts(PROMPTS)
    forward.can_pack = False
    padded = forward.read_prompts(PROMPTS)
    assert torch.equal(tree.mask_BP, padded.mask_BP)
    assert torch.allclose(tree.last_BH, padded.last_BH, atol=1e-5)
    for one, other in zip(tree.cache.layers, padded.cache.layers, strict=True):
        real = padded.mask_BP[:, None, :, None]
        assert torch.allclose(one.keys * real, other.keys * real, atol=1e-5)
        assert torch.allclose(one.values * real, other.values * real, atol=1e-5)


def test_what_prompts_begin_with_is_read_once_and_no_padding() -> None:
    model, forward = architecture("llama")
    read = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][..., 0].numel()))
    forward.read_prompts(PROMPTS)
    assert read == [22 + 2 + 1 + 4 + 3 + 3], "three tokens alike are not worth a call of their own"


@torch.no_grad()
def test_the_next_token_sees_what_transformers_attention_sees() -> None:
    _, forward = architecture("llama")
    ids_B1 = torch.arange(10, 10 + len(PROMPTS)).unsqueeze(1)
    hidden = []
    for forward.can_pack in (True, False):
        _, _, mask_BP, cache = forward.read_prompts(PROMPTS)
        mask_BT = torch.cat([mask_BP, torch.ones_like(ids_B1)], dim=1)
        hidden.append(forward.read_on(ids_B1, mask_BT, cache).last_hidden_state)
    assert torch.allclose(*hidden, atol=1e-5)


def test_the_backbone_is_put_back_after_logits_even_on_an_error() -> None:
    model, forward = architecture("llama")
    before = forward.decoder.forward
    outputs = forward.read_prompts([[3, 4, 5]]).outputs
    with pytest.raises(RuntimeError):
        forward.logits(outputs, torch.zeros(2, 7))
    assert forward.decoder.forward == before
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 64)


def test_a_model_without_a_cache_argument_is_refused_for_generation() -> None:
    _, forward = architecture("rwkv", attention_hidden_size=32)
    with pytest.raises(ProbeError, match="RwkvForCausalLM keeps its state"):
        forward.read_prompts([[3, 4]])


def test_batches_keep_the_budget_and_are_sorted_by_length() -> None:
    # Lengths 9, 7, 7, 2, 1 with a budget of 18: two rows of 9; then 7 and 2 and 1 fit 3 * 6 only below 7, so 7 + 2.
    assert batches([2, 7, 9, 7, 1], budget=18) == [[2, 1], [3, 0], [4]]
    assert batches([50], budget=18) == [[0]]
    assert batches([4, 4, 4], budget=16, rows=[3, 1, 2]) == [[0, 1], [2]]
    assert batches([4, 4], budget=0) == [[0], [1]]

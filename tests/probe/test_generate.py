import pytest
import torch

from evertune.probe.generate import _Draw, generate_answers
from tests.probe.models import ARCHITECTURES, architecture, naive_greedy, random_groups

PROMPTS = [group[0].ids for group in random_groups()]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "gpt2"])
def test_answers_equal_reading_everything_anew_for_each_token(name: str) -> None:
    model, forward = architecture(name, **ARCHITECTURES[name])
    stop_ids = {2, 5, 7, 11, 13}
    answers = generate_answers(forward, PROMPTS, max_new_tokens=16, stop_ids=stop_ids)
    expected = [naive_greedy(model, prompt, 16, stop_ids) for prompt in PROMPTS]
    assert [(one.ids, one.stopped) for one in answers] == expected
    assert all(one.is_finite for one in answers)


def test_answers_equal_transformers_greedy_generate() -> None:
    model, forward = architecture("llama")
    answers = generate_answers(forward, PROMPTS, max_new_tokens=20, stop_ids={2, 9})
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=[2, 9],
        )[0, len(prompt) :].tolist()
        assert answer.stopped == (ids[-1] in (2, 9))
        assert list(answer.ids) == (ids[:-1] if answer.stopped else ids)


def test_rows_leave_the_batch_when_half_have_stopped() -> None:
    # Whatever the first two rows say first stops them; the others speak to the limit.
    model, forward = architecture("llama")
    first = {naive_greedy(model, prompt, 1, set())[0][0] for prompt in PROMPTS[:2]}
    widths = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    answers = generate_answers(forward, PROMPTS, max_new_tokens=6, stop_ids=first)
    assert widths[0] == 1, "prompts lie behind each other in one row"
    assert max(widths[1:]) == 2
    expected = [naive_greedy(model, prompt, 6, first) for prompt in PROMPTS]
    assert [(one.ids, one.stopped) for one in answers] == expected


def test_generation_ends_early_when_all_have_stopped() -> None:
    model, forward = architecture("llama")
    calls = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    answers = generate_answers(forward, PROMPTS, max_new_tokens=50, stop_ids=set(range(64)))
    assert [one.ids for one in answers] == [()] * 4
    assert all(one.stopped for one in answers)
    assert len(calls) == 1


def test_a_stop_token_at_the_limit_counts_and_one_after_it_does_not() -> None:
    model, forward = architecture("llama")
    said, _ = naive_greedy(model, PROMPTS[0], 3, set())
    stop = {said[2]} - set(said[:2])
    assert stop, "the third token repeats an earlier one; choose another prompt"
    at_limit = generate_answers(forward, PROMPTS[:1], max_new_tokens=3, stop_ids=stop)[0]
    before = generate_answers(forward, PROMPTS[:1], max_new_tokens=2, stop_ids=stop)[0]
    assert (at_limit.ids, at_limit.stopped) == (said[:2], True)
    assert (before.ids, before.stopped) == (said[:2], False)


def test_answers_do_not_depend_on_the_batch() -> None:
    _, forward = architecture("llama")
    together = generate_answers(forward, PROMPTS, max_new_tokens=12, stop_ids={2})
    alone = [generate_answers(forward, [one], max_new_tokens=12, stop_ids={2})[0] for one in PROMPTS]
    small = generate_answers(forward, PROMPTS, max_new_tokens=12, stop_ids={2}, batch_tokens=60)
    assert together == alone == small


def test_nan_logits_are_said() -> None:
    model, forward = architecture("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    assert not any(one.is_finite for one in generate_answers(forward, PROMPTS, max_new_tokens=2, stop_ids={2}))


def test_drawn_tokens_follow_the_softmax_and_depend_on_their_seed_alone() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draw = _Draw(1.0, list(range(4000)))
    tokens = draw(logits.expand(4000, 4), list(range(4000)), [0] * 4000)
    shares = torch.bincount(tokens, minlength=4) / 4000
    # Standard error of a share of 0.5 is 0.8 points.
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    alone = _Draw(1.0, [7])(logits.expand(1, 4), [0], [0])
    assert alone[0] == tokens[7]
    # At half the temperature the odds are squared: 0.25 against 0.09.
    cold = _Draw(0.5, list(range(4000)))(logits.expand(4000, 4), list(range(4000)), [0] * 4000)
    ratio = float((cold == 0).sum() / (cold == 1).sum())
    assert ratio == pytest.approx(0.25 / 0.09, rel=0.15)

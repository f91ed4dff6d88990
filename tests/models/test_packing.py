import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.models.packing import pack

from .helpers import gradients, largest_gap, make_batch, make_model


def test_a_row_worked_out_by_hand():
    packed = pack([[5, 6, 7], [5, 6, 7], [8, 9]], [[1, 2], [3, 4], [5]], share_prompts=True)
    assert packed.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 4, 8, 9, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1, 2]]
    assert packed.score_index.tolist() == [2, 3, 2, 5, 8]  # the prompt's last token predicts both first tokens
    assert packed.targets.tolist() == [1, 2, 3, 4, 5]
    assert packed.unpack(torch.arange(1.0, 6.0)).tolist() == [[1, 2], [3, 4], [5, 0]]


def test_prompts_stand_once_for_each_response_unless_shared():
    prompts, responses = [[5, 6]] * 3, [[1], [2, 3], []]
    assert pack(prompts, responses, share_prompts=True).input_ids.tolist() == [[5, 6, 1, 2, 3]]
    assert pack(prompts, responses, share_prompts=False).input_ids.tolist() == [[5, 6, 1, 5, 6, 2, 3, 5, 6]]


def test_equal_prompts_are_shared_wherever_they_stand():
    packed = pack([[5], [6], [5]], [[1], [2], [3]], share_prompts=True)
    assert packed.input_ids.tolist() == [[5, 1, 6, 2, 3]]
    assert packed.score_index.tolist() == [0, 2, 0]


tokens = st.lists(st.integers(2, 9), min_size=1, max_size=60)
sequences = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(2, 9), max_size=60)), min_size=1, max_size=9)


def visible(packed, prompts, responses, share: bool) -> torch.Tensor:
    """``[N, N]`` bool by the definition: a token sees its prompt and what stands before it in its own sequence."""
    owners = []  # for each token of the row: (its prompt's place, its response's number or None)
    seen = {}
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        name = tuple(prompt) if share else row
        if name not in seen:
            seen[name] = len(seen)
            owners += [(seen[name], None)] * len(prompt)
        owners += [(seen[name], row)] * len(response)
    position = packed.position_ids[0]
    allowed = [[a[0] == b[0] and b[1] in (None, a[1]) for b in owners] for a in owners]
    return torch.tensor(allowed) & (position[:, None] >= position[None, :])


@settings(max_examples=60, deadline=None)
@given(st.lists(tokens, min_size=3, max_size=3), sequences, st.booleans(), st.sampled_from([None, 1, 7]))
def test_the_plan_is_masked_attention(heads, rows, share, window):
    prompts, responses = [heads[i] for i, _ in rows], [r for _, r in rows]
    packed = pack(prompts, responses, share_prompts=share)
    total = packed.input_ids.shape[1]
    draw = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(1, h, total, 4, generator=draw, dtype=torch.float64) for h in (4, 2, 2))
    mask = visible(packed, prompts, responses, share)
    if window is not None:
        position = packed.position_ids[0]
        mask &= position[:, None] - position[None, :] < window
    scores = torch.einsum("hid,hjd->hij", q[0], k[0].repeat_interleave(2, 0)) * 0.3
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hij,hjd->ihd", weights, v[0].repeat_interleave(2, 0))
    got = packed.plan.attend(0, q, k, v, scale=0.3, window=window)
    torch.testing.assert_close(got[0], expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(tokens, min_size=3, max_size=3), sequences, st.booleans())
def test_log_probs_and_gradients_are_those_of_the_padded_path(heads, rows, share):
    from skyrl_train.models.attention import no_mask
    from skyrl_train.models.scoring import score, token_logprobs

    rows = [*rows, (0, [3])]  # at least one token to score
    prompts, responses = [heads[i] for i, _ in rows], [r for _, r in rows]
    batch, model = make_batch(prompts, responses), make_model("qwen3")
    packed = pack(prompts, responses, share_prompts=share)
    logits = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=no_mask(packed.input_ids),
        plan=packed.plan,
        logits_to_keep=packed.score_index,
    ).logits[0]
    got = packed.unpack(token_logprobs(logits, packed.targets, 1.0, False)[0])
    expected, _ = score(model, batch, temperature=1.0, packed=False, with_entropy=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    pull = torch.linspace(-1, 1, got.numel()).view_as(got)
    gap = largest_gap(gradients(model, (expected * pull).sum()), gradients(model, (got * pull).sum()))
    assert gap < 1e-6


@pytest.mark.parametrize("lengths", [[20] * 64, [5] * 40 + [300], list(range(1, 200, 3))])
def test_little_is_padded(lengths):
    packed = pack([[1] * 30] * len(lengths), [[2] * n for n in lengths], share_prompts=True)
    computed = sum(mask.numel() for mask in packed.plan._masks_of(None, torch.float32))
    needed = 30 * 30 + sum(max(n, 16) * (30 + max(n, 16)) for n in lengths)
    assert computed <= 1.6 * needed


def test_responses_of_one_length_are_one_block():
    packed = pack([[i] * 30 for i in range(8)], [[2] * 50] * 8, share_prompts=True)
    assert [tuple(m.shape) for m in packed.plan._masks_of(None, torch.float32)] == [(8, 1, 30, 30), (8, 1, 50, 80)]

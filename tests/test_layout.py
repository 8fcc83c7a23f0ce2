"""glm/layout.py: the rule against its definition, reading rules against their words, and how a text goes on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm.errors import LayoutError
from glm.layout import EVERYTHING, Blank, Causal, InTurn, Layout, Mask

steady = settings(derandomize=True, deadline=None, max_examples=60)

SOP, MASK, GMASK = 90, 80, 81
CHATGLM = Blank(sop=SOP, masks=(GMASK, MASK), axes=2, fixed=(GMASK, MASK))
FIRST = InTurn(sop=SOP, masks=(MASK, GMASK), axes=2, fixed=(MASK, GMASK))
ONE_AXIS = Blank(sop=SOP, masks=(MASK, GMASK), axes=1, fixed=(MASK,))


def written_out(mask: Mask, B: int, T: int, S: int) -> Tensor:
    """What attention is told, as bool [B, T, S]."""
    if mask.allowed is not None:
        return mask.allowed[:, 0].expand(B, T, S)
    return torch.ones(T, S, dtype=torch.bool).tril(S - T if mask.causal else S).expand(B, T, S)


@st.composite
def rules(draw: st.DrawFn) -> Layout:
    """A layout by the rule, with any of its parts."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    S = T + draw(st.integers(0, 4))
    lengths = st.lists(st.integers(0, S), min_size=B, max_size=B).map(torch.tensor)
    start, prefix = draw(st.none() | lengths), draw(st.none() | lengths)
    return Layout.rule(torch.zeros(B, T, 1, dtype=torch.long), S, start=start, prefix=prefix)


@steady
@given(rules())
def test_the_rule(layout: Layout) -> None:
    (B, T, _), S = layout.positions.shape, layout.keys
    for b in range(B):
        start = 0 if layout.start is None else int(layout.start[b])
        prefix = 0 if layout.prefix_length is None else int(layout.prefix_length[b])
        for i in range(T):
            t = i + S - T
            expected = [start <= j and (j < prefix or j <= t) for j in range(S)]
            assert layout.visible[b, i].tolist() == expected


@steady
@given(rules(), st.integers(0, 3), st.booleans())
def test_the_mask_is_what_is_visible(layout: Layout, always: int, explicit: bool) -> None:
    if explicit:
        layout = Layout(layout.positions, layout.visible)
    (B, T, _), S = layout.positions.shape, layout.keys
    seen = written_out(layout.mask(always), B, T, always + S)
    assert bool(seen[..., :always].all())
    for b in range(B):
        for i in range(T):
            expected = layout.visible[b, i].clone()
            if not expected.any() and not always:
                expected[i + S - T] = True  # a token that sees nothing sees itself: no NaN
            assert torch.equal(seen[b, i, always:], expected)


def test_masks_that_need_no_memory() -> None:
    assert Layout.causal(2, 5).mask() == Mask(None, causal=True)
    assert Layout.rule(torch.zeros(2, 1, 1, dtype=torch.long), 9).mask() == EVERYTHING
    assert Layout(torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1, 4, dtype=torch.bool)).mask() == EVERYTHING


@steady
@given(rules(), st.integers(1, 4), st.booleans())
def test_what_follows_sees_the_same_and_what_is_new(layout: Layout, count: int, explicit: bool) -> None:
    if explicit:
        layout = Layout(layout.positions, layout.visible)
    B, S = len(layout.positions), layout.keys
    new = layout.following(count, (1,))
    assert new.keys == S + count
    assert torch.equal(new.visible[..., :S], layout.visible[:, -1:].expand(B, count, S))
    assert torch.equal(new.visible[..., S:], torch.ones(count, count, dtype=torch.bool).tril().expand(B, -1, -1))
    assert torch.equal(new.positions, torch.arange(1, count + 1)[None, :, None].expand(B, -1, 1))


@steady
@given(rules(), st.integers(1, 3), st.integers(1, 3))
def test_following_twice_is_following_at_once(layout: Layout, first: int, second: int) -> None:
    once = layout.following(first + second, (2,))
    twice = layout.following(first, (2,)).following(second, (2,))
    assert torch.equal(twice.positions, once.positions[:, first:])
    assert torch.equal(twice.visible, once.visible[:, first:])


# ----------------------------------------------------------------------------- reading

paddings = st.integers(1, 7).flatmap(lambda T: st.lists(st.booleans(), min_size=T, max_size=T))


@steady
@given(paddings)
def test_causal_numbers_real_tokens_and_hides_padding(real: list[bool]) -> None:
    T, mask = len(real), torch.tensor([real])
    layout = Causal().read(torch.zeros(1, T, dtype=torch.long), mask)
    assert layout.positions[0, mask[0], 0].tolist() == list(range(sum(real)))
    for i in range(T):
        if real[i]:
            assert layout.visible[0, i].tolist() == [real[j] and j <= i for j in range(T)]


texts = st.lists(st.integers(1, 70) | st.sampled_from([MASK, GMASK]), max_size=5)


@steady
@given(texts, st.integers(0, 3), st.sampled_from([CHATGLM, ONE_AXIS]))
def test_blank_reads_up_to_its_start_token(text: list[int], written: int, rule: Blank) -> None:
    ids = [*text, GMASK, SOP, *[9] * written]
    read = len(text) + 1
    layout = rule.read(torch.tensor([ids]))
    blank = next(mask for mask in rule.masks if mask in ids)
    expected = []
    for i in range(len(ids)):
        place = ids.index(blank) if i >= read and blank in rule.fixed else i
        expected.append((place, max(0, i - read + 1))[: rule.axes])
    assert layout.positions[0].tolist() == [list(place) for place in expected]
    assert layout.visible[0].tolist() == [[j < read or j <= i for j in range(len(ids))] for i in range(len(ids))]
    after = rule.following(layout, 2).positions[0].tolist()
    last = expected[-1]
    steps = (int(blank not in rule.fixed), 1)[: rule.axes]
    assert after == [[at + k * step for at, step in zip(last, steps, strict=True)] for k in (1, 2)]


@steady
@given(texts, paddings, st.sampled_from([CHATGLM, ONE_AXIS, Causal()]))
def test_padding_anywhere_changes_nothing_for_real_tokens(
    text: list[int], real: list[bool], rule: Blank | Causal
) -> None:
    ids = [*text, GMASK, SOP]
    alone = rule.read(torch.tensor([ids]))
    holes = real + [True] * len(ids)
    slots = [i for i, keep in enumerate(holes) if keep][: len(ids)]
    padded, mask = torch.zeros(1, slots[-1] + 1, dtype=torch.long), torch.zeros(1, slots[-1] + 1, dtype=torch.bool)
    padded[0, slots], mask[0, slots] = torch.tensor(ids), True
    layout = rule.read(padded, mask)
    assert torch.equal(layout.positions[0, slots], alone.positions[0])
    assert torch.equal(layout.visible[0, slots][:, slots], alone.visible[0])
    assert not layout.visible[0, slots][:, ~mask[0]].any()
    after, alone_after = rule.following(layout, 2), rule.following(alone, 2)
    assert torch.equal(after.positions, alone_after.positions)
    assert not after.visible[0][:, : mask.shape[1]][:, ~mask[0]].any()


def test_rows_of_a_batch_are_read_one_by_one() -> None:
    ids = torch.tensor([[5, MASK, 6, 7, SOP], [5, 6, GMASK, SOP, 9]])
    layout = CHATGLM.read(ids)
    assert layout.positions[..., 0].tolist() == [[0, 1, 2, 3, 1], [0, 1, 2, 2, 2]]
    assert layout.positions[..., 1].tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 2]]
    assert layout.prefix_length is not None
    assert layout.prefix_length.tolist() == [4, 3]


def test_the_order_of_masks_decides_which_blank_is_filled() -> None:
    ids = torch.tensor([[MASK, 5, GMASK, SOP]])
    assert CHATGLM.read(ids).positions[0, -1].tolist() == [2, 1]
    assert Blank(SOP, (MASK, GMASK), 2, (GMASK, MASK)).read(ids).positions[0, -1].tolist() == [0, 1]


def test_built_layouts_are_what_is_read() -> None:
    ids = torch.tensor([[5, MASK, 6, SOP, 8, 9]]).expand(3, -1)
    read, built = CHATGLM.read(ids), Layout.prefix(3, 6, read=3, blank=1)
    assert torch.equal(read.positions, built.positions)
    assert torch.equal(read.visible, built.visible)


def test_several_blanks_are_written_one_after_another() -> None:
    layout = Layout.blanks(4, [(2, 2), (0, 3)])
    assert layout.positions[0].tolist() == [
        *([0, 0], [1, 0], [2, 0], [3, 0]),
        *([2, 1], [2, 2]),
        *([0, 1], [0, 2], [0, 3]),
    ]
    expected = torch.ones(9, 9, dtype=torch.bool).tril()
    expected[:4, :4] = True
    assert torch.equal(layout.visible[0], expected)
    assert torch.equal(layout.repeat(2).visible, expected.expand(2, 9, 9))


# ----------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("positions", "visible"),
    [
        (torch.zeros(1, 3, 1), torch.ones(1, 3, 3, dtype=torch.bool)),  # not integers
        (torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, 3, dtype=torch.bool)),  # no axis
        (torch.zeros(1, 3, 1, dtype=torch.long), torch.ones(1, 3, 3)),  # not bool
        (torch.zeros(1, 3, 1, dtype=torch.long), torch.ones(1, 2, 3, dtype=torch.bool)),  # other T
        (torch.zeros(2, 3, 1, dtype=torch.long), torch.ones(1, 3, 3, dtype=torch.bool)),  # other B
        (torch.zeros(1, 3, 1, dtype=torch.long), torch.ones(1, 3, 2, dtype=torch.bool)),  # S < T
        (torch.zeros(1, 3, 1, dtype=torch.long), torch.ones(3, 3, dtype=torch.bool)),
    ],
)
def test_layouts_that_do_not_fit(positions: Tensor, visible: Tensor) -> None:
    with pytest.raises(LayoutError):
        Layout(positions, visible)


def test_fewer_keys_than_queries() -> None:
    with pytest.raises(LayoutError, match="newest of 2 keys"):
        Layout.rule(torch.zeros(1, 3, 1, dtype=torch.long), 2)


@pytest.mark.parametrize("rule", [Causal(), CHATGLM])
@pytest.mark.parametrize("real", [torch.ones(1, 3), torch.ones(1, 4, dtype=torch.bool)])
def test_real_must_be_bool_of_the_ids_shape(real: Tensor, rule: Causal | Blank) -> None:
    with pytest.raises(LayoutError, match="real must be bool"):
        rule.read(torch.tensor([[5, GMASK, SOP]]), real)


def test_nothing_to_fill() -> None:
    with pytest.raises(LayoutError, match="put a mask token before it"):
        CHATGLM.read(torch.tensor([[5, SOP]]))


def test_a_text_that_is_still_being_read_cannot_go_on() -> None:
    with pytest.raises(LayoutError, match="in one call"):
        CHATGLM.following(CHATGLM.read(torch.tensor([[5, 6, GMASK]])), 1)


def test_axes_must_agree() -> None:
    with pytest.raises(LayoutError, match="1 axes"):
        CHATGLM.following(Layout.causal(1, 3), 1)


# ----------------------------------------------------------------------------- blanks filled in turn


def test_blanks_of_any_kind_are_filled_from_left_to_right() -> None:
    ids = torch.tensor([[1, GMASK, 2, MASK, 3, SOP, 4, 5, SOP, 6]])
    layout = FIRST.read(ids)
    assert layout.positions[0, :, 0].tolist() == [0, 1, 2, 3, 4, 1, 1, 1, 3, 3]
    assert layout.positions[0, :, 1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert torch.equal(layout.visible[0], Layout.blanks(5, [(1, 3), (3, 2)]).visible[0])
    assert FIRST.following(layout, 2).positions[0].tolist() == [[3, 3], [3, 4]]


def test_the_rules_differ_where_a_row_has_two_blanks_or_none() -> None:
    two = torch.tensor([[1, MASK, 2, GMASK, SOP, 3]])
    assert CHATGLM.read(two).positions[0, 4:, 0].tolist() == [3, 3]  # the kind decides
    assert FIRST.read(two).positions[0, 4:, 0].tolist() == [1, 1]  # the place does
    assert ONE_AXIS.read(two).positions[0, 4:, 0].tolist() == [1, 1]
    other = Blank(sop=SOP, masks=(GMASK, MASK), axes=1, fixed=(MASK,))
    assert other.read(two).positions[0, 4:, 0].tolist() == [4, 5]
    none = torch.tensor([[1, 2, 3]])
    assert torch.equal(FIRST.read(none).visible, Layout.causal(1, 3).visible)
    assert bool(CHATGLM.read(none).visible.all())
    assert FIRST.read(none).positions[0].tolist() == [[0, 0], [1, 0], [2, 0]]
    assert FIRST.following(FIRST.read(none), 2).positions[0].tolist() == [[3, 0], [4, 0]]


def test_in_turn_on_one_axis_and_places_that_go_on() -> None:
    rule = InTurn(sop=SOP, masks=(MASK, GMASK), axes=1, fixed=(MASK,))
    layout = rule.read(torch.tensor([[1, MASK, GMASK, SOP, 4, SOP, 5]]))
    assert layout.positions[0, :, 0].tolist() == [0, 1, 2, 1, 1, 5, 6]
    assert rule.following(layout, 1).positions[0].tolist() == [[7]]


def test_in_turn_with_padding() -> None:
    row = [1, MASK, 2, MASK, SOP, 4, SOP, 5]
    alone = FIRST.read(torch.tensor([row]))
    for pads in ([0, 0, *[1] * 8], [*[1] * 4, 0, 0, *[1] * 4]):
        real = torch.tensor([pads]).bool()
        ids = torch.zeros(1, 10, dtype=torch.long)
        ids[real] = torch.tensor(row)
        layout = FIRST.read(ids, real)
        assert torch.equal(layout.positions[real], alone.positions[0])
        assert torch.equal(layout.visible[0][real[0]][:, real[0]], alone.visible[0])
        assert not bool(layout.visible[0][real[0]][:, ~real[0]].any())


def test_more_start_tokens_than_blanks() -> None:
    for row in ([1, SOP], [1, MASK, SOP, 2, SOP], [1, SOP, MASK]):
        with pytest.raises(LayoutError, match="start tokens 90 but"):
            FIRST.read(torch.tensor([row]))

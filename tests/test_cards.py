"""The family table: bytes held to hand-counted ones, and cards to the bytes."""

import re
from dataclasses import replace

import pytest
from golden_folders import PROJECT

from glm import cards
from glm.cards import CARDS, USABLE, card, family_table, sizes
from glm.family import release, releases
from glm.info import describe, parameters


def test_every_release_has_a_line() -> None:
    assert [line.release.name for line in family_table()] == list(releases())
    assert all(len(line.cells) == len(cards.HEAD) for line in family_table())


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm2-6b-int4"])
def test_bytes_of_a_dense_release(name: str) -> None:
    D, F, QKV, V, L = 4096, 13696, (32 + 2 * 2) * 128, 65024, 28
    matrices = L * (QKV * D + D * D + 2 * F * D + D * F)
    others = 2 * V * D + L * (QKV + 2 * D) + D
    line = sizes(release(name))
    assert line.bf16 == 2 * (matrices + others)
    assert line.int4 == matrices * (128 / 2 + 2) / 128 + 2 * others
    assert line.parameters == line.active == matrices + others
    assert line.per_token == 2 * 2 * L * 2 * 128


def test_bytes_of_a_release_with_experts() -> None:
    D, E, top, F, dense, V, L, H, G, K = 4096, 128, 8, 1408, 10944, 151552, 46, 96, 8, 128
    line = sizes(release("glm-4.5-air"))
    expert = 3 * F * D
    matrices = L * ((H + 2 * G) * K * D + H * K * D) + 3 * dense * D + (L - 1) * (E + 1) * expert
    others = 2 * V * D + L * ((H + 2 * G) * K + 2 * D) + D + (L - 1) * E * D
    assert line.parameters == matrices + others + (L - 1) * E  # and the biases of the routers, which are float32
    assert line.bf16 == 2 * (matrices + others) + 4 * (L - 1) * E
    smaller = 2 * D * (dense // 64 - dense / 128)  # scales more, since 128 does not divide the rows of one matrix
    assert line.int4 == matrices * 66 / 128 + 2 * others + 4 * (L - 1) * E + smaller
    assert line.active == line.parameters - (L - 1) * (E - top) * expert


def test_the_cards_that_the_issue_names() -> None:
    assert sizes(release("glm-4.5-air")).card_int4 == "80"
    flash = sizes(release("glm-4.7-flash"))
    assert flash.card_int4 == "24"
    assert flash.cells[1] == "30/3.9"


def test_the_smallest_card_that_is_large_enough() -> None:
    for gibibytes in CARDS:
        most = USABLE * (gibibytes << 30)
        assert card(most) == str(gibibytes)
        assert card(most + 1) != str(gibibytes)
    largest = USABLE * (CARDS[-1] << 30)
    assert [card(n * largest) for n in (1.5, 2, 2.1, 4, 5)] == ["2×141", "2×141", "4×141", "4×141", "8×141"]


def test_a_longer_context_needs_a_larger_card(monkeypatch: pytest.MonkeyPatch) -> None:
    rumination = release("glm-z1-rumination-32b-0414")
    assert sizes(rumination).card_int4 == "24"
    monkeypatch.setattr(cards, "CONTEXT", 131072)
    assert sizes(rumination).card_int4 == "80"
    assert sizes(release("chatglm-6b")).card_int4 == "8"  # takes no more than 2048


@pytest.mark.parametrize("name", releases())
def test_int4_is_what_info_says(name: str) -> None:
    line, needs = sizes(release(name)), describe(name).needs
    assert (line.int4, line.bf16) == (needs["int4"].weights, needs["bf16"].weights)
    assert line.int4 < line.bf16 / 2


def test_int4_leaves_embedding_and_head_alone() -> None:
    spec = release("glm-4-9b").spec
    assert parameters(spec) == 9_399_951_360
    whole, tied = (sizes(replace(release("glm-4-9b"), spec=replace(spec, tied=way))) for way in (False, True))
    assert tied.int4 == whole.int4 - 2 * spec.vocabulary * spec.width


def test_numbers_are_short() -> None:
    assert [cards.billions(n) for n in (94_100_000, 6_243_584_000, 32_566_081_536, 353_000_000_000)] == [
        "0.09", "6.24", "32.6", "353"
    ]  # fmt: skip
    assert [cards.shortly(n) for n in (512, 1024, 202752, 1048576)] == ["512", "1k", "198k", "1024k"]


def test_readme_has_every_release_once() -> None:
    block = re.search(r"<!-- begin releases -->(.*?)<!-- end releases -->", (PROJECT / "README.md").read_text(), re.S)
    assert block is not None
    assert sorted(re.findall(r"`([^`]+)`", block[1])) == sorted(releases())

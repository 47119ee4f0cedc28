from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqdiff.errors import GroupsError
from fqdiff.groups import format_groups, parse_groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("12/345/6", ((1, 2), (3, 4, 5), (6,))),
        ("1-2/3-5/6", ((1, 2), (3, 4, 5), (6,))),
        ("123456", ((1, 2, 3, 4, 5, 6),)),
        ("1,2/3-5,6", ((1, 2), (3, 4, 5, 6))),
        ("6/5/4/3/2/1", ((6,), (5,), (4,), (3,), (2,), (1,))),
    ],
)
def test_groups_are_read_as_written(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_groups(text) == groups


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12/34/456", "block 4 is in two groups of '12/34/456'"),
        ("112/345/6", "block 1 is in one group twice"),
        ("12/35/6", "block 4 is in no group"),
        ("12/345/67", "'7' in"),
        ("12//3456", "an empty group"),
        ("", "an empty group"),
        ("5-3/126/4", "runs backwards"),
        ("1-/23456", "is no block"),
        ("12/345/x", "'x' in"),
        ("12/345/6²", "'²' in"),
    ],
)
def test_a_wrong_text_is_named(text: str, message: str) -> None:
    with pytest.raises(GroupsError, match=message) as caught:
        parse_groups(text)
    assert "12/345/6" in caught.value.hint


@given(st.permutations([1, 2, 3, 4, 5, 6]), st.sets(st.integers(1, 5)))
def test_groups_read_back_what_was_written(blocks: list[int], cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), 6]
    groups = tuple(tuple(blocks[a:b]) for a, b in pairwise(edges))
    assert parse_groups(format_groups(groups)) == groups

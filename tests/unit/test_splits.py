"""Scenes of different splits never share a seed, and data of another split is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from world2act.splits import INDICES_PER_SPLIT, LeakageError, Split, parse_split, require, scene_seed, split_of_seed

scenes = st.tuples(st.sampled_from(list(Split)), st.integers(0, INDICES_PER_SPLIT - 1))


@given(scenes, scenes)
def test_seeds_are_one_to_one(a: tuple[Split, int], b: tuple[Split, int]) -> None:
    assert (scene_seed(*a) == scene_seed(*b)) == (a == b)


@given(scenes)
def test_split_of_seed_is_the_inverse(scene: tuple[Split, int]) -> None:
    assert split_of_seed(scene_seed(*scene)) == scene
    assert split_of_seed(len(Split) * INDICES_PER_SPLIT) == (None, 0)


@pytest.mark.parametrize("index", [-1, INDICES_PER_SPLIT])
def test_index_outside_the_split_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="index"):
        scene_seed(Split.EVALUATION, index)


def test_require() -> None:
    require(["base", "base"], [Split.BASE], "behaviour cloning")
    with pytest.raises(LeakageError, match="behaviour cloning: takes episodes of split base only, got evaluation"):
        require(["base", "evaluation"], [Split.BASE], "behaviour cloning")
    with pytest.raises(ValueError, match="split: 'test' is unknown"):
        parse_split("test")

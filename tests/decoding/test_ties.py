"""What counts as a tie: captions that differ for rounding alone, and nothing else."""

import pytest
import torch
from drawn import GAP, assert_tie
from trained import Change


def likeliest(gap: float, change: Change) -> int:
    return int(change(torch.tensor([[0.0, gap]], dtype=torch.float64)).argmax())


@pytest.mark.parametrize("gap", [0.0, GAP / 100, GAP / 3])
def test_a_choice_that_a_small_gap_decides_is_a_tie(gap: float) -> None:
    assert_tie(lambda change: likeliest(gap, change), int(gap > 0))


def test_a_choice_that_a_larger_gap_decides_is_none() -> None:
    with pytest.raises(AssertionError, match=f"no gap below {GAP} decides"):
        assert_tie(lambda change: likeliest(1.1 * GAP, change), 1)


def test_captions_that_differ_in_float64_are_none() -> None:
    with pytest.raises(AssertionError, match="they differ in float64 too"):
        assert_tie(lambda change: likeliest(GAP / 100, change), 0)

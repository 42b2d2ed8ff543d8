"""Numbers that know where they come from are the numbers that they are."""

import math
import operator

import pytest
import torch

from rewriters.recording.numbers_in_code import SourcedFloat, SourcedInt, plain, reads_noted, sourced

EIGHT = ("attribute", "", "eight")


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "truediv", "mod", "pow"])
def test_what_is_computed_knows_what_from(name):
    function, number = getattr(operator, name), sourced(8, EIGHT)
    for operands in ((number, 3), (3, number), (number, 0.5), (number, number)):
        found = function(*operands)
        assert type(found) in (SourcedInt, SourcedFloat) and found.source == ("call", function, operands)
        assert plain(found) == function(*map(plain, operands)) and type(plain(found)) in (int, float)


def test_code_that_asks_for_the_value_is_noted():
    number, reads = sourced(8, EIGHT), []
    with reads_noted(reads.append):
        assert number == 8 and number > 3 and (number != 8) is False and bool(number)
        assert math.sqrt(number) == 8**0.5 and int(number) == 8 and round(number) == 8
    assert len(reads) == 7
    assert number == 8 and len(reads) == 7


def test_it_is_a_number_to_everyone_else():
    number = sourced(2, EIGHT)
    assert (
        isinstance(number, int) and hash(number) == hash(2) and [5, 6, 7][number] == 7 and {2: "two"}[number] == "two"
    )
    assert (1,) * number == (1, 1) and f"{number}" == "2" and list(range(number)) == [0, 1]
    assert torch.zeros(6).view(number, -1).shape == torch.zeros((number, 3)).shape == (2, 3)
    assert torch.equal(torch.ones(2) * number, torch.full((2,), 2.0))

"""Inputs that differ from the example's, in numbers of samples and entries and in what is given."""

import pytest
import torch
from torch import nn

from rewriters.slimming.probe_inputs import one_sample, probes


def asked(model, *args, taken=lambda probe: True, traced=(), **kwargs):
    """The questions, by their words, with the inputs that they make."""
    questions = probes(model, (args, kwargs), traced)
    found, probe = {}, next(questions)
    try:
        while True:
            found[probe.what] = probe
            probe = questions.send(taken(probe))
    except StopIteration:
        return {what: probe.change((args, kwargs)) for what, probe in found.items()}


def shapes(inputs):
    return [tuple(tensor.shape) for tensor in inputs[0]]


class Masked(nn.Module):
    def forward(self, x, mask=None, *, scale=None):
        return x


def test_each_length_in_turn_is_one_longer_wherever_it_occurs():
    found = asked(Masked(), torch.randn(2, 5, 8), torch.ones(5, 5))
    assert shapes(found["for 3 samples and a length of 9"]) == [(3, 5, 9), (5, 5)]
    assert shapes(found["for 3 samples and a length of 6"]) == [(3, 6, 8), (6, 6)]


def test_a_strides_worth_is_next_where_one_more_is_not_taken_then_the_batch_alone():
    image = torch.randn(2, 3, 32, 32)
    found = asked(Masked(), image, taken=lambda probe: "64" in probe.what)
    assert shapes(found["for 3 samples and a length of 64"]) == [(3, 3, 64, 64)]
    assert "for 3 samples" not in found
    found = asked(Masked(), image, taken=lambda probe: False)
    assert shapes(found["for 3 samples"]) == [(3, 3, 32, 32)]


def test_dimensions_of_one_length_are_asked_alone_where_they_cannot_grow_together():
    clip = torch.randn(2, 3, 3, 8)  # as many frames as colours
    frames = "for 3 samples and a length of 4 along dimension 1"
    found = asked(Masked(), clip, taken=lambda probe: probe.what == frames, traced=[frames])
    assert shapes(found[frames]) == [(3, 4, 3, 8)]
    assert shapes(found["for 5 samples and a length of 6 along dimension 1"]) == [(5, 6, 3, 8)]
    assert "for 3 samples and a length of 4 along dimension 2" in found and "for 3 samples" not in found
    assert not any("along" in what for what in asked(Masked(), clip))


def test_samples_are_all_different():
    (samples,), _ = asked(Masked(), torch.ones(1, 3), taken=lambda probe: False)["for 3 samples"]
    assert samples[:, 0].unique().numel() == 3


def test_more_is_asked_where_the_model_was_traced_for_an_answer():
    x = torch.randn(2, 4)
    assert "for 5 samples and a length of 7" not in asked(Masked(), x)
    further = asked(Masked(), x, traced=["for 3 samples and a length of 5"])
    assert shapes(further["for 5 samples and a length of 7"]) == [(5, 7)]


def test_optional_arguments_are_left_out_each_alone_and_together():
    x, mask = torch.randn(2, 4), torch.ones(2, 4)
    found = asked(Masked(), x, mask, scale=torch.ones(()))
    assert found["without mask"] == ((x, None), {"scale": torch.ones(())})
    assert found["without scale"][1] == {} and found["without mask and scale"] == ((x, None), {})


def test_a_list_gets_another_entry():
    x = torch.randn(2, 4)
    assert len(asked(Masked(), [x, x])["with one more entry in x"][0][0]) == 3


class Streaming(nn.Module):
    def forward(self, x, state=None):
        y = x if state is None else x + state
        return y, 2 * y


class Cached(nn.Module):
    def forward(self, x, cache=None):
        return {"y": x, "cache": [x, {"z": x + 1}]}


@pytest.mark.parametrize(("model", "name", "wanted"), [
    (Streaming(), "state", lambda x: 2 * x),
    (Cached(), "cache", lambda x: [x, {"z": x + 1}]),
])  # fmt: skip
def test_what_a_call_returned_is_given_back(model, name, wanted):
    x = torch.randn(2, 4)
    args, kwargs = asked(model, x)[f"with {name} as an earlier call returned it"]
    assert args[0] is x
    torch.testing.assert_close(kwargs[name], wanted(x))


def test_one_sample_of_several():
    (probe,) = one_sample(((torch.randn(4, 3),), {}))
    assert shapes(probe.change(((torch.randn(4, 3),), {}))) == [(1, 3)]
    assert not list(one_sample(((torch.randn(1, 3),), {})))

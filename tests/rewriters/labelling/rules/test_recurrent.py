"""Recurrent layers lose hidden units."""

import pytest
import torch
from torch import nn

from rewriters.labelling.channel_map import Side
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net


def network(kind: type[nn.RNNBase], **options) -> nn.Module:
    torch.manual_seed(0)
    width = 16 if options.get("bidirectional") else 8
    rnn = kind(6, 8, batch_first=True, **options)
    return Net(
        lambda net, x: net.head(net.rnn(net.stem(x))[0]), stem=nn.Linear(5, 6), rnn=rnn, head=nn.Linear(width, 3)
    )


CASES = [
    (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for options in ({}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False})
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_hidden_units_die_exactly(kind, options):
    slimmed = assert_exact(network(kind, **options).double(), (torch.randn(2, 4, 5).double(),))
    free = slimmed.analysis.channel_map.classes
    assert {Side("rnn.weight_ih_l0", 0), Side("rnn.weight_ih_l0", 1), Side("rnn.weight_hh_l0", 1)} <= set(free)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}])
def test_the_fused_lstm_of_float32(options):
    example = (torch.randn(2, 4, 5),)
    slimmed = slim(network(nn.LSTM, **options), example, share=0.5, seed=1)
    assert relative_error(slimmed.got, slimmed.wanted) <= 1e-5
    rnn = slimmed.model.rnn
    assert rnn.hidden_size == rnn.weight_hh_l0.shape[1] == rnn.weight_hh_l0.shape[0] // 4 < 8
    assert rnn.input_size == rnn.weight_ih_l0.shape[1] < 6
    slimmed.model.train()(*example)[0].sum().backward()
    assert rnn.weight_hh_l0.grad is not None
    slimmed.undo_log.undo()
    assert torch.equal(run_eval(slimmed.model, example)[0], slimmed.wanted[0])


def test_projected_hidden_units_stay():
    slimmed = assert_exact(
        Net(lambda net, x: net.head(net.rnn(net.stem(x))[0]), stem=nn.Linear(5, 6), rnn=nn.LSTM(6, 8, proj_size=4),
            head=nn.Linear(4, 3)).double(),
        (torch.randn(2, 4, 5).double(),),
    )  # fmt: skip
    assert Side("rnn.weight_ih_l0", 0) not in slimmed.analysis.channel_map.classes


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_lose_inputs_and_hidden_units(kind):
    def forward(m, x):
        state = None
        for step in m.a(x).unbind(1):
            state = m.cell(step, state)
        return m.b(state[0] if isinstance(state, tuple) else state)

    model = Net(forward, a=nn.Linear(3, 8), cell=kind(8, 6), b=nn.Linear(6, 2))
    slimmed = assert_exact(model.double(), (torch.randn(2, 4, 3).double(),))
    assert slimmed.analysis.channel_map.size == 8 + 6

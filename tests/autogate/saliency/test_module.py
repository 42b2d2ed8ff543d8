"""The equations of the paper, each against itself written out."""

import torch
from torch import nn

from autogate.saliency.counting import Notes
from autogate.saliency.layout import Layout
from autogate.saliency.module import SaliencyModule, binarized

X = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))


def module(training: bool) -> SaliencyModule:
    torch.manual_seed(0)
    made = SaliencyModule(6, 8, Layout(2), hidden=3, layer=0, notes=Notes(), published=True, closes=False)
    nn.init.normal_(made.expand.weight)
    nn.init.normal_(made.expand.bias)
    return made.train(training)


def test_scores_are_those_of_equations_5_and_6():
    made = module(False)
    d = X.sum((2, 3)) / 25
    hidden = torch.relu(d @ made.reduce.weight.T)
    assert torch.allclose(made(X), 1 + hidden @ made.expand.weight.T + made.expand.bias, atol=1e-6)
    assert made.macs == 6 * 3 + 3 * 8


def test_scores_are_one_at_first():
    assert torch.equal(SaliencyModule(6, 8, Layout(2), 3, 0, Notes(), True, False)(X), torch.ones(4, 8))


def test_the_distance_of_a_score_from_one_decides_sharply():
    made = SaliencyModule(6, 8, Layout(2), 3, 0, Notes(), True, False, sharpness=20.0)
    scores = torch.tensor([[0.9, 0.96, 1.0, 1.1, -torch.inf]])
    assert torch.allclose(made.decisive(scores), torch.tensor([[-1.0, 0.2, 1.0, 3.0, -torch.inf]]), atol=1e-5)
    assert torch.equal(module(False).decisive(scores), scores)  # the paper's


def test_codes_are_those_of_equations_7_and_8():
    scores, noise = torch.tensor([[-4.0, -0.1, 0.1, 4.0]]).expand(2, 4), torch.zeros(2, 4)
    s1 = (1.2 * scores[0].sigmoid() - 0.1).clip(0, 1)
    soft = torch.tensor([[True], [False]])
    code = binarized(scores, noise, soft)
    assert torch.allclose(code[0], s1)
    assert s1[0] == 0 and s1[3] == 1  # it saturates
    assert code[1].tolist() == [0, 0, 1, 1]
    assert binarized(scores, noise + 0.2, soft)[1].tolist() == [0, 1, 1, 1]


def test_gradients_go_to_s1_whichever_is_used():
    grads = []
    for soft in (True, False):
        scores = torch.tensor([[-0.3, 0.2, 0.9]], requires_grad=True)
        (binarized(scores, torch.zeros(1, 3), torch.tensor([[soft]])) * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
        grads.append(scores.grad)
    sigmoid = torch.tensor([[-0.3, 0.2, 0.9]]).sigmoid()
    assert torch.allclose(grads[0], 1.2 * sigmoid * (1 - sigmoid) * torch.tensor([1.0, 2.0, -3.0]))
    assert torch.equal(*grads)


def test_half_of_the_images_get_s1_in_training():
    made = module(True)
    nn.init.zeros_(made.expand.weight)
    nn.init.zeros_(made.expand.bias)
    made.soft.fill_(0.5)
    made.read(nn.Conv2d(6, 8, 1), (torch.randn(4000, 6, 1, 1),), {})
    hard = (made.factor() == 1).all(1)
    assert 0.47 < hard.float().mean() < 0.53
    assert (made.factor()[~hard] < 1).all()


def test_noise_has_its_deviation_and_eval_mode_has_none():
    made = module(True)
    nn.init.zeros_(made.expand.weight)
    nn.init.constant_(made.expand.bias, -1)  # scores of zero: the code is that of the noise
    made.noise.fill_(1.0)
    made.soft.fill_(1.0)
    made.read(nn.Conv2d(6, 8, 1), (torch.randn(4000, 6, 1, 1),), {})
    assert 0.45 < made.open.float().mean() <= 1.0
    made.eval()
    made.read(nn.Conv2d(6, 8, 1), (X,), {})
    assert not made.open.any()


def test_the_threshold_shifts_the_code_and_not_the_scale():
    made = module(False)
    scores = made(X).detach()
    made.threshold.fill_(float(scores.median()))
    made.read(nn.Conv2d(6, 8, 1), (X,), {})
    assert torch.equal(made.factor(), scores * (scores > scores.median()))


def test_a_channel_that_is_off_is_zero_at_a_score_of_minus_infinity():
    made = module(False)
    with torch.no_grad():
        made.expand.bias[2] = -torch.inf
    made.read(made, (X,), {})
    scaled = made.scale(made, (), torch.ones(4, 8, 3, 3))
    assert (scaled[:, 2] == 0).all() and scaled.isfinite().all()

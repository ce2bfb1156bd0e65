"""Mixed mode where λ enters below a normalisation: the fused ones are not differentiable twice, see evograd.mixed_mode."""

import pytest
import torch
from torch import nn

import evograd


class Shifted(nn.Module):
    """λ enters between two layers, below the normalisation."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(2, 4, 1), norm, nn.Conv1d(4, 3, 1)

    def forward(self, x, shift):
        return self.last(torch.tanh(self.norm(self.first(x) * shift)))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.BatchNorm1d(4).eval(),
        nn.LayerNorm([4, 5]),
        nn.LayerNorm(5, bias=False),
        nn.GroupNorm(2, 4),
    ],
    ids=str,
)
def test_mixed_mode_below_a_normalisation_is_t1_t2(norm, float64):
    model = Shifted(norm).double()
    if hasattr(norm, "running_mean") and norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    before = {name: b.clone() for name, b in model.named_buffers()}
    shift = torch.rand(4, 1, requires_grad=True)
    x, y, x_val, y_val = torch.randn(6, 2, 5), torch.randn(6, 3, 5), torch.randn(6, 2, 5), torch.randn(6, 3, 5)
    losses = (lambda m: (m(x, shift) - y).square().mean(), lambda m: (m(x_val, torch.ones(())) - y_val).square().mean())
    exact = evograd.baselines.unrolled(*losses, model, [shift], inner_lr=0.1)
    mixed = evograd.mixed_mode(*losses, model, [shift], inner_lr=0.1, lookahead="sgd")
    torch.testing.assert_close(mixed.grads[0], exact.grads[0], rtol=1e-9, atol=1e-14)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])

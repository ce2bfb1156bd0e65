"""Backbones with feature-wise transformations, and the heads that classify the queries of an episode.

Maps are (n, channels, h, w). An episode is (n_way, n_shot + n_query, 3, h, w): of each class first the support images, then
the queries. Every head returns scores (n_way · n_query, n_way), queries ordered by class.

Everything here runs in forward mode (for mixed mode) and can be differentiated twice (for T1-T2), on CPU and CUDA: the
recurrent cells are written out, since the fused ones have no such formulas, and distances are plain products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureWiseTransformation(nn.Module):
    """(1 + n₁ softplus(γ)) h + n₂ softplus(β) on maps h, with n₁, n₂ ~ N(0, 1) for each channel; the identity in eval mode.

    Tseng et al., "Cross-Domain Few-Shot Classification via Learned Feature-Wise Transformation", ICLR 2020.
    γ and β, (1, channels, 1, 1), are the hyperparameters λ of this experiment.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), 0.3))
        self.beta = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            return h
        scale, shift = torch.randn(2, *self.gamma.shape, dtype=self.gamma.dtype, device=self.gamma.device)
        scale = 1 + scale * F.softplus(self.gamma, beta=100)
        shift = shift * F.softplus(self.beta, beta=100)
        return torch.addcmul(shift.to(h), scale.to(h), h)


def transformations(model: nn.Module) -> dict[str, FeatureWiseTransformation]:
    """{name: module} of the feature-wise transformations, from the input to the output."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeatureWiseTransformation)}


def conv_bn(n_in: int, n_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias and BatchNorm: maps of 1/stride the size."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=(2 / (kernel * kernel * n_out)) ** 0.5)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


class ConvNet(nn.Module):
    """Conv-4 and Conv-6: blocks of convolution 3x3, BatchNorm, transformation, ReLU, and max-pooling in the first `n_pools`."""

    def __init__(self, n_blocks: int, n_pools: int, width: int, transform: bool):
        super().__init__()
        layers = []
        for block in range(n_blocks):
            layers += [*conv_bn(width if block else 3, width, 3)]
            layers += [FeatureWiseTransformation(width)] if transform else []
            layers += [nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if block < n_pools else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ResidualBlock(nn.Module):
    """Two convolutions 3x3, or a bottleneck of 1x1, 3x3, 1x1; transformations after the last BatchNorm and the shortcut's."""

    def __init__(self, n_in: int, n_out: int, stride: int, bottleneck: bool, transform: bool):
        super().__init__()
        if bottleneck:
            inner = n_out // 4
            first, second = conv_bn(n_in, inner, 1), conv_bn(inner, inner, 3, stride)
            inside = [*first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True)]
            last = conv_bn(inner, n_out, 1)
        else:
            inside = [*conv_bn(n_in, n_out, 3, stride), nn.ReLU(inplace=True)]
            last = conv_bn(n_out, n_out, 3)
        self.inside = nn.Sequential(*inside, *last)
        self.transformation = FeatureWiseTransformation(n_out) if transform else nn.Identity()
        self.shortcut = nn.Identity()
        if n_in != n_out:
            after = [FeatureWiseTransformation(n_out)] if transform else []
            self.shortcut = nn.Sequential(*conv_bn(n_in, n_out, 1, stride), *after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.transformation(self.inside(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-10, 18, 34 (and 50, 101, 152, with bottlenecks): maps of 1/32 of the image's size."""

    def __init__(self, n_blocks: tuple[int, int, int, int], bottleneck: bool, transform: bool):
        super().__init__()
        stem = [*conv_bn(3, 64, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)]
        stages, n_in = [], 64
        for stage, n in enumerate(n_blocks):
            n_out = 64 * 2**stage * (4 if bottleneck else 1)
            for block in range(n):
                stages.append(ResidualBlock(n_in, n_out, 2 if stage and not block else 1, bottleneck, transform))
                n_in = n_out
        self.layers = nn.Sequential(*stem, *stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


RESNETS = {  # blocks of each stage
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
CONVNETS = {"conv4": 4, "conv6": 6}
BACKBONES = (*CONVNETS, *RESNETS)


class Encoder(nn.Module):
    """A backbone. `shape` is that of its features: (channels, h, w) if `maps`, else (channels,).

    maps: ConvNets pool in the first two blocks only, so that the relation module gets maps of a quarter of the image's size.
    Otherwise ConvNets pool in the first four and their maps are flattened; a ResNet's are averaged. width: channels of a
    ConvNet.
    """

    def __init__(self, backbone: str, image_size: int, maps: bool, width: int = 64, transform: bool = True):
        super().__init__()
        self.maps, size = maps, image_size
        if backbone in CONVNETS:
            n_pools = 2 if maps else 4
            self.backbone = ConvNet(CONVNETS[backbone], n_pools, width, transform)
            channels, size = width, image_size // 2**n_pools
        elif backbone in RESNETS:
            bottleneck = backbone in BOTTLENECKS
            self.backbone = ResNet(RESNETS[backbone], bottleneck, transform)
            channels = 2048 if bottleneck else 512
            for _ in range(5):
                size = (size + 1) // 2
        else:
            raise ValueError(f"backbone {backbone!r} is unknown; accepted: {', '.join(BACKBONES)}")
        least = 8 if maps else 16
        if image_size < least:
            raise ValueError(f"image size {image_size} is too small for {backbone}: at least {least} pixels are needed")
        self.averaged = backbone in RESNETS
        self.shape = (channels, size, size) if maps else (channels if self.averaged else channels * size * size,)
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) -> features (n, *shape)."""
        h = self.backbone(images)
        if self.maps:
            return h
        return h.mean((2, 3)) if self.averaged else h.flatten(1)


def prototypes(features: Tensor, n_shot: int) -> tuple[Tensor, Tensor]:
    """Features (n_way, n_shot + n_query, …) -> (means of the support (n_way, …), queries (n_way · n_query, …))."""
    return features[:, :n_shot].mean(1), features[:, n_shot:].flatten(0, 1)


class RelationNet(nn.Module):
    """Sung et al., CVPR 2018: a network that scores every (prototype, query) pair of maps.

    The first convolution runs over the concatenation of the two maps. A convolution of a concatenation is the sum of two
    convolutions, so `split` convolves the n_way prototypes and the queries, and adds them for each pair: the same numbers,
    with 5 + 80 maps of half the channels convolved in place of 400. split=False is the form of the paper, to check against.
    """

    def __init__(self, shape: tuple[int, int, int], n_way: int, split: bool = True):
        super().__init__()
        channels, size, _ = shape
        self.split = split
        padding = 1 if size < 10 else 0
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=padding)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=padding)
        after, sizes = [], [size]
        for _ in range(2):
            size = size - 2 + 2 * padding
            pool = [nn.MaxPool2d(2)] if size > 1 else []  # a map of one pixel stays as it is
            # Without running statistics: those of the episode, in training and in eval mode.
            after.append(nn.Sequential(nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU(inplace=True), *pool))
            size = size // 2 if pool else size
            sizes.append(size)
        self.after1, self.after2 = after
        self.fc1, self.fc2 = nn.Linear(channels * size * size, 8), nn.Linear(8, 1)

    def forward(self, features: Tensor, n_shot: int) -> Tensor:
        centres, queries = prototypes(features, n_shot)
        n_way, n = len(centres), len(queries)
        if self.split:
            for_centres, for_queries = self.conv1.weight.chunk(2, dim=1)
            of_centres = F.conv2d(centres, for_centres, self.conv1.bias, padding=self.conv1.padding)
            of_queries = F.conv2d(queries, for_queries, padding=self.conv1.padding)
            h = (of_centres + of_queries.unsqueeze(1)).flatten(0, 1)  # (n · n_way, channels, h, w)
        else:
            pairs = [centres.expand(n, *centres.shape), queries.unsqueeze(1).expand(n, n_way, *queries.shape[1:])]
            h = self.conv1(torch.cat(pairs, dim=2).flatten(0, 1))
        h = self.after2(self.conv2(self.after1(h)))
        return self.fc2(F.relu(self.fc1(h.flatten(1)))).view(n, n_way)


class ProtoNet(nn.Module):
    """Snell et al., NeurIPS 2017: minus the squared distance to each prototype."""

    def __init__(self, shape: tuple[int], n_way: int):
        super().__init__()

    def forward(self, features: Tensor, n_shot: int) -> Tensor:
        centres, queries = prototypes(features, n_shot)
        return 2 * queries @ centres.t() - queries.square().sum(1, keepdim=True) - centres.square().sum(1)


class LSTMCell(nn.Module):
    """An LSTM cell written out."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.gates = nn.Linear(n_in + n_out, 4 * n_out)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], dim=-1)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class MatchingNet(nn.Module):
    """Vinyals et al., NeurIPS 2016, with full context embeddings: attention of each query over the support images.

    The support passes through a bidirectional LSTM, each query through as many steps of an attention LSTM as there are
    support images. Scores are log-probabilities of the classes.
    """

    def __init__(self, shape: tuple[int], n_way: int):
        super().__init__()
        (dim,) = shape
        self.there, self.back = LSTMCell(dim, dim), LSTMCell(dim, dim)
        self.attention = LSTMCell(2 * dim, dim)

    def _context(self, support: Tensor) -> Tensor:
        context = support
        for cell, order in ((self.there, range(len(support))), (self.back, reversed(range(len(support))))):
            state, outputs = (torch.zeros_like(support[0]),) * 2, [None] * len(support)
            for i in order:
                state = cell(support[i], state)
                outputs[i] = state[0]
            context = context + torch.stack(outputs)
        return context

    def forward(self, features: Tensor, n_shot: int) -> Tensor:
        n_way = len(features)
        support, queries = features[:, :n_shot].flatten(0, 1), features[:, n_shot:].flatten(0, 1)
        context = self._context(support)
        h, c = queries, torch.zeros_like(queries)
        for _ in range(len(support)):
            read = torch.softmax(h @ context.t(), dim=1) @ context
            h, c = self.attention(torch.cat([queries, read], dim=1), (h, c))
            h = h + queries
        similarity = F.relu(unit(h) @ unit(context).t()) * 100  # the factor makes the softmax sharp
        attention = torch.softmax(similarity, dim=1).view(-1, n_way, n_shot).sum(2)
        return (attention + 1e-6).log()


def unit(x: Tensor) -> Tensor:
    """Rows divided by their lengths."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-5)


class GNN(nn.Module):
    """Garcia and Bruna, ICLR 2018, in the form of the feature-wise transformation paper.

    Each graph has the support images and one query of each class as nodes, so there are n_query graphs. Nodes carry their
    features and, for the support, their label; three graph convolutions with learned edges follow.
    """

    def __init__(self, shape: tuple[int], n_way: int, dim: int = 128, hidden: int = 96):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(shape[0], dim), nn.BatchNorm1d(dim, track_running_stats=False))
        sizes = [dim + n_way, dim + n_way + hidden // 2, dim + n_way + hidden]
        self.edges = nn.ModuleList([edge_network(size, hidden) for size in sizes])
        outputs = [hidden // 2, hidden // 2, n_way]
        self.nodes = nn.ModuleList([nn.Linear(2 * size, n) for size, n in zip(sizes, outputs)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(n, track_running_stats=False) for n in outputs[:2]])

    def forward(self, features: Tensor, n_shot: int) -> Tensor:
        n_way, n_images = features.shape[:2]
        n_query = n_images - n_shot
        z = self.project(features.flatten(0, 1)).view(n_way, n_images, -1)
        support = z[:, :n_shot].unsqueeze(0).expand(n_query, -1, -1, -1)
        h = torch.cat([support, z[:, n_shot:].transpose(0, 1).unsqueeze(2)], dim=2)  # (n_query, n_way, n_shot + 1, dim)
        labels = torch.eye(n_way, dtype=h.dtype, device=h.device)[:, None].repeat(1, n_shot + 1, 1)
        labels[:, n_shot:] = 0
        h = torch.cat([h, labels.expand(n_query, -1, -1, -1)], dim=3).flatten(1, 2)  # (graphs, nodes, size)
        for i, (edge, node) in enumerate(zip(self.edges, self.nodes)):
            out = node(torch.cat([h, adjacency(edge, h) @ h], dim=2))
            if i < 2:
                out = F.leaky_relu(self.norms[i](out.flatten(0, 1)).view_as(out))
                h = torch.cat([h, out], dim=2)
        return out.view(n_query, n_way, n_shot + 1, n_way)[:, :, -1].transpose(0, 1).flatten(0, 1)


def edge_network(n_in: int, hidden: int) -> nn.Sequential:
    """|h_i − h_j| -> how much node i hears of node j, as 1x1 convolutions over the pairs."""
    layers = []
    for n_out in (2 * hidden, 2 * hidden, hidden, hidden):
        layers += [nn.Conv2d(n_in, n_out, 1), nn.BatchNorm2d(n_out, track_running_stats=False), nn.LeakyReLU()]
        n_in = n_out
    return nn.Sequential(*layers, nn.Conv2d(n_in, 1, 1))


def adjacency(edge: nn.Module, h: Tensor) -> Tensor:
    """Weights of the edges between the nodes (graphs, nodes, size), without loops: softmax over the neighbours."""
    difference = (h.unsqueeze(1) - h.unsqueeze(2)).abs().permute(0, 3, 1, 2)
    weights = edge(difference).squeeze(1)
    loops = torch.eye(h.shape[1], dtype=torch.bool, device=h.device)
    return torch.softmax(weights.masked_fill(loops, -1e8), dim=2)


# "relationnet" is trained by cross-entropy over the classes' scores, "relationnet_mse" by squared error of their sigmoid.
HEADS = {
    "relationnet": RelationNet,
    "relationnet_mse": RelationNet,
    "protonet": ProtoNet,
    "matchingnet": MatchingNet,
    "gnn": GNN,
}
ON_MAPS = ("relationnet", "relationnet_mse")


class FewShotModel(nn.Module):
    """Encoder, head, and the auxiliary classifier on the encoder's averaged features.

    model(episode, n_shot) gives the scores of the queries; model(images) the classifier's logits.
    """

    def __init__(
        self, backbone: str, head: str, n_way: int, image_size: int, n_classes: int, width: int = 64, transform: bool = True
    ):
        super().__init__()
        self.encoder = Encoder(backbone, image_size, head in ON_MAPS, width, transform)
        self.head = HEADS[head](self.encoder.shape, n_way)
        self.classifier = classifier(self.encoder, n_classes)

    def forward(self, images: Tensor, n_shot: int | None = None) -> Tensor:
        if n_shot is None:
            return self.classifier(pooled(self.encoder(images)))
        features = self.encoder(images.flatten(0, 1))
        return self.head(features.unflatten(0, images.shape[:2]), n_shot)


def model_of(config: Mapping[str, object], n_classes: int) -> FewShotModel:
    """The model of a run's configuration."""
    names = ("backbone", "head", "n_way", "image_size", "width")
    return FewShotModel(**{name: config[name] for name in names}, n_classes=n_classes, transform=config["method"] != "none")


def classifier(encoder: Encoder, n_classes: int) -> nn.Sequential:
    """Two hidden layers of the features' size."""
    dim = encoder.shape[0]
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, n_classes))


def pooled(features: Tensor) -> Tensor:
    """Maps -> their averages; vectors as they are."""
    return features.mean((2, 3)) if features.ndim == 4 else features


def episode_targets(scores: Tensor) -> Tensor:
    """The class of each query, (n_way · n_query,)."""
    n_way = scores.shape[1]
    return torch.arange(n_way, device=scores.device).repeat_interleave(len(scores) // n_way)


def episode_loss(scores: Tensor, head: str) -> Tensor:
    """The loss of an episode from the scores of its queries."""
    target = episode_targets(scores)
    if head == "relationnet_mse":
        return F.mse_loss(torch.sigmoid(scores), F.one_hot(target, scores.shape[1]).to(scores))
    return F.cross_entropy(scores, target)

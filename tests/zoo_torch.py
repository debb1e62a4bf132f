"""Architectures of torch.nn, of a few lines, of timm and of torchvision."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import Architecture

BATCH, TOKENS, WIDTH, HIDDEN, HEADS, LABELS = 2, 16, 64, 128, 4, 16
ENCODER = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, "batch_first": True}
LINEARS, FC = ("linear1", "linear2"), ("mlp.fc1", "mlp.fc2")
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 4}
WINDOWS = {"embed_dim": 64, "depths": [2, 1], "num_heads": [2, 4]}


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, TOKENS, WIDTH)))


def distance(output: Tensor) -> Tensor:
    """From a target that is the same in each call."""
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return F.mse_loss(output, target)


class Classifier(nn.Module):
    """Any model of images, with the loss in the graph."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = make()
        for parameter in self.model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # a head of zeros hands no gradients on

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)


class Mixer(nn.Module):
    """MLP-Mixer: FFNs over features, and over tokens between two transpositions."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        # Tokens are as many as features: fewer than 64 would stay dense.
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            h = norm(x)
            x = x + (mlp(h) if number % 2 else mlp(h.transpose(1, 2)).transpose(1, 2))
        return x


class ConvBlocks(nn.Module):
    """As ConvNeXt's: a depthwise convolution, channels to the end and back around the FFN, a scale of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv, up, down, scale in zip(self.convs, self.ups, self.downs, self.scales, strict=True):
            h = F.layer_norm(conv(x).permute(0, 2, 3, 1), (WIDTH,))
            x = x + (scale * down(F.gelu(up(h)))).permute(0, 3, 1, 2)
        return x


class Block(nn.Module):
    """Attention and FFN, the FFN to be given."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.ffn(self.norm_2(x))


class Blocks(nn.Module):
    """As in training scripts: blocks in a loop, checkpointed or not."""

    def __init__(self, ffn: Callable[[], nn.Module], *, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(ffn()) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def plain_ffn(*activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), *activation, nn.Linear(HIDDEN, WIDTH))


class Repeated(nn.Module):
    """As ALBERT's layers: the same FFN again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(WIDTH), plain_ffn(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.ffn(self.norm(x))
        return x


class Experts(nn.Module):
    """Experts with a list of modules, each for the tokens that chose it: sizes depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(plain_ffn(nn.SiLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        # Dense over the experts: each sees all tokens, weighted by zero where it was not chosen.
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(-1, keepdim=True)
            total = total + weight * expert(x)
        return total


def own(
    name: str,
    make: Callable[[], nn.Module],
    ffn: tuple[str, str],
    inputs: Mapping[str, Callable[[], Tensor]],
    **more: Any,
) -> Architecture:
    given = lambda: {key: draw() for key, draw in inputs.items()}  # noqa: E731
    return Architecture(name=name, build=make, inputs=given, up=ffn[0], down=ffn[1], **{"loss": distance, **more})


def images(name: str, ffn: tuple[str, str], size: int = 32, **settings: Any) -> Architecture:
    """A class of timm or torchvision, by its full name."""
    library, _, path = name.partition(".")

    def make() -> nn.Module:
        return attrgetter(path)(import_module(library))(num_classes=LABELS, **settings)

    return own(
        name.replace(".models.", "."),
        partial(Classifier, make),
        ffn,
        {"images": partial(tokens, BATCH, 3, size, size), "labels": lambda: torch.randint(LABELS, (BATCH,))},
        loss=lambda output: output,
        library=library,
    )


X = {"x": tokens}
ARCHITECTURES = [
    own(
        "nn.TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2),
        LINEARS,
        {"src": tokens},
    ),
    own(
        "nn.TransformerEncoder norm_first",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**ENCODER, norm_first=True, activation="gelu"), 2, enable_nested_tensor=False
        ),
        LINEARS,
        {"src": tokens},
    ),
    own(
        "nn.TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**ENCODER), 2),
        LINEARS,
        {"tgt": tokens, "memory": tokens},
    ),
    own(
        "nn.Transformer",
        lambda: nn.Transformer(**ENCODER, num_encoder_layers=1, num_decoder_layers=1),
        LINEARS,
        {"src": tokens, "tgt": tokens},
    ),
    own("blocks", partial(Blocks, partial(plain_ffn, nn.GELU())), (r"ffn\.0", r"ffn\.2"), X),
    own(
        "blocks checkpointed",
        partial(Blocks, partial(plain_ffn, nn.GELU()), checkpointed=True),
        (r"ffn\.0", r"ffn\.2"),
        X,
    ),
    own("blocks in place", partial(Blocks, partial(plain_ffn, nn.ReLU(inplace=True))), (r"ffn\.0", r"ffn\.2"), X),
    own("blocks of experts", partial(Blocks, Experts), (r"experts\.\d+\.0", r"experts\.\d+\.2"), X),
    own("FFN repeated", Repeated, (r"ffn\.0", r"ffn\.2"), X),
    own("MLP-Mixer", Mixer, (r"mlps\.\d+\.0", r"mlps\.\d+\.2"), {"x": partial(tokens, BATCH, WIDTH, WIDTH)}),
    own("ConvNeXt blocks", ConvBlocks, (r"ups\.\d+", r"downs\.\d+"), {"x": partial(tokens, BATCH, WIDTH, 4, 4)}),
    images("timm.models.vision_transformer.VisionTransformer", FC, img_size=32, patch_size=8, **VIT),
    images("timm.models.eva.Eva", FC, img_size=32, patch_size=8, **VIT, use_rot_pos_emb=True, swiglu_mlp=True),
    images("timm.models.cait.Cait", FC, img_size=32, patch_size=8, **VIT),
    images(
        "timm.models.swin_transformer.SwinTransformer", FC, img_size=32, **WINDOWS, window_size=4, drop_path_rate=0.0
    ),
    images("timm.models.convnext.ConvNeXt", FC, 64, depths=(1, 1, 1, 1), dims=(64, 64, 64, 128)),
    images(
        "timm.models.mlp_mixer.MlpMixer",
        ("mlp_(tokens|channels).fc1", "mlp_(tokens|channels).fc2"),
        64,
        img_size=64,
        patch_size=8,
        num_blocks=2,
        embed_dim=64,
        mlp_ratio=(2, 2),
    ),
    images(
        "torchvision.models.VisionTransformer",
        (r"mlp\.0", r"mlp\.3"),
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
    ),
    images(
        "torchvision.models.SwinTransformer",
        (r"mlp\.0", r"mlp\.3"),
        patch_size=[4, 4],
        **WINDOWS,
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
    ),
]

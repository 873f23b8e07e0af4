"""What the convolution channels of a mixer go through: three kinds, each on the token grid, stride 1; CLS passes, or gets nothing.

Sources: ``depthwise`` is EIT's (arXiv:2203.07116): free kernels, one for each channel, and nothing else. ``lightweight`` and
``dynamic`` (arXiv:1901.10430) make the branch of LSRA as Lite Transformer has it (arXiv:2004.11886): a linear layer, with or
without a gate, then a convolution whose kernels the channels of a head share and a softmax normalises, then a linear layer. Such a
kernel is non-negative and sums to 1, so it is a low-pass filter at every step of training; a depthwise one may become anything.

Where we differ: two dimensions instead of one, the same window in every layer, and the linear layers start as all others of
the backbone do. Nobody published this branch for images.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit_lab.config import IBConfig
from eit_lab.models.linear import Linear
from eit_lab.models.paths import depthwise_path
from eit_lab.models.triton_conv import grid_conv


class GridConv(nn.Module):
    """Depthwise k x k convolution of tokens on their grid, stride 1, no bias. The CLS row passes unchanged, or becomes zero."""

    def __init__(self, dim: int, *, kernel_size: int, cls: Literal["pass", "zero"] = "pass") -> None:
        super().__init__()
        self.cls = cls
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + h w, c) -> (B, 1 + h w, c)."""
        if self.path(x) == "triton":
            passing = x if self.cls == "pass" else F.pad(x[:, 1:], (0, 0, 1, 0))  # no token reads the row of CLS
            return grid_conv(passing, self.conv.weight, grid)
        # The tokens are already an image in channels-last order: unflatten and permute are views, and the
        # convolution reads its slice of the channels once.
        image = x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # (B, c, h, w)
        tokens = self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)
        cls = x[:, :1] if self.cls == "pass" else torch.zeros_like(x[:, :1])
        return torch.cat([cls, tokens], dim=1)

    def joins(self, x: Tensor) -> bool:
        """Whether one kernel can convolve channels of ``x``, pass CLS and write what attention gave beside them."""
        return self.cls == "pass" and self.path(x) == "triton"

    def path(self, x: Tensor) -> str:
        """How tokens like these are convolved, of paths.DEPTHWISE."""
        return depthwise_path(x.device, x.dtype, kernel_size=self.conv.kernel_size[0])

    def taps(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean of |kernel| over the channels (1, 1, k k), the same for any input."""
        return self.conv.weight.abs().mean(dim=(0, 1)).view(1, 1, -1)


class LightweightConv(nn.Module):
    """One k x k kernel a head, shared by its channels, normalised by a softmax over its taps. The CLS row passes unchanged.

    Zeros around the grid, so that a kernel's sum falls below 1 at the border, as in the sources. ``weight_dropout`` drops taps
    of the normalised kernels in training and scales up what is left.
    """

    def __init__(self, dim: int, *, num_heads: int, kernel_size: int, weight_dropout: float) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.weight_dropout = weight_dropout
        self.weight = nn.Parameter(torch.empty(num_heads, 1, kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: the taps before their softmax are Xavier-uniform."""
        nn.init.xavier_uniform_(self.weight)

    def kernels(self) -> Tensor:
        """The normalised kernels (H, k, k); each is non-negative and sums to 1."""
        return self.weight.flatten(1).softmax(dim=-1).view_as(self.weight)[:, 0]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + h w, c) -> (B, 1 + h w, c); channel i is of head i // (c / H)."""
        kernels = F.dropout(self.kernels(), self.weight_dropout, self.training)
        kernels = kernels[:, None].repeat_interleave(self.head_dim, dim=0)  # (c, 1, k, k)
        image = x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # (B, c, h, w)
        image = F.conv2d(image, kernels, padding=kernels.shape[-1] // 2, groups=len(kernels))
        return torch.cat([x[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def taps(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean of the kernels over the channels (1, 1, k k), the same for any input."""
        return self.kernels().mean(dim=0).view(1, 1, -1)


class DynamicConv(nn.Module):
    """As LightweightConv, but every token predicts its own kernels from its channels, by one linear layer without bias."""

    def __init__(self, dim: int, *, num_heads: int, kernel_size: int, weight_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.weight_dropout = weight_dropout
        self.predict = Linear(dim, num_heads * kernel_size**2, bias=False)

    def kernels(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, c) -> their normalised kernels (B, N, H, k k), rows of a kernel one after the other."""
        return self.predict(tokens).unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + h w, c) -> (B, 1 + h w, c)."""
        (h, w), k = grid, self.kernel_size
        tokens = x[:, 1:]
        kernels = F.dropout(self.kernels(tokens), self.weight_dropout, self.training)
        kernels = kernels.to(x.dtype).unflatten(1, grid)  # (B, h, w, H, k k)
        border = k // 2
        image = F.pad(tokens.unflatten(1, grid), (0, 0, border, border, border, border))
        image = image.unflatten(-1, (self.num_heads, -1))  # (B, h + k - 1, w + k - 1, H, c / H)
        # Tap by tap over shifted views: the windows side by side would take k k times the memory of the tokens.
        mixed = image[:, :h, :w] * kernels[..., 0, None]
        for tap in range(1, k * k):
            dy, dx = divmod(tap, k)
            mixed = mixed + image[:, dy : dy + h, dx : dx + w] * kernels[..., tap, None]
        return torch.cat([x[:, :1], mixed.flatten(3).flatten(1, 2)], dim=1)

    def taps(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean of each token's kernels over the channels (B, h w, k k), for an input of forward."""
        return self.kernels(x[:, 1:]).mean(dim=2)

    def count_products(self, x: Tensor, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the taps for an input of forward; the linear layer's are not among them."""
        return x.shape[0] * grid[0] * grid[1] * x.shape[-1] * self.kernel_size**2


class LiteBranch(nn.Module):
    """Linear c -> c, or c -> 2c and a gated linear unit; a convolution; linear c -> c. The linear layers see CLS too."""

    def __init__(self, conv: LightweightConv | DynamicConv, *, dim: int, glu: bool) -> None:
        super().__init__()
        self.fc_in = Linear(dim, 2 * dim if glu else dim)
        self.act = nn.GLU() if glu else nn.Identity()
        self.conv = conv
        self.fc_out = Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + h w, c) -> (B, 1 + h w, c)."""
        return self.fc_out(self.conv(self.act(self.fc_in(x)), grid))

    def taps(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Those of its convolution; the linear layers mix channels, not tokens."""
        return self.conv.taps(self.act(self.fc_in(x)), grid)


def build_convolution(ib: IBConfig, *, dim: int, num_heads: int) -> GridConv | LiteBranch:
    """The convolution branch for ``dim`` channels, a multiple of ``num_heads``: (B, 1 + h w, dim), (h, w) -> the same shape."""
    if ib.conv == "depthwise":
        return GridConv(dim, kernel_size=ib.kernel_size, cls=ib.cls)
    kind = LightweightConv if ib.conv == "lightweight" else DynamicConv
    conv = kind(dim, num_heads=num_heads, kernel_size=ib.kernel_size, weight_dropout=ib.weight_dropout)
    return LiteBranch(conv, dim=dim, glu=ib.glu)

"""Two-dimensional rotary position embedding (RoPE, arXiv 2104.09864)."""

import torch
from einops import rearrange
from torch import Tensor

ROPE_GRIDS = ("legacy", "row_major")


def grid_positions(h: int, w: int, rope_grid: str, device: torch.device | str = "cpu") -> Tensor:
    """Coordinates (h*w, 2) of the row-major tokens of an (h, w) grid.

    `row_major` is (n div w, n mod w). `legacy` is (n mod h, n div h): the axes swapped on a square grid, a
    scrambled order on any other. All released weights were trained with it.
    """
    # Computed from the token's number, not from a mesh: `legacy` is a wrong division by h that training made part of the model.
    n = torch.arange(h * w, device=device)
    first, second = (n % h, n // h) if rope_grid == "legacy" else (n // w, n % w)
    return torch.stack([first, second], dim=-1)


def rope_table(positions: Tensor, head_dim: int, dtype: torch.dtype, theta: float = 10000.0) -> Tensor:
    """[cos, sin] (N, head_dim/2, 2) of the rotation angle of each channel pair, in float32 or wider.

    The first half of the channels turns with the first coordinate, the second half with the second, at
    frequencies theta^(-2i / (head_dim/2)).
    """
    # A large image has positions above 256, where bfloat16 skips every other whole number.
    dtype = torch.promote_types(dtype, torch.float32)
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, device=positions.device, dtype=dtype) / half)
    angles = rearrange(positions[:, :, None] * frequencies, "n xy f -> n (xy f)")
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rope(u: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (a, b) -> (a cos - b sin, b cos + a sin) of u (B, heads, N, head_dim), in float32.

    Eagerly this is one complex product, the fewest passes over memory; compilers fuse the real form and have no
    code for complex numbers.
    """
    pairs = rearrange(u.to(table.dtype), "b heads n (f two) -> b heads n f two", two=2)
    if torch.compiler.is_compiling() or u.device.type == "mps":
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table))
    return rearrange(turned, "b heads n f two -> b heads n (f two)").to(u.dtype)

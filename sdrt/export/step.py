"""The denoising step as a linear machine around the UNet: one graph that every sampler drives with a row of numbers.

With registers r, denoised estimate D and one row of the tables, a model call is

    input = sum_j a_j r_j                        out = sum_g w_g UNet(input, timestep, context_g)
    D     = sum_j u_j r_j + q out                D  += k mask (init - D)
    r'    = M [r_0 .. r_3, D, noise]             r'_0 += (1 - k) mask (b init + c init_noise - r'_0)

so sampler, schedule, guidance scale and seed are data. docs/architecture.md derives it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdrt.export.architecture import UNetSpec
from sdrt.export.unet import Hypernetworks, UNet


def _combine(coefficients: Tensor, states: Tensor) -> Tensor:
    """Sum over the first axis of `states`, weighted. Elementwise on purpose: a matrix product may run in TF32 on a GPU."""
    return (coefficients.reshape(-1, *[1] * (states.dim() - 1)) * states).sum(dim=0)


class Step(nn.Module):
    """One model call of any linear sampler, guidance batch included. Latents, tables and updates are float32."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = UNet(spec)
        self.hypernetworks = Hypernetworks(spec.hypernetworks)

    def forward(
        self,
        row: Tensor,
        timestep: Tensor,
        a: Tensor,
        w: Tensor,
        u: Tensor,
        q: Tensor,
        M: Tensor,
        inpaint: Tensor,
        noise: Tensor,
        registers: Tensor,
        context: Tensor,
        mask: Tensor,
        init: Tensor,
        init_noise: Tensor,
        concat: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run row `row` of the tables once.

        Shapes, with S rows, R registers, G guidance branches, N pictures and T tokens: row int64 `[1]`; timestep, q `[S]`; a, u `[S, R]`;
        w `[S, G]`; M `[S, R, R+2]`; inpaint `[S, 3]` (k, b, c); noise `[S, N, 4, h, w]`; registers `[R, N, 4, h, w]`;
        context `[G*N, T, C]` (branch-major: all pictures of the negative first); mask `[N, 1, h, w]` (1 keeps); init, init_noise `[N, 4, h, w]`.
        Inpainting models take concat `[G*N, 5, h, w]` too, which is not scaled as the latents are.
        Returns the next registers, row + 1 and the denoised estimate `[N, 4, h, w]`.
        """
        timestep, a, w, u, q, M, inpaint, noise = (x.index_select(0, row) for x in (timestep, a, w, u, q, M, inpaint, noise))
        branches = w.shape[1]
        latents, unet = _combine(a, registers), self.model.diffusion_model
        if concat is None:
            out = unet(latents, timestep, context, self.hypernetworks, branches)
        else:
            batch = latents[None].expand(branches, -1, -1, -1, -1).flatten(0, 1)
            out = unet(torch.cat([batch, concat], dim=1), timestep, context, self.hypernetworks)
        denoised = _combine(u, registers) + q * _combine(w, out.float().unflatten(0, (branches, -1)))
        k, b, c = inpaint[0, 0], inpaint[0, 1], inpaint[0, 2]
        denoised = denoised + k * mask * (init - denoised)
        states = torch.cat([registers, denoised[None], noise], dim=0)
        updated = (M[0, :, :, None, None, None, None] * states[None]).sum(dim=1)
        first = updated[0]
        first = first + (1.0 - k) * mask * (b * init + c * init_noise - first)
        return torch.cat([first[None], updated[1:]], dim=0), row + 1, denoised

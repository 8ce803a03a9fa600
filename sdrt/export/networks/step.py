"""The denoising step as a linear machine around the UNet. One graph serves every sampler; rows of numbers drive it.

Each picture n of a call has its own row of the tables and its own registers r. D is its denoised estimate, E a second
combination of the branches' outputs:

    input = sum_j a_j r_j                        out = f sum_g w_g UNet(input, timestep, context_g)
    D     = sum_j u_j r_j + q out                D  += k mask (init - D)
    E     = sum_g v_g UNet(input, timestep, context_g)
    r'    = M [r_0 .. r_(R-1), D, E, noise]      r'_0 += (1 - k) mask (b init + c init_noise - r'_0)

f is 1 unless guidance is rescaled (Lin et al. 2023, "Common Diffusion Noise Schedules", equations 15 and 16): with
`rescale` as the weights of the conditional output times phi, f = 1 - phi + std(sum_g rescale_g UNet_g) / std(sum_g w_g
UNet_g).

So sampler, schedule, guidance scale and seed are data. Pictures that differ in all of them share a call.
docs/architecture.md derives the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdrt.export.architecture import UNetSpec
from sdrt.export.networks.unet import Hypernetworks, UNet


def _combine(coefficients: Tensor, states: Tensor) -> Tensor:
    """Sum each picture's states `[N, J, C, h, w]`, weighted by `[N, J]`, over J.

    Elementwise on purpose: a matrix product may run in TF32 on a GPU.
    """
    return (coefficients[:, :, None, None, None] * states).sum(dim=1)


def _mix(coefficients: Tensor, states: Tensor) -> Tensor:
    """The same with coefficients `[N, R, J]`, to `[N, R, C, h, w]`."""
    return (coefficients[:, :, :, None, None, None] * states[:, None]).sum(dim=2)


def _deviation(states: Tensor) -> Tensor:
    """Standard deviation of each picture `[N, C, h, w]`, as `[N, 1, 1, 1]`."""
    centred = states - states.mean(dim=(1, 2, 3), keepdim=True)
    return centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _guided(w: Tensor, rescale: Tensor, outputs: Tensor) -> Tensor:
    """The guided output of each picture, rescaled."""
    out = _combine(w, outputs)
    phi = rescale.sum(dim=1)[:, None, None, None]
    ratio = _deviation(_combine(rescale, outputs)) / _deviation(out).clamp(min=1e-20)
    return out * (1.0 - phi + ratio)


class Step(nn.Module):
    """One model call of any linear sampler, with its guidance batch. Latents, tables and updates are float32."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = UNet(spec)
        self.hypernetworks = Hypernetworks(spec.hypernetworks)

    def forward(
        self,
        row: Tensor,
        next: Tensor,
        timestep: Tensor,
        a: Tensor,
        w: Tensor,
        v: Tensor,
        rescale: Tensor,
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
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run row `row[n]` of the tables once for each picture n.

        Shapes are in `sdrt.bundle.graphs`. `inpaint` holds (k, b, c). `mask` is 1 where the image is kept. `next` gives
        for each row the row after it. `concat` is what inpainting and edit models see beside the latents; unlike the
        latents it is not scaled. `vector` and `guidance` are what a model is told beside timestep and context. Returns
        the next registers, the next rows and the denoised estimates `[N, C, h, w]`.
        """
        next, timestep, a, w, v, rescale, u, q, M, inpaint, noise = (
            x.index_select(0, row) for x in (next, timestep, a, w, v, rescale, u, q, M, inpaint, noise)
        )
        latents, unet, branches = _combine(a, registers), self.model.diffusion_model, w.shape[1]
        if concat is not None:
            latents = torch.cat([latents[:, None].expand(-1, branches, -1, -1, -1), concat], dim=2).flatten(0, 1)
        out = unet(
            latents,
            timestep,
            context.flatten(0, 1),
            self.hypernetworks,
            branches,
            shared=concat is None,
            vector=None if vector is None else vector.flatten(0, 1),
            guidance=None if guidance is None else guidance.index_select(0, row),
        )
        outputs = out.float().unflatten(0, (-1, branches))
        denoised = _combine(u, registers) + q[:, None, None, None] * _guided(w, rescale, outputs)
        k, b, c = (inpaint[:, i, None, None, None] for i in range(3))
        denoised = denoised + k * mask * (init - denoised)
        fresh = torch.stack([denoised, _combine(v, outputs), noise], dim=1)
        kept = registers.shape[1]
        updated = _mix(M[:, :, :kept], registers) + _mix(M[:, :, kept:], fresh)
        first = updated[:, 0]
        first = first + (1.0 - k) * mask * (b * init + c * init_noise - first)
        return torch.cat([first[:, None], updated[:, 1:]], dim=1), next, denoised

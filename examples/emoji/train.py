"""Fine-tunes the emoji model on a CPU: a LoRA, an embedding, a hypernetwork, a DreamBooth checkpoint, or the small
model itself from nothing.

Needs sdrt's build extra; the pictures come from two npm packages or a folder of your own (README.md beside this file).
Pictures are encoded once, so that a step is one pass of the UNet over latents of 8x8. A run that was stopped goes on
where it last saved, to the same weights.

Usage: python examples/emoji/train.py lora|embedding|hypernetwork|dreambooth|model [--help]
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
import torch
import torch.nn.functional as F
import trainable
from torch import Tensor
from trainable import Model, Trainable

from sdrt.errors import InputFileError, SdrtError, UsageError
from sdrt.export.adapters.hypernetwork import ACTIVATIONS
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.files.publish import staged_file, write_file

HERE = Path(__file__).parent
UNCAPTIONED = 0.1
"""Share of the pictures shown without their caption, which guidance needs."""
WARM_UP = 50
KL_WEIGHT = 1e-6
TIMESTEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
SIGNAL = torch.cumprod(1 - BETAS, 0).float()
"""Share of a picture's variance in its latents at each timestep: alpha bar of Ho et al. 2020, with Stable Diffusion's
betas.
"""


@dataclass(frozen=True)
class Lessons:
    """Latents `[P, 4, h, w]`, token ids of their captions `[P, 77]`, and ids of no caption `[77]`. The first `subjects`
    pictures are of the one subject and make half of every batch, or all of it where there are no others.
    """

    latents: Tensor
    tokens: Tensor
    empty: Tensor
    subjects: int


def lessons(
    model: Model, captioned: pictures.Captioned, subjects: int, trigger: str, extra: tuple[int, ...]
) -> Lessons:
    """Encode pictures, which are uint8 `[H, W, 3]`. Where a caption says `trigger`, and it has ids of its own, these
    take its place at the end.
    """
    latents, tokens = [], []
    sizes = model.architecture.vae
    factor = 2 ** (len(sizes.channels) - 1)
    with torch.no_grad():
        for caption, pixels in captioned:
            batch = torch.from_numpy(pixels)[None]
            latents.append(
                model.encoder(batch, torch.zeros(1, sizes.latent_channels, *(n // factor for n in pixels.shape[:2])))
            )
            own = extra if trigger and trigger in caption.split() else ()
            tokens.append(model.tokens(" ".join(word for word in caption.split() if not own or word != trigger), own))
    return Lessons(torch.cat(latents), torch.stack(tokens), model.tokens(""), subjects)


def denoising_loss(
    kind: Trainable, data: Lessons, contexts: tuple[Tensor, Tensor] | None, batch: int, random: torch.Generator
) -> Tensor:
    """The mean squared error of the predicted noise (Ho et al. 2020, equation 14) on a random batch. `contexts` are
    those of the captions and of none.
    """
    others = len(data.latents) - data.subjects
    own = batch if not others else (batch + 1) // 2 if data.subjects else 0
    picked = torch.cat(
        [
            torch.randint(0, max(data.subjects, 1), (own,), generator=random),
            data.subjects + torch.randint(0, max(others, 1), (batch - own,), generator=random),
        ]
    )
    silent = torch.rand(batch, generator=random) < UNCAPTIONED
    timestep = torch.randint(0, TIMESTEPS, (batch,), generator=random)
    latents = data.latents[picked]
    noise = torch.randn(latents.shape, generator=random)
    signal = SIGNAL[timestep][:, None, None, None]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    if contexts is not None:
        context = torch.where(silent[:, None, None], contexts[1], contexts[0][picked])
    else:
        context = kind.context(torch.where(silent[:, None], data.empty, data.tokens[picked]))
    return F.mse_loss(kind.predict(noisy, timestep.float(), context), noise)


def autoencoding_loss(model: Model, captioned: pictures.Captioned, batch: int, random: torch.Generator) -> Tensor:
    """What the autoencoder loses of a random batch: mean absolute error, and a weak pull of the latents towards unit
    noise (Kingma and Welling 2014).
    """
    picked = torch.randint(0, len(captioned), (batch,), generator=random).tolist()
    image = torch.stack([torch.from_numpy(captioned[i][1]) for i in picked]).permute(0, 3, 1, 2) / 127.5 - 1.0
    encoder, decoder = model.encoder.first_stage_model, model.decoder.first_stage_model
    mean, log_variance = encoder.quant_conv(encoder.encoder(image)).chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=random)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / batch
    return F.l1_loss(decoder.decoder(decoder.post_quant_conv(latents)), image) + KL_WEIGHT * divergence


def rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate: a linear start, then half a cosine down to a tenth of the peak."""
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def save_state(
    path: Path, step: int, settings: dict[str, Any], kind: Trainable, optimizer: torch.optim.Optimizer
) -> None:
    """Everything that the rest of a run depends on, atomically."""
    stream = io.BytesIO()
    parameters = {name: value.detach() for name, value in kind.parameters.items()}
    torch.save(
        {"step": step, "settings": json.dumps(settings), "parameters": parameters, "optimizer": optimizer.state_dict()},
        stream,
    )
    with staged_file(path) as stage:
        write_file(stage, stream.getbuffer())


def load_state(path: Path, settings: dict[str, Any], kind: Trainable, optimizer: torch.optim.Optimizer) -> int:
    """Take up a saved run; the step it goes on with.

    Raises:
        InputFileError: the file is no saved run.
        UsageError: it is one with other settings.
    """
    again = "Give the same settings, or start from nothing with --again."
    try:
        saved = torch.load(path, weights_only=True)
        known = json.loads(saved["settings"])
    except Exception as error:
        raise InputFileError(
            f"{path}: expected a saved run, found something else", "Delete it, or start from nothing with --again."
        ) from error
    if changed := [key for key in settings if known.get(key) != settings[key]]:
        raise UsageError(
            f"{path}: was trained with {changed[0]} {known.get(changed[0])!r}, expected {settings[changed[0]]!r}", again
        )
    with torch.no_grad():
        for name, value in kind.parameters.items():
            value.copy_(saved["parameters"][name])
    optimizer.load_state_dict(saved["optimizer"])
    step: int = saved["step"]
    return step


def train(options: argparse.Namespace) -> Path:
    """Train as the command line says. Returns the file written."""
    check_options(options)
    torch.set_num_threads(options.threads)
    random = torch.Generator().manual_seed(options.seed)
    captioned, subjects = shown(options)
    if options.kind == "model":
        checkpoint = open_checkpoint(options.checkpoint)
        checkpoint.close()
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            model = trainable.new_model(checkpoint.architecture, "new", "", checkpoint.model.metadata)
    else:
        model = trainable.load_model(options.checkpoint)
    kind = begin(options, model, random)
    data = None if options.kind == "model" else lessons(model, captioned, subjects, options.trigger, kind.extra_tokens)
    contexts = None
    if data is not None and not kind.trains_text:
        with torch.no_grad():
            contexts = kind.context(data.tokens), kind.context(data.empty[None])
    optimizer = torch.optim.AdamW(kind.parameters.values(), lr=options.rate, weight_decay=0.0)
    state = options.output.with_name(options.output.name + ".training")
    settings = {
        key: str(value)
        for key, value in vars(options).items()
        if key not in ("threads", "save_every", "again", "output", "node_modules")
    }
    first = load_state(state, settings, kind, optimizer) if state.exists() and not options.again else 0
    if first:
        print(f"{state}: going on at step {first}", file=sys.stderr)
    losses = list[float]()
    for step in range(first, options.steps):
        random.manual_seed(
            options.seed * 1_000_003 + step
        )  # each step's own, so that a run taken up again draws the same
        if options.kind == "model" and step < options.autoencoder_steps:
            loss = autoencoding_loss(model, captioned, options.batch, random)
        else:
            if data is None:  # from here on the autoencoder stays as it is
                data = lessons(model, captioned, 0, "", ())
            loss = denoising_loss(kind, data, contexts, options.batch, random)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, options.steps, options.rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(kind.parameters.values(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            trainable.check_finite(kind.parameters)
            save_state(state, step + 1, settings, kind, optimizer)
            print(
                f"step {step + 1} of {options.steps}, loss {sum(losses) / len(losses):.4f}, {time.process_time():.0f} s"
                " of CPU time",
                file=sys.stderr,
            )
            losses.clear()
    kind.save(options.output, options.steps)
    return Path(options.output)


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for a number that nothing can be trained with."""
    for name in ("steps", "rate", "batch", "threads", "save_every"):
        if not 0 < getattr(options, name) < math.inf:  # NaN compares as false
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: expected a number above 0",
                "Leave it out to take the default.",
            )


def begin(options: argparse.Namespace, model: Model, random: torch.Generator) -> Trainable:
    """What a kind trains, before its first step."""
    if options.kind == "lora":
        return trainable.lora(model, options.rank, options.alpha, random)
    if options.kind == "embedding":
        return trainable.embedding(model, options.vectors, options.initial, random)
    if options.kind == "hypernetwork":
        return trainable.hypernetwork(model, tuple(options.structure), options.activation, random)
    return trainable.whole(model, vae=options.kind == "model")


def shown(options: argparse.Namespace) -> tuple[pictures.Captioned, int]:
    """The pictures to learn from, those of the subject first, and how many these are."""
    known = [line for line in (HERE / "prompts.txt").read_text().splitlines() if line]
    if options.kind not in ("embedding", "dreambooth"):
        found = (
            pictures.from_folder(options.pictures, options.look)
            if options.pictures
            else pictures.from_packages(options.node_modules, known, options.look)
        )
        return found, 0
    own = (
        pictures.from_folder(options.pictures, "flat")
        if options.pictures
        else pictures.from_packages(options.node_modules, [options.subject], "flat")
    )
    subject = pictures.varied([(options.caption, pixels) for _, pixels in own])
    if options.kind == "embedding" or (options.pictures and not options.class_pictures):
        return subject, len(subject)
    others = (
        pictures.from_folder(options.class_pictures, "flat")
        if options.class_pictures
        else pictures.from_packages(options.node_modules, known, "flat")
    )
    return subject + others, len(subject)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)

    def add(kind: str, words: str, output: str, steps: int, rate: float, batch: int) -> argparse.ArgumentParser:
        one = kinds.add_parser(
            kind, help=words, description=words, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        one.add_argument(
            "--output",
            type=Path,
            default=Path(output),
            help="the file to write; OUTPUT.training beside it holds the run",
        )
        one.add_argument("--checkpoint", type=Path, default=HERE / "emoji.safetensors", help="the model to begin with")
        one.add_argument("--node-modules", type=Path, default=Path("demo/node_modules"), help="where npm put the emoji")
        one.add_argument(
            "--pictures", type=Path, help="a folder of pictures to learn from instead, named after what they show"
        )
        one.add_argument("--steps", type=int, default=steps, help="steps in all")
        one.add_argument("--rate", type=float, default=rate, help="the highest learning rate")
        one.add_argument("--batch", type=int, default=batch, help="pictures per step")
        one.add_argument("--seed", type=int, default=0)
        one.add_argument(
            "--threads", type=int, default=1, help="CPU threads; more than are free make it many times slower"
        )
        one.add_argument("--save-every", type=int, default=100, help="steps between two saves of the run")
        one.add_argument("--again", action="store_true", help="start from nothing, whatever was saved")
        one.set_defaults(trigger="")
        return one

    def look(one: argparse.ArgumentParser, default: str) -> None:
        one.add_argument(
            "--look", choices=sorted(pictures.LOOKS), default=default, help="what all pictures shall look like"
        )

    one = add("lora", "a LoRA that gives everything a look; kohya's .safetensors", "frost.safetensors", 1500, 2e-3, 8)
    look(one, "frozen")
    one.add_argument("--rank", type=int, default=4)
    one.add_argument("--alpha", type=float, default=4.0)
    one = add(
        "embedding",
        "an embedding of one new subject; .safetensors, or AUTOMATIC1111's .pt by the suffix",
        "violet.safetensors",
        400,
        1e-3,
        8,
    )
    one.add_argument("--vectors", type=int, default=2)
    one.add_argument("--initial", default="blue heart", help="words whose vectors to begin with")
    one.add_argument("--subject", default="purple heart", help="the emoji to learn")
    one.set_defaults(caption="subject", trigger="subject")
    one = add(
        "hypernetwork", "a hypernetwork that gives everything a look; AUTOMATIC1111's .pt", "gold.pt", 1500, 2e-3, 8
    )
    look(one, "golden")
    one.add_argument(
        "--structure",
        type=float,
        nargs="+",
        default=[1.0, 1.0, 1.0],
        help="widths of the layers, in widths of the input",
    )
    one.add_argument("--activation", choices=sorted(ACTIVATIONS), default="swish")
    one = add(
        "dreambooth",
        "a whole checkpoint that knows a new character; .safetensors in LDM's names",
        "ogre.safetensors",
        600,
        2e-4,
        8,
    )
    one.add_argument("--subject", default="ogre", help="the emoji to learn")
    one.add_argument("--caption", default="sks monster", help="what it is called: a rare token, and its class")
    one.add_argument("--class-pictures", type=Path, help="a folder of other pictures not to forget, with --pictures")
    one = add(
        "model",
        "the small model itself, from nothing: first the autoencoder, then the rest",
        "new.safetensors",
        60000,
        3e-4,
        32,
    )
    look(one, "flat")
    one.add_argument("--autoencoder-steps", type=int, default=20000, help="of all steps, those for the autoencoder")
    return parser


def main() -> None:
    try:
        print(train(arguments().parse_args()))
    except SdrtError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

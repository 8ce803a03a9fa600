"""What the peers run in and on: a virtual environment each, made from its pinned requirements, and the same weights in
each one's own format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"
CHECKPOINT = ROOT / "examples" / "emoji" / "emoji.safetensors"


class PeerFailed(Exception):
    """A peer cannot be installed, prepared or run; the text is the line of the report that says why."""


@dataclass(frozen=True)
class Installed:
    """`size_bytes` is what pip put into an empty environment, without byte code."""

    requirements_sha256: str
    size_bytes: int
    seconds: float


def python_of(environments: Path, name: str) -> Path:
    return environments / name / "bin" / "python"


def installed(environments: Path, name: str) -> Installed:
    """Make the environment of `requirements-<name>.txt`, or find it made from the same file.

    Raises:
        PeerFailed: pip could not install it.
    """
    requirements = PEERS / f"requirements-{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    folder, record = environments / name, environments / f"{name}.json"
    if record.exists() and (found := Installed(**json.loads(record.read_text()))).requirements_sha256 == digest:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {name}", file=sys.stderr, flush=True)
    started = time.monotonic()
    command([sys.executable, "-m", "venv", "--without-pip", folder], environments / f"{name}.log")
    pip: list[object] = [sys.executable, "-m", "pip", "--python", python_of(environments, name)]
    command([*pip, "install", "-r", requirements], environments / f"{name}.log")
    for package in re.findall(r"^# without: (\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE):
        command([*pip, "uninstall", "-y", package], environments / f"{name}-without.log")
    size = sum(
        path.stat().st_size
        for path in (folder / "lib").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.is_symlink()
    )
    if name.startswith("sdrt"):  # runs from this tree
        size += sum(
            path.stat().st_size for path in (ROOT / "sdrt").rglob("*") if path.is_file() and path.suffix != ".pyc"
        )
    made = Installed(digest, size, round(time.monotonic() - started, 1))
    record.write_text(json.dumps(asdict(made)))
    return made


def command(
    words: Sequence[object], log: Path, *, environment: dict[str, str] | None = None, seconds: float = 3600
) -> None:
    """Run a command, its output to `log`.

    Raises:
        PeerFailed: it ended with another exit code than 0, or took longer than `seconds`.
    """
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(
                [str(word) for word in words], stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"not done after {seconds:g} s") from None
    if done.returncode:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "said nothing")
        raise PeerFailed(f"exit code {done.returncode}: {said[:300]}")


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made unless it is there: under another name first, so that what was interrupted is not
    taken for done.
    """
    if not target.exists():
        print(f"making {target.name}", file=sys.stderr, flush=True)
        stage = target.with_name(f"making-{target.name}")
        if stage.is_dir():
            shutil.rmtree(stage)
        make(stage)
        stage.rename(target)
    return target


class Models:
    """The same weights for every peer, each form made when it is first asked for. `size` is emoji, sd15 or sdxl."""

    def __init__(self, folder: Path, environments: Path, size: str, picture: tuple[int, int]) -> None:
        self._folder, self._environments, self._size, self._picture = folder, environments, size, picture
        self._failures: dict[str, str] = {}  # by form: several rows ask for the same, and none shall wait for it twice

    def path(self, form: str) -> Path:
        """checkpoint | diffusers | openvino-genai | onnx | bundle | bundle-saved | bundle-fp32 | bundle-bf16

        Raises:
            PeerFailed: it cannot be made.
        """
        if form in self._failures:
            raise PeerFailed(self._failures[form])
        try:
            return self._made(form)
        except PeerFailed as error:
            self._failures[form] = str(error)
            raise

    def _made(self, form: str) -> Path:
        return once(
            self._folder / f"{form}.safetensors" if form == "checkpoint" else self._folder / form,
            getattr(self, "_" + form.replace("-", "_")),
        )

    def _checkpoint(self, target: Path) -> None:
        if self._size == "emoji":
            shutil.copyfile(CHECKPOINT, target)
        else:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from make_checkpoint import ARCHITECTURES, write_checkpoint

            write_checkpoint(target, architecture=ARCHITECTURES[self._size])

    def _bundle(self, target: Path) -> None:
        words = [
            "build",
            "--checkpoint",
            self.path("checkpoint"),
            "--target",
            "onnxruntime",
            "--output",
            target,
            "--size",
            "{}x{}".format(*self._picture),
        ]
        self._sdrt(words, target.name)

    def _bundle_saved(self, target: Path) -> None:
        self._compiled(target, "onnxruntime")

    def _bundle_fp32(self, target: Path) -> None:
        self._compiled(target, "openvino", "--precision", "fp32")

    def _bundle_bf16(self, target: Path) -> None:
        self._compiled(target, "openvino", "--precision", "bf16")

    def _compiled(self, target: Path, *options: str) -> None:
        shutil.copytree(self.path("bundle"), target, copy_function=os.link)
        self._sdrt(["compile", target, "--target", *options], target.name)

    def _sdrt(self, words: Sequence[object], name: str) -> None:
        command(
            [sys.executable, "-m", "sdrt", *words],
            self._folder / f"{name}.log",
            environment=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def _diffusers(self, target: Path) -> None:
        """diffusers' folder in float16, as the bundle stores the weights and as models are published."""
        if self._size == "sdxl":
            self._diffusers_xl(target)
            return
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import reference
        import torch
        from diffusers import EulerDiscreteScheduler
        from safetensors.torch import load_file, save_file

        bundle, vocabulary = self.path("bundle"), self._folder / "vocabulary"
        vocabulary.mkdir(exist_ok=True)
        pipeline = reference.diffusers_pipeline(bundle, reference.clip_tokenizer(vocabulary))
        pipeline.scheduler = EulerDiscreteScheduler(**reference.TRAINING, timestep_spacing="linspace")
        pipeline.to(torch.float16).save_pretrained(target)
        for file in vocabulary.iterdir():  # published folders have these two; transformers 5 leaves them out
            shutil.copy(file, target / "tokenizer")
        weights = target / "text_encoder" / "model.safetensors"
        tensors = load_file(
            weights
        )  # transformers 5 drops this prefix when it saves; version 4 silently starts from random weights without it
        save_file(
            {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()},
            weights,
            {"format": "pt"},
        )

    def _diffusers_xl(self, target: Path) -> None:
        """The same for SDXL, from the checkpoint's own tensors: in float32 they would take 14 GB twice."""
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import reference
        import torch
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from diffusers.loaders import single_file_utils as convert
        from safetensors.torch import load_file
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        vocabulary = self._folder / "vocabulary"
        vocabulary.mkdir(exist_ok=True)
        tokenizer = reference.clip_tokenizer(vocabulary)
        tensors = load_file(self.path("checkpoint"))
        narrow = {"vocab_size": 49408, "eos_token_id": 49407, "pad_token_id": 49407, "projection_dim": 768}
        wide = {"vocab_size": 49408, "eos_token_id": 49407, "pad_token_id": 0, "projection_dim": 1280}
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                sample_size=1024,
                scaling_factor=0.13025,
            )
            text = CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, **narrow)
            )
            text_2 = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    hidden_act="gelu",
                    **wide,
                )
            )
        own = {name for name, _ in text.named_parameters()}
        prefix = "conditioner.embedders.0.transformer."
        prefix += "" if any(name.startswith("text_model.") for name in own) else "text_model."
        first = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        states = (
            (unet, convert.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))),
            (vae, convert.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))),
            (text, {name: tensor for name, tensor in first.items() if name in own}),
            (text_2, convert.convert_open_clip_checkpoint(text_2, dict(tensors), "conditioner.embedders.1.model.")),
        )
        for model, state in states:
            missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
            if odd := [name for name in (*missing, *unexpected) if not name.endswith("position_ids")]:
                raise PeerFailed(f"{type(model).__name__}: {odd[0]}: missing or unknown")
            for module in model.modules():  # position ids are no weights: they are still without values
                if (ids := getattr(module, "position_ids", None)) is not None:
                    module.position_ids = torch.arange(ids.shape[-1])[None]
        scheduler = EulerDiscreteScheduler(**reference.TRAINING, timestep_spacing="linspace")
        StableDiffusionXLPipeline(vae, text, text_2, tokenizer, tokenizer, unet, scheduler).save_pretrained(target)
        for file in vocabulary.iterdir():
            for folder in ("tokenizer", "tokenizer_2"):
                shutil.copy(file, target / folder)

    def _openvino_genai(self, target: Path) -> None:
        self._exported(
            target, "openvino-export", ["export", "openvino", "--weight-format", "fp16", "--task", "text-to-image"]
        )

    def _onnx(self, target: Path) -> None:
        self._exported(target, "optimum-onnx", ["export", "onnx", "--task", "text-to-image"])

    def _exported(self, target: Path, environment: str, words: Sequence[object]) -> None:
        source = self.path("diffusers")
        installed(self._environments, environment)
        tool = python_of(self._environments, environment).with_name("optimum-cli")
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        path = f"{tool.parent}{os.pathsep}{offline.get('PATH', '')}"
        command(
            [tool, *words, "--model", source, target],
            self._folder / f"{target.name}.log",
            environment=offline | {"PATH": path},
        )

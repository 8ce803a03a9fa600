"""peft's settings beside a file and diffusers' in its header: where alpha comes from, and settings that cannot be
followed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import LINEAR, QUERY, SQUARE, change_of, opened
from safetensors.torch import save_file

from sdrt.errors import AdapterError

UP, DOWN = (
    torch.randn(96, 4, generator=torch.Generator().manual_seed(0)),
    torch.randn(4, 64, generator=torch.Generator().manual_seed(1)),
)
GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def adapter(
    folder: Path,
    settings: dict[str, Any] | str | None,
    *,
    prefix: str = "base_model.model.",
    metadata: dict[str, str] | None = None,
) -> Path:
    """A pair of one module in peft's names, its settings beside it."""
    tensors = {f"{prefix}{LINEAR[2]}.lora_B.weight": UP, f"{prefix}{LINEAR[2]}.lora_A.weight": DOWN}
    save_file(tensors, folder / "adapter_model.safetensors", metadata)
    if settings is not None:
        (folder / "adapter_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return folder / "adapter_model.safetensors"


def factor(path: Path) -> float:
    opened_adapter = opened(path)
    with opened_adapter.file:
        ratio = change_of(opened_adapter, f"{LINEAR[0]}.weight", torch.zeros(96, 64)) / (UP @ DOWN)
    assert torch.allclose(ratio, ratio.mean(), rtol=1e-4)
    return float(ratio.mean())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (GOOD, 2.0),
        (GOOD | {"use_rslora": True}, 4.0),
        (GOOD | {"lora_alpha": -2}, -0.5),
        (GOOD | {"lora_alpha": 0}, 0.0),
        (GOOD | {"alpha_pattern": {"to_k": 2}}, 0.5),
        (GOOD | {"alpha_pattern": {"attn2.to_k": 2, "to_k": 1}}, 0.5),
        (GOOD | {"alpha_pattern": {f"^{LINEAR[2]}": 2}}, 0.5),
        (GOOD | {"alpha_pattern": {"^attn2.to_k": 2}}, 2.0),
        (GOOD | {"alpha_pattern": {"o_k": 2}}, 2.0),
        (GOOD | {"r": 16, "rank_pattern": {"to_k": 4}}, 2.0),
    ],
    ids=[
        "plain",
        "rank-stabilised",
        "negative",
        "zero",
        "pattern",
        "first pattern",
        "whole name",
        "not the whole name",
        "no part of a name",
        "rank",
    ],
)
def test_alpha_from_the_settings(tmp_path: Path, settings: dict[str, Any], expected: float) -> None:
    """Patterns match as peft's do: tests of `test_lora.py` compare with files that peft saves."""
    assert factor(adapter(tmp_path, settings)) == pytest.approx(expected, abs=1e-6, rel=1e-4)


def test_without_settings_alpha_is_the_rank_and_the_build_says_so(tmp_path: Path) -> None:
    path = adapter(tmp_path, None)
    assert factor(path) == pytest.approx(1, rel=1e-4)
    found = opened(path)
    with found.file:
        assert len(found.notes) == 1 and "adapter_config.json is not beside it" in found.notes[0]


def test_settings_beside_a_file_that_is_not_pefts_are_not_read(tmp_path: Path) -> None:
    """A folder of downloads may hold another adapter's settings."""
    assert factor(adapter(tmp_path, "not JSON", prefix="unet.")) == pytest.approx(1, rel=1e-4)


def test_settings_in_the_header(tmp_path: Path) -> None:
    """As diffusers keeps them, below each component's name."""
    tensors = {f"unet.{LINEAR[2]}.lora_B.weight": UP, f"unet.{LINEAR[2]}.lora_A.weight": DOWN}
    text = torch.randn(64, 2, generator=torch.Generator().manual_seed(3))
    tensors |= {
        f"text_encoder.{QUERY[2]}.lora_B.weight": text,
        f"text_encoder.{QUERY[2]}.lora_A.weight": text.T.contiguous(),
    }
    settings = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.use_rslora": True,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 1,
        "unet.peft_type": "LORA",
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    assert factor(tmp_path / "a.safetensors") == pytest.approx(4, rel=1e-4)
    found = opened(tmp_path / "a.safetensors")
    with found.file:
        torch.testing.assert_close(change_of(found, f"{QUERY[0]}.weight", torch.zeros(64, 64)), text @ text.T / 2)
        assert found.config_sha256 is None and found.notes == ()


def test_alpha_of_the_file_goes_before_the_header(tmp_path: Path) -> None:
    tensors = {
        f"unet.{LINEAR[2]}.lora_B.weight": UP,
        f"unet.{LINEAR[2]}.lora_A.weight": DOWN,
        f"unet.{LINEAR[2]}.alpha": torch.tensor(1.0),
    }
    save_file(
        tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    )
    assert factor(tmp_path / "a.safetensors") == pytest.approx(0.25, rel=1e-4)


BAD: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "a list": ("[]", "expected an object, found list"),
    "not UTF-8": ("\udcff", "not valid JSON"),
    "no alpha": ({"r": 4}, "alpha: expected a finite number, found None"),
    "no r": ({"lora_alpha": 4}, "r: expected a whole number above 0, found None"),
    "alpha text": (GOOD | {"lora_alpha": "8"}, "alpha: expected a finite number, found '8'"),
    "alpha NaN": (GOOD | {"lora_alpha": math.nan}, "alpha: expected a finite number, found nan"),
    "alpha true": (GOOD | {"lora_alpha": True}, "alpha: expected a finite number, found True"),
    "r zero": (GOOD | {"r": 0}, "r: expected a whole number above 0, found 0"),
    "r of another": (GOOD | {"r": 8}, "r: 8, but"),
    "patterns a list": (GOOD | {"alpha_pattern": ["to_k"]}, "alpha_pattern: expected an object"),
    "pattern a regular expression": (
        GOOD | {"alpha_pattern": {r"attn\d.*": 2}},
        "expected a module's name, found a regular expression",
    ),
    "another kind": (GOOD | {"peft_type": "HRA"}, "peft_type 'HRA': not supported"),
    "PiSSA": (GOOD | {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    "OLoRA": (GOOD | {"init_lora_weights": "olora"}, "trained on weights that this start changed"),
    "QALoRA": (GOOD | {"use_qalora": True}, "use_qalora: not supported"),
    "DoRA without magnitudes": (GOOD | {"use_dora": True}, "lora_magnitude_vector is missing"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD.keys())
def test_settings_that_cannot_be_followed(tmp_path: Path, settings: dict[str, Any] | str, message: str) -> None:
    path = adapter(tmp_path, None)
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError) as caught:
        opened(path)
    assert (
        caught.value.exit_code == 3
        and message in caught.value.message
        and "adapter_config.json" in caught.value.message
    )


def test_header_that_cannot_be_followed(tmp_path: Path) -> None:
    for text, message in (("{", "not valid JSON"), (json.dumps({"unet.peft_type": "IA3"}), "peft_type 'IA3'")):
        path = adapter(tmp_path, None, prefix="unet.", metadata={"lora_adapter_metadata": text})
        with pytest.raises(AdapterError, match=message) as caught:
            opened(path)
        assert caught.value.message.startswith(f"{path}: lora_adapter_metadata")


def test_settings_that_are_no_plain_file(tmp_path: Path) -> None:
    path, config = adapter(tmp_path, None), tmp_path / "adapter_config.json"
    os.mkfifo(config)
    with pytest.raises(AdapterError, match="expected a file, found a device, pipe or socket"):
        opened(path)
    config.unlink()
    config.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(AdapterError, match="1,048,577 bytes, more than the limit of 1,048,576 bytes"):
        opened(path)
    config.unlink()
    config.mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        opened(path)


def test_square_and_text_modules_take_their_own_pattern(tmp_path: Path) -> None:
    """One file, three modules, three alphas."""
    tensors, expected = {}, {}
    random = torch.Generator().manual_seed(4)
    for module, shape, alpha in ((LINEAR, (96, 64), 1.0), (SQUARE, (96, 96), 2.0), (QUERY, (64, 64), 8.0)):
        up, down = torch.randn(shape[0], 4, generator=random), torch.randn(4, shape[1], generator=random)
        tensors |= {
            f"base_model.model.{module[2]}.lora_B.weight": up,
            f"base_model.model.{module[2]}.lora_A.weight": down,
        }
        expected[f"{module[0]}.weight"] = up @ down * alpha / 4
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD | {"alpha_pattern": {"to_k": 1, "attn1.to_q": 2}}))
    found = opened(tmp_path / "adapter_model.safetensors")
    with found.file:
        for weight, change in expected.items():
            torch.testing.assert_close(change_of(found, weight, torch.zeros(change.shape)), change)

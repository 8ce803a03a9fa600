"""The settings that peft and diffusers keep beside the matrices: alpha, and how it scales. Imports no torch.

peft writes `adapter_config.json` beside its file. diffusers writes the same settings into the safetensors header, below
the component's name (`lora_adapter_metadata`: `{"unet.lora_alpha": 8, ...}`). Source: peft tuners/lora/config.py and
layer.py, utils/other.py `get_pattern_key`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import AdapterError, printable
from sdrt.export.families.table import COMPONENTS
from sdrt.files.read import Document, read_document

FILE_NAME = "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"
MAX_CONFIG_BYTES = 1 << 20

_FUSED_TYPES = ("LORA", "LOHA", "LOKR")
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_COMPONENTS = tuple(f"{component.name}." for component in COMPONENTS)


@dataclass(frozen=True)
class PeftConfig:
    """Settings by the prefix of the modules they are for ("" for all). `document` is the file they come from; settings
    in a header have none.
    """

    source: str
    settings: Mapping[str, Mapping[str, Any]]
    document: Document | None

    def _for(self, module: str) -> tuple[Mapping[str, Any], str]:
        prefix = next((p for p in self.settings if p and module.startswith(p)), "")
        return self.settings.get(prefix, {}), module.removeprefix(prefix)

    def use_dora(self, module: str) -> bool:
        return self._for(module)[0].get("use_dora") is True

    def factor(self, module: str, rank: int | None) -> float | None:
        """What multiplies the change of a module: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. `module` is
        the name below `base_model.model.`.

        `rank` is that of the matrices. It is None where they have none (a LoKr of two whole matrices, which peft scales
        all the same). Returns None if the settings do not say.

        Raises:
            AdapterError: alpha or r is no such number, a pattern is not a plain name, or r contradicts the matrices.
        """
        settings, name = self._for(module)
        if not settings:
            return None
        alpha = self._matched(settings, "alpha_pattern", name)
        if alpha is None:
            alpha = settings.get("lora_alpha", settings.get("alpha"))
        stated = self._matched(settings, "rank_pattern", name)
        if stated is None:
            stated = settings.get("r")
        for key, value in (("alpha", alpha), ("r", stated)):
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or (key == "r" and (value < 1 or value != int(value)))
            ):
                raise AdapterError(
                    f"{self.source}: {key}: expected a {'whole number above 0' if key == 'r' else 'finite number'},"
                    f" found {value!r:.80}"
                )
        if rank is not None and stated != rank:
            raise AdapterError(
                f"{self.source}: r: {stated}, but {printable(module)} has rank {rank}",
                "Its settings belong to another adapter; get the two files together.",
            )
        return float(alpha) / (math.sqrt(stated) if settings.get("use_rslora") is True else stated)

    def _matched(self, settings: Mapping[str, Any], pattern: str, module: str) -> Any:
        """The value of the first entry that names the module. As in peft, an entry names the end of the module's path,
        or with `^` the whole path.
        """
        entries = settings.get(pattern) or {}
        if not isinstance(entries, dict):
            raise AdapterError(f"{self.source}: {pattern}: expected an object, found {entries!r:.80}")
        for key, value in entries.items():
            plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", plain):
                raise AdapterError(
                    f"{self.source}: {pattern}: {printable(key)}: expected a module's name, found a regular expression",
                    "Write full names there.",
                )
            if module == plain or (not key.startswith("^") and module.endswith("." + plain)):
                return value
        return None


def config_beside(path: Path) -> PeftConfig | None:
    """The `adapter_config.json` in the adapter's folder, if there is one.

    Raises:
        AdapterError: the file cannot be read, or names a kind that is not fused.
    """
    try:
        document = read_document(path.with_name(FILE_NAME), MAX_CONFIG_BYTES, kind=AdapterError)
    except FileNotFoundError:
        return None
    settings = _parse(str(document.path), document.data)
    _check_kind(str(document.path), settings)
    return PeftConfig(str(document.path), {"": settings}, document)


def config_in_header(path: Path, metadata: Mapping[str, str]) -> PeftConfig | None:
    """The settings that diffusers keeps in the header, if there are any.

    Raises:
        AdapterError: they cannot be read, or name a kind that is not fused.
    """
    if HEADER_KEY not in metadata:
        return None
    source = f"{path}: {HEADER_KEY}"
    flat = _parse(source, metadata[HEADER_KEY].encode())
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        prefix = next((p for p in _COMPONENTS if key.startswith(p)), "")
        settings.setdefault(prefix, {})[key.removeprefix(prefix)] = value
    for part in settings.values():
        _check_kind(source, part)
    return PeftConfig(source, settings, None)


def _parse(source: str, data: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source}: not valid JSON: {printable(str(error))}", "Get the file again.") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{source}: expected an object, found {type(settings).__name__}", "Get the file again.")
    return settings


def _check_kind(source: str, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type", "LORA")
    if kind not in _FUSED_TYPES:
        raise AdapterError(
            f"{source}: peft_type {kind!r:.80}: not supported", f"sdrt fuses {', '.join(_FUSED_TYPES)} of peft."
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise AdapterError(
            f"{source}: init_lora_weights {start!r:.80}: the adapter was trained on weights that this start changed,"
            " and fits no others",
            "Save it from peft with path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
        )
    for option in ("use_qalora", "layer_replication"):
        if settings.get(option):
            raise AdapterError(f"{source}: {option}: not supported", "Save the adapter without it.")

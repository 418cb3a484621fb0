"""Checkpoints: a folder, a packaged model or a hub id -> configuration and loaded networks.

Owns the way from a name to networks in memory, and what is fetched from the hub. It and its
`checkpoint_*` neighbours are all that knows checkpoints: `layouts` (folders), `keys` (names of
tensors), `config` (numbers), `files` (reading), `writer`. Knows nothing about sampling or ranks.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from wan_model.checkpoint_files import load_parameters
from wan_model.checkpoint_keys import (
    CheckpointError,
    Layout,
    Slot,
    text_encoder_slots,
    transformer_slots,
    vae_slots,
)
from wan_model.checkpoint_layouts import CheckpointLayout, DiffusersLayout, OfficialLayout, Origin
from wan_model.config import Expert, WanConfig
from wan_model.lora import LoRA, load_lora
from wan_model.transformer import WanTransformer, is_float32_island
from wan_model.vae import WanVAE

if TYPE_CHECKING:
    from wan_model.text_encoder import TextEncoder

PACKAGED = ("wan-tiny", "wan-tiny-i2v", "wan-tiny-ti2v")


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """`source`: a local folder, the name of a packaged model, or a hub id "owner/name".

    Reads the configuration only: JSON files, and of a local official folder the shapes in its .pth
    files. From the hub each component is fetched when it is first loaded, all of the commit that
    `revision` means now; HF_HUB_OFFLINE confines it to the cache. Raises CheckpointError.
    """
    origin = _locate(str(source), revision)
    root = origin.fetch(["model_index.json", "config.json", "*/config.json"])
    if (root / "model_index.json").is_file():
        files: CheckpointLayout = DiffusersLayout(origin)
    elif (root / "high_noise_model" / "config.json").is_file() or (root / "config.json").is_file():
        files = OfficialLayout(origin)
    else:
        raise CheckpointError(
            f"{root} is not a Wan checkpoint: it has no model_index.json, config.json or "
            "high_noise_model/config.json"
        )
    return Checkpoint(source=str(source), config=files.read_config(), files=files)


def read_config(checkpoint: str, *, revision: str | None = None) -> WanConfig:
    """What a checkpoint is, without opening it for loading. Raises CheckpointError."""
    return open_checkpoint(checkpoint, revision=revision).config


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. Loaded networks are in eval mode and need no gradients.

    Every `load_*` raises CheckpointError naming the file that is missing, broken or does not fit.
    """

    source: str
    config: WanConfig
    files: CheckpointLayout

    @property
    def layout(self) -> Layout:
        return self.files.name

    def load_transformer(
        self,
        expert: Expert,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        loras: Sequence[LoRA] = (),
    ) -> WanTransformer:
        """One expert in `dtype`, its float32 islands kept, `loras` merged in."""
        if expert not in self.config.experts:
            raise CheckpointError(f"{self.source} ({self.config.name}) has no expert {expert}")
        model, slots, shapes = self._empty_transformer()
        for lora in loras:
            lora.check_fits(shapes)

        def delta(slot: Slot, on: torch.device) -> Tensor | None:
            parts = [lora.delta(slot, shapes[slot], on) for lora in loras if slot in lora.slots]
            return sum(parts) if parts else None

        load_parameters(
            model,
            slots,
            self.files.transformer(expert),
            device=device,
            dtype=dtype,
            keeps_float32=is_float32_island,
            delta=delta,
        )
        return model.eval()

    def check_loras(self, files: Sequence[tuple[str | Path, float]]) -> None:
        """Raises CheckpointError for (path, strength) of which an expert could not be loaded."""
        _, _, shapes = self._empty_transformer()
        for path, strength in files:
            load_lora(path, strength).check_fits(shapes)

    def _empty_transformer(
        self,
    ) -> tuple[WanTransformer, dict[str, Slot], dict[Slot, tuple[int, ...]]]:
        """An expert without weights, key in the files -> slot, and the slots' shapes."""
        with torch.device("meta"):
            model = WanTransformer(self.config.transformer)
        slots = transformer_slots(model.state_dict(), self.layout)
        parameters = dict(model.named_parameters())
        return model, slots, {slot: slot.shape(parameters[slot.name]) for slot in slots.values()}

    def load_vae(self, *, device: torch.device | str, dtype: torch.dtype) -> WanVAE:
        shards = self.files.vae()
        config = self.files.vae_config()
        with torch.device("meta"):
            model = WanVAE(config)
        slots = vae_slots(model.state_dict(), self.layout, config)
        load_parameters(model, slots, shards, device=device, dtype=dtype)
        return model.eval()

    def load_text_encoder(self, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        # transformers takes seconds to import and expert workers have no use for it.
        from wan_model.text_encoder import TextEncoder, build_umt5, load_tokenizer

        shards = self.files.text_encoder()
        with torch.device("meta"):
            model = build_umt5(self.files.text_encoder_config())
        slots = text_encoder_slots(model.state_dict(), self.layout)
        folder = self.files.tokenizer()
        try:
            tokenizer = load_tokenizer(folder)
            load_parameters(model, slots, shards, device=device, dtype=dtype)
            return TextEncoder(model, tokenizer, max_tokens=self.config.transformer.text_len)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error


# ------------------------------------------------------------------------------------ origins


class _LocalOrigin:
    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def fetch(self, patterns: list[str]) -> Path:
        return self.root


class _HubOrigin:
    """Files of one commit of a hub repository, fetched by pattern into the library's cache."""

    root: Path
    is_local = False

    def __init__(self, repo_id: str, revision: str | None) -> None:
        self._repo_id = repo_id
        self._revision = revision

    def fetch(self, patterns: list[str]) -> Path:
        try:
            folder = huggingface_hub.snapshot_download(
                self._repo_id, revision=self._revision, allow_patterns=patterns
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"cannot fetch {self._repo_id} from the hub: {reason}") from error
        self.root = Path(folder)
        self._revision = self.root.name  # the commit: later components must be of the same one
        return self.root


def _locate(source: str, revision: str | None) -> Origin:
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a folder: a revision is for hub ids only")
        return _LocalOrigin(path)
    if source in PACKAGED:
        folder = importlib.resources.files("wan_model.tiny") / "weights" / source
        if not folder.is_dir():
            raise CheckpointError(f"{folder}, the packaged model {source}, is missing")
        return _LocalOrigin(Path(str(folder)))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not path.exists():
        return _HubOrigin(source, revision)
    raise CheckpointError(
        f"{source} is not a folder, a packaged model ({', '.join(PACKAGED)}) or a hub id owner/name"
    )

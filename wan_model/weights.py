"""Checkpoints: a folder, a packaged model or a hub id -> configuration and loaded networks.

Owns where each component lies in the official and in the Diffusers layout, and what is fetched
from the hub. With `checkpoint_keys`, `checkpoint_config`, `checkpoint_files` (reading) and
`checkpoint_writer` it is all that knows checkpoints. Knows nothing about sampling or ranks.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from wan_model import checkpoint_config
from wan_model.checkpoint_files import find_shards, load_parameters, open_tensors, read_json
from wan_model.checkpoint_keys import (
    CheckpointError,
    Layout,
    text_encoder_slots,
    transformer_slots,
    vae_slots,
)
from wan_model.config import Expert, TextEncoderConfig, VAEConfig, WanConfig
from wan_model.lora import LoRA
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
        files: _Files = DiffusersFiles(origin)
    elif (root / "high_noise_model" / "config.json").is_file() or (root / "config.json").is_file():
        files = OfficialFiles(origin)
    else:
        raise CheckpointError(
            f"{root} is not a Wan checkpoint: it has no model_index.json, config.json or "
            "high_noise_model/config.json"
        )
    return Checkpoint(source=str(source), config=files.read_config(), files=files)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. Loaded networks are in eval mode and need no gradients.

    Every `load_*` raises CheckpointError naming the file that is missing, broken or does not fit.
    """

    source: str
    config: WanConfig
    files: _Files

    @property
    def layout(self) -> Layout:
        return self.files.layout

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
        with torch.device("meta"):
            model = WanTransformer(self.config.transformer)
        slots = transformer_slots(model.state_dict(), self.layout)
        parameters = dict(model.named_parameters())
        shapes = {slot: slot.shape(parameters[slot.name]) for slot in slots.values()}
        for lora in loras:
            lora.check_fits(shapes)

        def delta(slot, on):
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
            return TextEncoder(model, tokenizer)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error


# ------------------------------------------------------------------------------------ layouts


class _Files(Protocol):
    """Where the components of a layout lie. Methods fetch what they name before they return it."""

    layout: Layout

    def read_config(self) -> WanConfig: ...
    def transformer(self, expert: Expert) -> list[Path]: ...
    def vae(self) -> list[Path]: ...
    def vae_config(self) -> VAEConfig: ...
    def text_encoder(self) -> list[Path]: ...
    def text_encoder_config(self) -> TextEncoderConfig: ...
    def tokenizer(self) -> Path: ...


class DiffusersFiles:
    """model_index.json, and a folder per component; `transformer` is the high-noise expert.

    A component that `_shared` in model_index.json points to lies in that other folder instead.
    """

    layout: Layout = "diffusers"

    def __init__(self, origin: _Origin) -> None:
        self._origin = origin
        self._root = origin.root
        self._index = read_json(self._root / "model_index.json")

    def read_config(self) -> WanConfig:
        transformer_path = self._component("transformer") / "config.json"
        transformer = read_json(transformer_path)
        with _naming(transformer_path):
            transformer_config = checkpoint_config.transformer_from_diffusers(transformer)
        with _naming(self._root / "model_index.json"):
            task, num_experts = checkpoint_config.diffusers_task(self._index, transformer)
            row = checkpoint_config.choose_row(
                task=task,
                num_experts=num_experts,
                dim=transformer_config.dim,
                named=self._index.get(checkpoint_config.ROW_KEY),
            )
        vae, text_encoder = self.vae_config(), self.text_encoder_config()
        with _naming(self._root):
            return checkpoint_config.with_parts(
                row, transformer=transformer_config, vae=vae, text_encoder=text_encoder
            )

    def transformer(self, expert: Expert) -> list[Path]:
        name = "transformer" if expert is Expert.HIGH_NOISE else "transformer_2"
        return self._shards(name, "diffusion_pytorch_model")

    def vae(self) -> list[Path]:
        return self._shards("vae", "diffusion_pytorch_model")

    def vae_config(self) -> VAEConfig:
        return self._config("vae", checkpoint_config.vae_from_diffusers)

    def text_encoder(self) -> list[Path]:
        return self._shards("text_encoder", "model")

    def text_encoder_config(self) -> TextEncoderConfig:
        return self._config("text_encoder", checkpoint_config.text_encoder_from_diffusers)

    def tokenizer(self) -> Path:
        self._origin.fetch(["tokenizer/*"])
        return self._component("tokenizer")

    def _component(self, name: str) -> Path:
        shared = self._index.get(checkpoint_config.SHARED_KEY, {})
        return (self._root / shared[name] / name).resolve() if name in shared else self._root / name

    def _shards(self, name: str, stem: str) -> list[Path]:
        self._origin.fetch([f"{name}/*.json", f"{name}/*.safetensors"])
        return find_shards(self._component(name), stem)

    def _config(self, name: str, parse: Callable[[dict], Any]) -> Any:
        path = self._component(name) / "config.json"
        content = read_json(path)
        with _naming(path):
            return parse(content)


class OfficialFiles:
    """A folder per expert (or the root, for one expert), .pth files, and google/umt5-xxl."""

    layout: Layout = "official"
    _VAE = "Wan2.*_VAE.pth"
    _TEXT_ENCODER = "models_t5_*.pth"

    def __init__(self, origin: _Origin) -> None:
        self._origin = origin
        self._root = origin.root
        self._num_experts = 2 if (self._root / "high_noise_model").is_dir() else 1

    def read_config(self) -> WanConfig:
        path = self._expert_folder(Expert.HIGH_NOISE) / "config.json"
        content = read_json(path)
        with _naming(path):
            task = checkpoint_config.official_task(content)
            transformer = checkpoint_config.transformer_from_official(content)
            row = checkpoint_config.choose_row(
                task=task,
                num_experts=self._num_experts,
                dim=transformer.dim,
                named=content.get(checkpoint_config.ROW_KEY),
            )
        # On the hub only the released models have this layout: their numbers are the row's, and
        # the text encoder's 11 GB need not be fetched to know them.
        is_local = isinstance(self._origin, _LocalOrigin)
        vae = self.vae_config() if is_local else row.vae
        text_encoder = self.text_encoder_config() if is_local else row.text_encoder
        with _naming(self._root):
            return checkpoint_config.with_parts(
                row, transformer=transformer, vae=vae, text_encoder=text_encoder
            )

    def transformer(self, expert: Expert) -> list[Path]:
        folder = self._expert_folder(expert)
        prefix = "" if folder == self._root else f"{folder.name}/"
        self._origin.fetch([f"{prefix}config.json", f"{prefix}diffusion_pytorch_model*"])
        return find_shards(folder, "diffusion_pytorch_model")

    def vae(self) -> list[Path]:
        return [self._pth(self._VAE)]

    def vae_config(self) -> VAEConfig:
        return self._from_shapes(self._VAE, checkpoint_config.vae_from_shapes)

    def text_encoder(self) -> list[Path]:
        return [self._pth(self._TEXT_ENCODER)]

    def text_encoder_config(self) -> TextEncoderConfig:
        return self._from_shapes(self._TEXT_ENCODER, checkpoint_config.text_encoder_from_shapes)

    def tokenizer(self) -> Path:
        self._origin.fetch(["google/umt5-xxl/*"])
        return self._root / "google" / "umt5-xxl"

    def _expert_folder(self, expert: Expert) -> Path:
        return self._root if self._num_experts == 1 else self._root / f"{expert.value}_model"

    def _pth(self, pattern: str) -> Path:
        self._origin.fetch([pattern])
        found = sorted(self._root.glob(pattern))
        if len(found) != 1:
            raise CheckpointError(f"{self._root} has {len(found)} files {pattern}, not one")
        return found[0]

    def _from_shapes(self, pattern: str, parse: Callable[[dict], Any]) -> Any:
        path = self._pth(pattern)
        with open_tensors(path) as file, _naming(path):
            return parse(file.shapes)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what parsing the content of `path` raises into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


# ------------------------------------------------------------------------------------ origins


class _LocalOrigin:
    def __init__(self, root: Path) -> None:
        self.root = root

    def fetch(self, patterns: list[str]) -> Path:
        return self.root


class _HubOrigin:
    """Files of one commit of a hub repository, fetched by pattern into the library's cache."""

    root: Path

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


_Origin = _LocalOrigin | _HubOrigin


def _locate(source: str, revision: str | None) -> _Origin:
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

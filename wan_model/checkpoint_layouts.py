"""Where the components of the official and of the Diffusers layout lie, and what they say.

Owns folder and file names. Knows nothing about where the files come from (an `Origin`), nor about
what is done with the tensors in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from wan_model import checkpoint_config
from wan_model.checkpoint_files import find_shards, open_tensors, read_json
from wan_model.checkpoint_keys import CheckpointError, Layout
from wan_model.config import Expert, TextEncoderConfig, VAEConfig, WanConfig


class Origin(Protocol):
    """A folder whose files appear when they are fetched by their patterns."""

    root: Path
    is_local: bool

    def fetch(self, patterns: list[str]) -> Path: ...


class CheckpointLayout(Protocol):
    """Where the components of a layout lie. Methods fetch what they name before they return it."""

    name: Layout

    def read_config(self) -> WanConfig: ...
    def transformer(self, expert: Expert) -> list[Path]: ...
    def vae(self) -> list[Path]: ...
    def vae_config(self) -> VAEConfig: ...
    def text_encoder(self) -> list[Path]: ...
    def text_encoder_config(self) -> TextEncoderConfig: ...
    def tokenizer(self) -> Path: ...


class DiffusersLayout:
    """model_index.json, and a folder per component; `transformer` is the high-noise expert.

    A component that `_shared` in model_index.json points to lies in that other folder instead.
    """

    name: Layout = "diffusers"

    def __init__(self, origin: Origin) -> None:
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


class OfficialLayout:
    """A folder per expert (or the root, for one expert), .pth files, and google/umt5-xxl."""

    name: Layout = "official"
    _VAE = "Wan2.*_VAE.pth"
    _TEXT_ENCODER = "models_t5_*.pth"

    def __init__(self, origin: Origin) -> None:
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
        is_local = self._origin.is_local
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

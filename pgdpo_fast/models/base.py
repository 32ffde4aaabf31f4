"""What every model family shares: loading under a checked dtype policy, LoRA, attention backend, export and restore.

A family is a subclass in one file: how its clips and prompts are encoded, what it was trained on, its network class,
its layer names, its shape rules and its call. The dtype policy is
diffusers': weights in the compute dtype except the family's fp32 layers, so a network built here, one loaded by
diffusers and an exported one compute the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.data.text import pad_text
from pgdpo_fast.devices import select_dtype
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.families import ClipSize, LatentRule, TextRule
from pgdpo_fast.models.config import ModelConfig
from pgdpo_fast.options import did_you_mean
from pgdpo_fast.storage import follow_umask

__all__ = ["ModelAdapter", "NoisedBatch", "adapters_off"]

ADAPTER = "default"
START = "start"  # frozen adapters that another run has trained: the reference's, and what the policy's start from
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class NoisedBatch:
    """What a network is called with, N rows.

    Attributes:
        noised: `[N, C, F, H, W]`, any float dtype; cast to the compute dtype.
        model_timestep: `[N]`, what `process.model_timestep` returns.
        conditioning: everything else the network is told, by name, N rows each; see `ModelAdapter.collate`.
    """

    noised: Tensor
    model_timestep: Tensor
    conditioning: Mapping[str, Tensor]


class ModelAdapter:
    """One model family behind one interface.

    Subclasses set the class attributes and implement `network_class`, `predict` and `widths`; `check_store` and
    `collate` where the family has rules of its own.

    Attributes:
        family: its name in `FAMILIES`.
        latents, text: how the machines of `data` encode its clips and prompts.
        clip: what `encode` brings clips to when nothing else is asked for.
        default_process: the diffusion process its weights were trained with, as in a configuration.
        lora_targets: the linear layers LoRA adapts by default.
        repeated_blocks: class names compiled by `compile: true`.
        subfolder, lora_prefix: the pipeline's names for the network, in folders and in LoRA files.
    """

    family: ClassVar[str]
    latents: ClassVar[LatentRule]
    text: ClassVar[tuple[TextRule, ...]]
    clip: ClassVar[ClipSize]
    default_process: ClassVar[Mapping[str, Any]]
    lora_targets: ClassVar[tuple[str, ...]]
    repeated_blocks: ClassVar[tuple[str, ...]] = ()
    subfolder: ClassVar[str] = "transformer"
    lora_prefix: ClassVar[str] = "transformer"

    def __init__(self, config: ModelConfig):
        problems = []
        if bool(config.path) == bool(config.architecture):
            problems.append("expected exactly one of model.path (weights) and model.architecture (random weights)")
        if config.train == "full" and config.reference == "adapter-off":
            problems.append("model.reference='adapter-off' needs model.train='lora'; use 'copy'")
        if problems:
            raise ConfigError("; ".join(problems))
        self.config = config
        self.dtype = select_dtype(config.dtype, "model.dtype")
        self.text_tokens = config.text_tokens or next(rule.length for rule in self.text if rule.name == "text")

    # -- what a family defines

    def network_class(self) -> type[nn.Module]:
        """The diffusers class of the network."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: NoisedBatch) -> Tensor:
        """The network's prediction, `[N, C, F, H, W]` in the compute dtype."""
        raise NotImplementedError

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The conditioning of a batch from that of its N rows, as a store holds it; on the host.

        Here "text" `[N, text_tokens, D]`, zero-padded, and every other tensor stacked. Families add what else they
        tell their network: masks, guidance, the frame rate.

        Raises:
            DataError: a text has more rows than `text_tokens`.
        """
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "text"}
        return {"text": pad_text([row["text"] for row in rows], self.text_tokens), **stacked}

    def text_mask(self, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Which rows of the padded text are the prompt's own, bool `[N, text_tokens]`."""
        counts = torch.tensor([len(row["text"]) for row in rows])
        return torch.arange(self.text_tokens) < counts[:, None]

    def check_store(self, model: nn.Module, store: LatentStore) -> list[str]:
        """Why a store does not fit the network; empty when it does. Raises DataError on a damaged shard."""
        problems, wanted = [], model.config.in_channels
        if store.shape[0] != wanted:
            problems.append(f"latent channels {store.shape[0]}, expected {wanted}")
        for name, width in self.widths(model).items():
            if name not in store.conditioning:
                problems.append(f"no {name} in it, encode the prompts with --text {self.family}")
            elif store.conditioning[name][-1] != width:
                problems.append(f"{name} width {store.conditioning[name][-1]}, expected {width}")
        counts = store.text_rows()
        if long := [id for id, count in counts.items() if count > self.text_tokens]:
            longest = max(long, key=counts.__getitem__)
            problems.append(
                f"the texts of {len(long)} of {len(counts)} pairs are longer than model.text_tokens={self.text_tokens} "
                f"(the longest {counts[longest]} rows, pair {longest!r}), set model.text_tokens={counts[longest]} or "
                f"encode the prompts with --text {self.family}"
            )
        return problems

    def check_patches(self, shape: Sequence[int], patch: Sequence[int]) -> list[str]:
        """Which of (F, H, W) of the latents are no multiple of the network's patch (frames, height, width)."""
        sizes = zip(("frames", "height", "width"), shape[1:], patch, strict=True)
        return [f"latent {name} {size}, expected a multiple of {step}" for name, size, step in sizes if size % step]

    def widths(self, model: nn.Module) -> dict[str, int]:
        """Width of everything the network takes from a store, by name."""
        raise NotImplementedError

    # -- loading

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network, frozen, without dropout, under the dtype policy, with the attention backend in force.

        Raises:
            ConfigError: weights or constructor arguments do not make this family, or the backend is not honoured.
        """
        model = self._from_path() if self.config.path else self._from_architecture()
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
                module.p = 0.0  # policy and reference must see the same network
        model.requires_grad_(False).to(device)
        self._set_attention_backend(model)
        self.check_dtypes(model)
        return model

    def start_from(self, model: nn.Module, directory: Path) -> None:
        """Give a loaded network what another run has exported: every weight, or frozen adapters beside them.

        Raises:
            ConfigError: adapters, and every weight is to be trained.
            DataError: the weights are those of another network, or of adapters of another size.
        """
        if not (directory / LORA_FILE).is_file():
            self._copy_stored(dict(model.named_parameters()), directory, cast=True)
            return
        if self.config.train == "full":
            raise ConfigError(
                f"model.start={self.config.start!r} holds LoRA weights, and model.train='full' trains no adapters; "
                "set it to lora"
            )
        self._add_adapter(model, START)
        started = {
            f"{self.lora_prefix}.{name.replace(f'.{START}.', '.')}": parameter
            for name, parameter in model.named_parameters()
            if START in name.split(".")
        }
        self._copy_stored(started, directory)
        model.requires_grad_(False)

    def on_meta_device(self) -> nn.Module:
        """The policy without its weights, on the meta device: for counting. Raises ConfigError like `load`."""
        with torch.device("meta"):
            model = self._from_path(weights=False) if self.config.path else self._from_architecture()
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(self.expected_dtype(model, name))
            return self.make_trainable(model.requires_grad_(False))

    def make_trainable(self, model: nn.Module) -> nn.Module:
        """Turn a loaded network into the policy: adapters or every weight trainable, train mode, checkpointing."""
        if self.config.train == "lora":
            self._add_lora(model)
        else:
            model.requires_grad_(True)
        if self.config.gradient_checkpointing:
            self._enable_checkpointing(model)
        self.check_dtypes(model)
        return model.train()

    def compile(self, model: nn.Module) -> nn.Module:
        """Compile the repeated blocks in place; parameter names do not change."""
        blocks = [module for module in model.modules() if type(module).__name__ in self.repeated_blocks]
        if not blocks:
            raise ConfigError(
                f"model.compile=true: the {self.family} family has no repeated blocks to compile; set it to false"
            )
        for block in blocks:
            block.compile(fullgraph=True)
        return model

    def _from_architecture(self) -> nn.Module:
        network = self.network_class()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.init_seed)
            try:
                model = network(**self.config.architecture)
            except Exception as error:  # whatever a constructor makes of arguments it never meant
                said = f"{type(error).__name__}: {error}"
                raise ConfigError(f"model.architecture does not build a {network.__name__}, {said}") from error
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self.expected_dtype(model, name))
        return model

    def _from_path(self, weights: bool = True) -> nn.Module:
        network, path = self.network_class(), self.config.path
        subfolder = self.config.subfolder or self.subfolder
        if Path(path).is_dir() and not (Path(path) / subfolder / "config.json").is_file():
            raise ConfigError(
                f"model.path={path!r}: no {subfolder}/config.json in it; give a diffusers folder or set model.subfolder"
            )
        source = dict(subfolder=subfolder, revision=self.config.revision)
        try:
            config = network.load_config(path, **source)
            found = config.get("_class_name")
            if found != network.__name__:
                raise ConfigError(
                    f"model.path={path!r} holds a {found}, model.family={self.family!r} needs a {network.__name__}"
                )
            if not weights:
                return network.from_config(config)
            return network.from_pretrained(path, torch_dtype=self.dtype, **source)
        except OSError as error:
            raise ConfigError(f"model.path={path!r} could not be loaded: {' '.join(str(error).split())}") from error

    # -- dtype policy

    def expected_dtype(self, model: nn.Module, name: str) -> torch.dtype:
        """fp32 for LoRA weights and the family's fp32 layers, the compute dtype for the rest."""
        parts = name.split(".")
        islands = getattr(model, "_keep_in_fp32_modules", None) or ()
        if ADAPTER in parts or START in parts or any(island in parts for island in islands):
            return torch.float32
        return self.dtype

    def check_dtypes(self, model: nn.Module) -> None:
        """Raises ConfigError when a weight is not in the dtype the policy gives it."""
        for name, parameter in model.named_parameters():
            expected = self.expected_dtype(model, name)
            if parameter.dtype != expected:
                raise ConfigError(
                    f"dtype policy: {name} is {parameter.dtype}, expected {expected}; "
                    f"load the weights through this adapter and do not cast the network afterwards"
                )

    def count_dtypes(self, model: nn.Module) -> dict[str, int]:
        """Number of weights by role and dtype, for the banner."""
        counts: dict[str, int] = {}
        for parameter in model.parameters():
            dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[parameter.dtype]
            key = f"{dtype} {'trained' if parameter.requires_grad else 'frozen'}"
            counts[key] = counts.get(key, 0) + parameter.numel()
        return counts

    # -- attention

    def _set_attention_backend(self, model: nn.Module) -> None:
        backend = self.config.attention_backend
        processors = list(getattr(model, "attn_processors", {}).values())
        aware = [processor for processor in processors if hasattr(processor, "_attention_backend")]
        if backend != "native" and (not processors or len(aware) < len(processors)):
            raise ConfigError(
                f"model.attention_backend={backend!r}: {len(processors) - len(aware)} of {len(processors)} attention "
                f"layers of the {self.family} family ignore it; use 'native'"
            )
        if not aware:
            return  # these call torch's SDPA directly, which is what "native" means
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry
        from diffusers.utils import logging

        # set_attention_backend also changes the process-wide default, which would leak into other networks
        default, _ = _AttentionBackendRegistry.get_active_backend()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of an experimental feature; that it took effect is checked below
        try:
            model.set_attention_backend(backend)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"model.attention_backend={backend!r}: {' '.join(str(error).split())}") from error
        finally:
            logging.set_verbosity(verbosity)
            _AttentionBackendRegistry.set_active_backend(default)
        ignored = [processor for processor in aware if processor._attention_backend.value != backend]
        if ignored:
            raise ConfigError(
                f"model.attention_backend={backend!r}: not in force in {len(ignored)} attention layers; use 'native'"
            )

    def _enable_checkpointing(self, model: nn.Module) -> None:
        model.enable_gradient_checkpointing()  # non-reentrant in diffusers

    # -- LoRA

    def _add_lora(self, model: nn.Module) -> None:
        self._add_adapter(model, ADAPTER)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if START in name.split("."):
                parameters[name.replace(f".{START}.", f".{ADAPTER}.")].data.copy_(parameter)

    def _add_adapter(self, model: nn.Module, name: str) -> None:
        import peft

        lora = self.config.lora
        targets = list(lora.targets or self.lora_targets)
        modules = model.named_modules()
        linear = [name.removesuffix(".base_layer") for name, module in modules if isinstance(module, nn.Linear)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                known = sorted(
                    {".".join(part for part in name.split(".")[-3:] if not part.isdigit()) for name in linear}
                )
                raise ConfigError(
                    f"model.lora.targets: no linear layer is called {target!r}{did_you_mean(target, known)}"
                )
        peft_config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.init_seed)
            if hasattr(model, "add_adapter"):
                model.add_adapter(peft_config, adapter_name=name)
            else:
                peft.inject_adapter_in_model(peft_config, model, name)
        for layer in _adapted(model):
            layer.set_adapter(name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # -- weights in and out

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write the trained weights as diffusers reads them: a LoRA file for the pipeline, or the whole network."""
        if self.config.train == "full":
            model.save_pretrained(directory)
            follow_umask(directory)
            return
        from safetensors.torch import save_file

        options = model.peft_config[ADAPTER].to_dict()
        metadata = {
            f"{self.lora_prefix}.{key}": sorted(value) if isinstance(value, set) else value
            for key, value in options.items()
        }
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in self._exported(model)},
            directory / LORA_FILE,
            metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)},
        )
        follow_umask(directory)

    def restore(self, model: nn.Module, directory: Path) -> None:
        """Put exported weights back, bit for bit.

        Raises:
            DataError: a weight is missing, unknown, or of another shape or dtype.
        """
        self._copy_stored(dict(self._exported(model)), directory)

    def _copy_stored(self, into: Mapping[str, Tensor], directory: Path, cast: bool = False) -> None:
        for name, parameter, stored in self._stored(into, directory):
            if stored.shape != parameter.shape or (stored.dtype != parameter.dtype and not cast):
                raise DataError(
                    f"{directory}: {name} is {stored.dtype} {tuple(stored.shape)}, the network has "
                    f"{parameter.dtype} {tuple(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(stored)

    def check_export(self, model: nn.Module, directory: Path) -> None:
        """Read an export back and compare it with the network, bit for bit; raises DataError where they differ."""
        for name, parameter, stored in self._stored(dict(self._exported(model)), directory):
            if stored.dtype != parameter.dtype or not torch.equal(stored, parameter.detach().cpu()):
                raise DataError(
                    f"{directory}: {name} read back differs from the network; the disk or its driver is damaging files"
                )

    def _exported(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if self.config.train == "full":
                yield name, parameter
            elif parameter.requires_grad:
                yield f"{self.lora_prefix}.{name.replace(f'.{ADAPTER}.', '.')}", parameter

    def _stored(self, exported: Mapping[str, Tensor], directory: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
        from safetensors import safe_open

        where = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as shard:
                where |= {key: file for key in shard.keys()}
        if different := sorted(where.keys() ^ exported.keys()):
            raise DataError(
                f"{directory}: {different[0]} is {'not in the network' if different[0] in where else 'missing'} "
                f"({len(different)} such weights); the export belongs to another network"
            )
        for file in sorted(set(where.values())):
            with safe_open(file, "pt") as shard:
                for key in shard.keys():
                    yield key, exported[key], shard.get_tensor(key)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the network without the LoRA adapters that are trained: with those it started from, or none.

    Run the reference's forward before the policy's: toggling between a checkpointed forward and its backward makes
    recomputation disagree.
    """
    layers = _adapted(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.set_adapter(START) if START in layer.lora_A else layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_adapter(ADAPTER) if START in layer.lora_A else layer.enable_adapters(True)
        for parameter in trained:
            parameter.requires_grad_(True)


def _adapted(model: nn.Module) -> list[nn.Module]:
    """The layers of a network that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

"""Causal language models with low-rank adapters, and what of them is perturbed.

An adapter adds a product of two thin matrices to a weight that is frozen: the layer
computes with the merged weight W + s B A, and B and A alone are trained (Hu et al., 2022,
arXiv:2106.09685).
"""

import filecmp
import json
import math
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import samfn
from recipes.data.text import Bytes
from recipes.errors import ConfigError
from recipes.terminal.hardware import lacks_memory
from samfn.gradient import Evaluate
from samfn.methods.base import Descended, MethodState, Point, is_number_zero, plain
from samfn.perturb import filter_noise
from samfn.storage import files
from samfn.tree import Params

ADAPTED = ".base_layer.weight"  # how peft ends the name of a weight that has an adapter

STEPS, LR, LENGTH, BATCH = 140, 3e-3, 128, 12  # of the training of `tiny`

SIZES: dict[str, Any] = {
    "vocab_size": Bytes.vocabulary,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # of `tiny`

Pairs = dict[str, tuple[str, str]]
"""The names of A and B by that of the weight they are added to."""

STILL = samfn.Optimizer(
    lambda params: {}, lambda params, grads, opt_state, lr: (dict(params), opt_state)
)
"""Moves nothing: for weights that are perturbed, and do not descend."""


def require_packages() -> None:
    """Raise unless transformers and peft are installed; have them show no bars."""
    try:
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        text = f'{error.name} is not installed: pip install -e ".[recipes,text]"'
        raise ConfigError(text) from error
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()


def tiny() -> nn.Module:
    """Return a transformer that reads bytes, of half a million parameters, untrained."""
    import transformers

    config: Any = transformers.LlamaConfig(**SIZES)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _is_tiny(path: str) -> bool:
    """Return whether a directory says that it holds what `tiny` makes."""
    try:
        found = json.loads(files.read_text(Path(path) / "config.json"))
        return all(found[name] == value for name, value in SIZES.items())
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False


def load(path: str) -> nn.Module:
    """Return a causal language model of a directory, or of the hub.

    Raises:
        ConfigError: there is none of this name.
    """
    import transformers

    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:
        raise _refused(path, error) from error
    return model


def _refused(path: str, error: Exception, what: str = "") -> Exception:
    """Return what is raised for a model: transformers raises anything at damaged files."""
    if lacks_memory(error):
        return error
    said = (str(error) or repr(error)).splitlines()[0].strip()
    if said.endswith(":"):  # A list of files follows.
        said = "a directory must have its files, too, as tokenizer.json"
    return ConfigError(f"--model: cannot read {what}{path}: {said}")


def tokenizer(path: str) -> Any:
    """Return what makes tokens of a text for a model of a directory, or of the hub.

    What `tiny` makes has no file of it, and reads bytes.

    Raises:
        ConfigError: it has none, or one that knows no tokens.
    """
    import transformers

    try:
        made: Any = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=False
        )
    except Exception as error:
        if _is_tiny(path):
            return Bytes()
        raise _refused(path, error, "the tokenizer of ") from error

    def tokenize(text: str) -> Any:
        found = made(text, add_special_tokens=False)["input_ids"]
        if text and not found:  # transformers makes an empty one where there is no file.
            raise ConfigError(
                f"--model: the tokenizer of {path} makes no tokens of the text; a directory"
                " must have its files, too, as tokenizer.json"
            )
        return found

    return tokenize


def require_readable(model: Any, *sequences: Tensor) -> None:
    """Raise unless a model has the tokens of sequences, and as many places.

    Raises:
        ConfigError: it does not.
    """
    length, most = sequences[0].shape[1], max(int(part.max()) for part in sequences)
    places = getattr(model.config, "max_position_embeddings", None) or length
    if length > places:
        raise ConfigError(
            f"--length: expected at most the {places} tokens that the model takes, got"
            f" {length}"
        )
    if most >= (known := model.get_input_embeddings().num_embeddings):
        raise ConfigError(
            f"--model: its tokenizer gave token {most}, and the model has {known} tokens"
        )


def adapted(model: nn.Module, rank: int) -> tuple[Any, Pairs, float]:
    """Return a model whose linear layers have adapters; their names, and the factor s.

    Args:
        model: a causal language model of transformers; it is changed.
        rank: rows of A, and columns of B.
    """
    import peft

    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():  # peft reads what transformers calls by another name.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # It is found out.
        found: Any = peft.get_peft_model(model, config)
    layers = [
        name.removesuffix(ADAPTED)
        for name, _ in found.named_parameters()
        if name.endswith(ADAPTED)
    ]
    pairs = {
        layer + ADAPTED: (
            f"{layer}.lora_A.default.weight",
            f"{layer}.lora_B.default.weight",
        )
        for layer in layers
    }
    return found, pairs, config.lora_alpha / rank


def transposed(model: nn.Module, pairs: Pairs) -> set[str]:
    """Return the weights among those of adapters that have a column for each output.

    Such are those of GPT-2's layers, Conv1D of transformers.
    """
    layers: dict[str, Any] = {
        name: model.get_submodule(name.removesuffix(ADAPTED)) for name in pairs
    }
    return {name for name, layer in layers.items() if layer.fan_in_fan_out}


def merged_noise(
    pairs: Pairs, scale: float, transposed: Collection[str] = ()
) -> samfn.Method:
    """Flat-LoRA: the gradient at merged weights with noise, each row by its own length.

    <- grad L(W + s B A + e);  e_i = rho / sqrt(n) ||(W + s B A)_i|| z,  z ~ N(0, 1)

    for each row i of n entries. One gradient a step. The noise is drawn anew for each
    step, and is added to W, which is among the buffers and stays what it was. Loss and
    outputs are those with the noise. In the paper rho rises from 0 by half a cosine.

    Args:
        pairs: adapters by the weights that they are added to.
        scale: s.
        transposed: those of them whose columns are the rows of the formula.

    Source:
        Li et al., 2025, arXiv:2409.14396; github.com/nblt/Flat-LoRA, commit 16d48ae.
    """

    def descent(evaluate: Evaluate, point: Point, memory: MethodState) -> Descended:
        if is_number_zero(point.rho):
            return plain(evaluate, point), memory
        own = {name: point.buffers[name] for name in pairs}
        noise = {name: noise_of(w, name, point) for name, w in own.items()}
        noisy = {name: w + noise[name] for name, w in own.items()}
        seen = plain(evaluate, point._replace(buffers={**point.buffers, **noisy}))
        clean = seen.clean._replace(buffers={**seen.clean.buffers, **own})
        return seen._replace(clean=clean, perturbation_norm=samfn.norm(noise)), memory

    def noise_of(weight: Tensor, name: str, point: Point) -> Tensor:
        a, b = (point.params[other] for other in pairs[name])
        flipped = name in transposed
        merged = (weight.t() if flipped else weight) + scale * b @ a
        noise = filter_noise(merged) / math.sqrt(merged.shape[1])
        return point.rho * (noise.t() if flipped else noise)

    def init(params: Params, moved: Params) -> MethodState:
        return {}

    return samfn.Method(init, descent, gradients=1.0)


def described(model: Any) -> str:
    """Return what a model computes beside its weights, as the text of its configuration."""
    found = json.loads(model.config.to_json_string())
    for name in ("_name_or_path", "transformers_version"):  # where it lies, and who wrote
        found.pop(name, None)
    return json.dumps(found, sort_keys=True)


def save(model: Any, path: Path) -> None:
    """Write a model, or its adapters, as transformers and peft read them: a directory.

    It appears whole. What has its name stays if it holds the same tensors and settings, and
    else is set aside.
    """
    aside = path.with_name(f".{path.name}")
    files.discard(aside)  # what a killed process left
    model.save_pretrained(aside)
    for file in aside.iterdir():
        files.sync(file)
    if os.path.lexists(path):
        names = sorted(file.name for file in aside.glob("*.safetensors"))
        same = filecmp.cmpfiles(path, aside, names, shallow=False)[0] == names
        if same and _settings(path) == _settings(aside):
            files.discard(aside)
            return
        files.put_aside(path, "superseded")
    aside.rename(path)
    files.sync(path.parent)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings of adapters, if there are any that can be read."""
    try:
        found = json.loads(files.read_text(folder / "adapter_config.json"))
        # A set, which Python orders anew; and a place, which may move.
        found |= {"target_modules": sorted(found["target_modules"])}
        return {**found, "base_model_name_or_path": None}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}

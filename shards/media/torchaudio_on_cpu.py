"""Let torchaudio import where its compiled extension cannot load.

torchaudio's Linux wheel links its extension to CUDA; beside a CPU build of torch `import torchaudio` raises OSError,
and with it every transformers model that looks for torchaudio. What this project uses of torchaudio is plain torch and
needs no extension, so an import hook replaces `torchaudio._extension` by an empty stand-in, only where the real one
fails to load. The hook costs nothing until torchaudio is imported.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_EXTENSION = "torchaudio._extension"


class _TolerantLoader(Loader):
    """Run the real loader; where the shared library is missing, leave a module that says so when it is used."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave the making of the module to the real loader."""
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, or fill it with what torchaudio asks of an extension that is not there."""
        try:
            self.real.exec_module(module)
        except OSError as cause:
            module._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
            module._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
            module.fail_if_no_align = _unavailable(cause)  # type: ignore[attr-defined]


def _unavailable(cause: OSError) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        """Put in a function's place one that says why it cannot be had."""

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError(
                f"{function.__name__} needs torchaudio's compiled extension, which did not load: {cause}"
            )

        return fail

    return decorate


class _ExtensionFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find torchaudio's extension as ever, to be loaded by a loader that bears its failure."""
        if fullname != _EXTENSION:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _TolerantLoader(spec.loader)
        return spec


def install() -> None:
    """Register the hook once in this process; a torchaudio that loads by itself is left as it is."""
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtensionFinder())

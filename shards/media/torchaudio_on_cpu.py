"""Makes torchaudio importable if its compiled extension cannot be loaded.

torchaudio's Linux wheel links its extension to CUDA; with a CPU build of torch `import torchaudio` raises OSError, and
so does every transformers model that imports torchaudio. The parts of torchaudio used here are plain torch and need no
extension, so an import hook replaces `torchaudio._extension` by an empty module, only if the real one fails to load.
The hook costs nothing until torchaudio is imported.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_EXTENSION = "torchaudio._extension"


class _TolerantLoader(Loader):
    """Runs the real loader; if the shared library cannot be loaded, the module raises errors only when it is used."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with the real loader."""
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, or define what torchaudio needs without the extension."""
        try:
            self.real.exec_module(module)
        except OSError as cause:
            module._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
            module._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
            module.fail_if_no_align = _unavailable(cause)  # type: ignore[attr-defined]


def _unavailable(cause: OSError) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        """Replace a function by one that raises the reason why it is unavailable."""

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
        """Find torchaudio's extension and wrap its loader in `_TolerantLoader`."""
        if fullname != _EXTENSION:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _TolerantLoader(spec.loader)
        return spec


def install() -> None:
    """Register the hook once per process; a torchaudio whose extension loads is not changed."""
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtensionFinder())

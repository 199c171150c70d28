"""Whether a fast path may take the place of a module's call."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_bare(module: nn.Module) -> bool:
    """Whether nothing acts on a call of the module: no hook, no other forward, no weights that are brought for it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and not _has_any_global_hook()

"""Every patch that this package applies to torch or megatron-core, each with its reason.

Owns nothing else. Import it before `megatron.core`: some of its modules bind `torch.cuda` names on import.
The first group makes CPU tensors and gloo work and is skipped where CUDA exists; the second group
mends the 0.19.2 wheel and applies everywhere. Patches of `megatron.training` wait in `patch_training`.
"""

import contextlib
import functools
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from importlib import import_module

import torch

from .fused_adam import FusedAdam

_FACTORIES = [
    "zeros",
    "ones",
    "empty",
    "tensor",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "as_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "linspace",
]


class _NoStream:
    """Stands for `torch.cuda.Stream` and `torch.cuda.Event`: CPU work is synchronous."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def _done(self, *args, **kwargs):
        return self

    wait_stream = wait_event = synchronize = record_event = record = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def _patch_placement():
    """megatron-core moves tensors and modules with `.cuda()` and asks for the current CUDA device."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.device_count = lambda: 1
    # DeepSpeed, which transformers imports where it is installed, makes torch ask device_count instead.
    torch.cuda.is_available = lambda: False
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _patch_random_state():
    """Its RNG tracker saves and restores the CUDA generator; here the CPU generator plays that part."""
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed


def _patch_tracker_random_state():
    """The tracker's own helpers index `torch.cuda.default_generators`, which is empty here."""
    random = import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


def _hide_transformer_engine():
    """megatron-core takes its optimizer kernels wherever it can be imported; without a GPU they fail."""
    sys.modules["transformer_engine"] = None


def _patch_streams():
    """Gradient reduction, pipeline exchange and timers order their work with streams and events."""
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _patch_memory_queries():
    """The training log reads the allocator's counters."""
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)
    torch.cuda.memory_stats = lambda *args, **kwargs: {}
    torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda *args, **kwargs: None


def _patch_device_properties():
    """Argument validation asks for the compute capability as soon as TP or CP is above 1."""
    torch.cuda.get_device_capability = lambda *args, **kwargs: (0, 0)
    torch.cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=1, total_memory=1 << 34, name="cpu"
    )


def _names_cuda(device) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def _patch_factories():
    """Schedules and gradient clipping build scalars with `device="cuda"`; RoPE asks for pinned memory."""

    def on_cpu(factory):
        @functools.wraps(factory)
        def make(*args, **kwargs):
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return make

    # `with torch.device("meta")`, by which transformers loads models, knows factories by identity. The list
    # is made once: now, of the functions that the patched ones call.
    import_module("torch.utils._device")._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_type_strings():
    """The optimizers dispatch on the string `torch.cuda.FloatTensor`."""
    original = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name


@contextlib.contextmanager
def _without_compiling():
    """Where it is imported, megatron-core hands its fused functions to torch.compile.

    That imports torch's compiler, half of the seconds that a process takes to start. On a CPU the functions
    run as they are written; a C++ compiler is not asked for.
    """
    original = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda later: later)
    try:
        yield
    finally:
        torch.compile = original


def _patch_fused_adam():
    """Without TE or apex, resuming the distributed optimizer fails on AdamW's per-parameter `step`.

    `FusedAdam` keeps `step` in the group, as theirs do. On any machine without them, GPUs included.
    """
    optimizer = import_module("megatron.core.optimizer")
    distributed = import_module("megatron.core.optimizer.distrib_optimizer")
    if distributed.HAVE_APEX_OR_TE:
        return
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = FusedAdam, True, True


def patch_training():
    """Patches of `megatron.training`; call it once, after parsing arguments and before `pretrain`."""
    training = import_module("megatron.training.training")
    initialize = import_module("megatron.training.initialize")
    datasets = import_module("megatron.core.datasets.utils")
    if not torch.cuda.is_available():
        training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
        # It compiles two fusions that are off on the CPU: many seconds, and a C++ compiler is asked for.
        training.set_jit_fusion_options = lambda **named: None
    # Imported here: it imports megatron-core, which must not happen before the first group of patches.
    import_module("megatron_clsa.parallel.checkpoint_io").write_in_process()
    # The wheel ships the compiled dataset helpers without the Makefile that pretrain insists on running.
    datasets.compile_helpers = lambda: None


def wrap_training(name: str, around: Callable | None):
    """Call `around(original, ...)` in place of a function of `megatron.training.training`; None undoes it.

    These have no hook upstream: `training_log`, the one place that sees every figure of a step, `train`,
    which never evaluates before its first step, `train_step`, which guards and the teacher stand around,
    `load_checkpoint`, which cannot keep the optimizer's moments and restart the schedule,
    `setup_model_and_optimizer`, which hands its model to nobody who could take it apart, and
    `print_rank_last` and `report_theoretical_memory`, whose lines ours replace.
    """
    training = import_module("megatron.training.training")
    original = getattr(getattr(training, name), "original", getattr(training, name))
    if around is None:
        setattr(training, name, original)
        return
    wrapped = functools.partial(around, original)
    wrapped.original = original
    setattr(training, name, wrapped)


def wrap_save(around: Callable):
    """Call `around(original, ...)` in place of `dist_checkpointing.save`, which has no last word upstream."""
    module = import_module("megatron.core.dist_checkpointing")
    original = getattr(module.save, "original", module.save)
    module.save = functools.partial(around, original)
    module.save.original = original


@contextlib.contextmanager
def param_groups_of_any_schedule():
    """Optimizer groups are matched to a checkpoint's by peak rate too, which differs between phases."""
    modules = [
        import_module(f"megatron.core.optimizer.{name}") for name in ("optimizer", "distrib_optimizer")
    ]
    keys = modules[0].param_group_identifier_keys
    for module in modules:
        module.param_group_identifier_keys = tuple(key for key in keys if key not in ("max_lr", "min_lr"))
    try:
        yield
    finally:
        for module in modules:
            module.param_group_identifier_keys = keys


def _install():
    # On import megatron-core says once a module what it lacks without TE; an error must stay one line.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    if not torch.cuda.is_available():
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA toolkit, no GPU
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for patch in (
            _hide_transformer_engine,
            _patch_placement,
            _patch_random_state,
            _patch_streams,
            _patch_memory_queries,
            _patch_device_properties,
            _patch_factories,
            _patch_type_strings,
        ):
            patch()
        with _without_compiling():
            _patch_tracker_random_state()  # the first to import megatron.core
    _patch_fused_adam()


_install()

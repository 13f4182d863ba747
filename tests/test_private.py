"""PyTorch's private names that memlab uses: a release may change them without a word, and then a
test here fails with the name.
"""

import ast
import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed._tools.mem_tracker  # to be found below
import torch.testing._internal.distributed.fake_pg

from memlab.meters import arrays, cpu

ROOT = Path(__file__).resolve().parents[1]

#: All of them, from where they are found.
PRIVATE = (
    "torch._C._autograd._profiler_enabled",
    "torch._C._current_graph_task_id",
    "torch._C._ensureCUDADeviceGuardSet",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.autograd.graph._engine_run_backward",
    "torch.cuda._lazy_init",
    "torch.cuda.memory._dump_snapshot",
    "torch.cuda.memory._record_memory_history",
    "torch.cuda.memory._snapshot",
    "torch.distributed._tools.mem_tracker.MemTracker",
    "torch.distributed.tensor._sharding_prop.ShardingPropagator",
    "torch.distributed.tensor._sharding_prop.ShardingPropagator._fake_mode_lock",
    "torch.library.Library._destroy",
    "torch.ops.aten._amp_foreach_non_finite_check_and_unscale_",
    "torch.ops.aten._foreach_norm",
    "torch.ops.aten._fused_rms_norm",
    "torch.ops.aten._fused_rms_norm_backward",
    "torch.ops.aten._grouped_mm",
    "torch.ops.aten._index_put_impl_",
    "torch.ops.aten._local_scalar_dense",
    "torch.ops.aten._log_softmax",
    "torch.ops.aten._pin_memory",
    "torch.ops.aten._scaled_dot_product_attention_math",
    "torch.ops.aten._scaled_dot_product_cudnn_attention",
    "torch.ops.aten._scaled_dot_product_cudnn_attention_backward",
    "torch.ops.aten._scaled_dot_product_efficient_attention",
    "torch.ops.aten._scaled_dot_product_efficient_attention_backward",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch.ops.aten._softmax",
    "torch.ops.aten._thnn_fused_gru_cell",
    "torch.ops.aten._thnn_fused_gru_cell_backward",
    "torch.ops.aten._thnn_fused_lstm_cell",
    "torch.ops.aten._unique2",
    "torch.ops.aten._unsafe_index_put",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.utils._foreach_utils._foreach_supported_types",
    "torch.utils.data.dataloader._BaseDataLoaderIter",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.Tensor._indices",
    "torch.Tensor._is_view",
    "torch.Tensor._values",
    "torch.Tensor._version",
)

#: These are there only in a PyTorch that was built with CUDA.
WITH_CUDA = ("torch._C._cuda_clearCublasWorkspaces",)

#: C++ names, which `cuda_stand_in` finds in PyTorch's own libraries.
SYMBOLS = {"_ZN2at6detail12getCUDAHooksEv"}

#: A flag of PyTorch's C++ library: `cpu._log_level` finds it.
FLAG = "FLAGS_caffe2_log_level"

#: Where NumPy's C interface is found in Python.
NUMPYS = {"_core", "_ARRAY_API"}

#: Private by their form only: what Python's named tuples have, the end of an operator's name, and
#: two functions that Python documents.
OTHERS = {"_asdict", "_fields", "_replace", "_backward", "_current_frames", "_getframe"}


def find(path: str) -> object:
    return functools.reduce(getattr, path.split(".")[1:], torch)


@pytest.mark.parametrize("path", PRIVATE)
def test_a_private_name_is_still_there(path):
    find(path)


@pytest.mark.parametrize("path", WITH_CUDA)
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch was built without CUDA")
def test_a_private_name_of_cuda_is_still_there(path):
    find(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the library has another name elsewhere")
def test_the_flag_is_still_there():
    assert cpu._log_level() is not None, FLAG


def test_numpys_hook_is_still_there():
    assert arrays._get_handler is not None, NUMPYS


# --- None is used that is not listed --------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> set[str]:
    """The names that a file gives to something of its own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def used_in(tree: ast.AST) -> set[str]:
    """The private names that a file takes from something else: attributes, imports, and strings
    that name an attribute.
    """
    own, names = defined_in(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not (of_self and node.attr in own):
                names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update((node.module or "").split("."))
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("FLAGS_"):
                names.add(node.value)
            elif node.value.isidentifier() and is_of_torch(node.value):
                names.add(node.value)
    return {name for name in names if is_private(name) or name.startswith("FLAGS_")}


@functools.cache
def is_of_torch(name: str) -> bool:
    """Whether PyTorch's own objects have a private attribute of this name."""
    if not is_private(name):
        return False
    optimizer = torch.optim.SGD([torch.zeros(1)])
    places = (torch, torch._C, torch.Tensor, torch.cuda, torch.cuda.memory, torch.autograd)
    objects = (torch.ops.aten, torch.nn.Linear(1, 1), optimizer, torch.nn.functional)
    return name in [path.split(".")[-1] for path in (*PRIVATE, *WITH_CUDA)] or any(
        hasattr(place, name) for place in (*places, *objects)
    )


def unlisted(sources: dict[str, str]) -> list[str]:
    trees = {file: ast.parse(source) for file, source in sources.items()}
    own = set().union(*map(defined_in, trees.values()))
    listed = {part for path in (*PRIVATE, *WITH_CUDA) for part in path.split(".")}
    listed |= OTHERS | NUMPYS | SYMBOLS | {FLAG}
    return [
        f"{file} uses {name}: list it in tests/test_private.py, or use a public one"
        for file, tree in trees.items()
        for name in sorted(used_in(tree) - listed)
        if name not in own or is_of_torch(name)
    ]


def test_no_other_private_name_is_used():
    files = [*(ROOT / "memlab").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    sources = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    assert unlisted(sources) == []


def test_what_is_listed_is_used():
    files = [*(ROOT / "memlab").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for path in (*PRIVATE, *WITH_CUDA, FLAG):
        name = path.split(".")[-1].removesuffix("_backward")
        assert name in source, f"{path} is used no more: take it off the list"


@pytest.mark.parametrize(
    "line",
    [
        "torch._foreach_add([x], 1)",
        "getattr(torch._C, '_log_api_usage_once')",
        "print(optimizer._zero_grad_profile_name)",
        "model._forward_hooks.clear()",
        "from torch._dynamo import config",
        "import torch._inductor.config",
        "from torch.optim.optimizer import _use_grad_for_differentiable",
        "FLAG = 'FLAGS_torch_jit_level'",
    ],
)
def test_a_private_name_that_is_not_listed_is_found(line):
    [problem] = unlisted({"memlab/some.py": line})
    assert "memlab/some.py uses " in problem

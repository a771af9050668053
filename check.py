"""Is the kernel right? Run it against PyTorch's SDPA and print every error beside its bound.

    python check.py             # everything; the last line is `N passed, N failed`, and `, N skipped` if any
    python check.py -k hopper   # only the cases with "hopper" in their name
    python check.py -k search --search 5000   # look for rows that miss the bound, at random

On a GPU this runs the real kernels. Without one it executes the Triton code that Helion generates,
with its tiles, masks and program order, in Triton's interpreter, and compiles it for GPUs that are
not here with the compiler that Triton brings along.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before it

import flash_attn
import helion
from flash_attn import LOG2E, configs, flash_attention
from torch.nn.attention.bias import CausalVariant

DEVICE = "cuda" if GPU else "cpu"
HEAD_DIMS = (16, 32, 64, 128, 256)  # what is compiled; others are filled up
D = 128 if GPU else 64  # head dim of most cases; the interpreter is slow
RUNS = 200 if GPU else 1  # of which the bits have to be the same
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in flash_attn.DTYPES}
NAMED = {**configs.CONFIGS, "hopper": configs.HOPPER, "general": configs.HOPPER_GENERAL, "default": None}
NAMED["blackwell"] = configs.BLACKWELL_CUTE

# The published tables: shape, Helion ms, PyTorch ms, speedup, TFLOPS, as printed.
PUBLISHED = {
    "autotuned": [
        ((2, 32, 1024, 128), 0.2122, 0.1230, 0.58, 161.9),
        ((4, 32, 2048, 128), 1.0717, 0.7299, 0.68, 256.5),
        ((4, 32, 4096, 128), 3.9385, 2.8049, 0.71, 279.2),
        ((8, 32, 2048, 128), 2.0359, 1.4325, 0.70, 270.0),
        ((16, 64, 4096, 128), 30.5381, 21.9485, 0.72, 288.0),
    ],
    "tma_persistent": [
        ((2, 32, 1024, 128), 0.1928, 0.1231, 0.64, 178.2),
        ((4, 32, 4096, 128), 4.2923, 2.8052, 0.65, 256.2),
        ((16, 64, 4096, 128), 32.8050, 21.9438, 0.67, 268.1),
    ],
    "tile128": [
        ((2, 32, 1024, 128), 0.1470, 0.1235, 0.84, 233.8),
        ((4, 32, 2048, 128), 0.7319, 0.7316, 1.00, 375.6),
        ((4, 32, 4096, 128), 2.7222, 2.8071, 1.03, 403.9),
        ((8, 32, 2048, 128), 1.4363, 1.4337, 1.00, 382.8),
        ((16, 64, 4096, 128), 20.7709, 21.9450, 1.06, 423.5),
        ((8, 64, 8192, 128), 41.6737, 43.5296, 1.04, 422.1),
    ],
}


def flops(shape):
    """Floating-point operations of dense attention on [B, H, S, D]: two products, 2 each FMA."""
    B, H, S, D = shape
    return 4 * B * H * S * S * D


# ---- Without a GPU: execute and compile ----------------------------------------------------------


def patch_interpreter():
    """Close the gaps of Triton's interpreter that stand between it and our kernels."""
    import helion.runtime
    import numpy as np
    import triton.language as tl
    from helion.runtime.triton import helpers
    from helion.autotuner.config_spec import ConfigSpec
    from torch._inductor.runtime.triton_compat import libdevice
    from triton.runtime import interpreter

    libdevice.exp2, libdevice.exp = lambda x: tl.exp2(x), lambda x: tl.exp(x)  # it has no libdevice
    helion._compat._supports_tensor_descriptor = lambda: True  # but TMA it executes, and helion
    supports = ConfigSpec.supports_config_key  # only has to be told
    ConfigSpec.supports_config_key = (
        lambda self, key: key == "host_tensor_descriptors" or supports(self, key)
    )
    helion.runtime.get_num_sm = lambda device, *, reserved_sms=0: 3  # persistent grids ask for it
    convert = interpreter._convert_float

    def convert_float(x, source, target, rounding_mode):
        """Between float32 and bf16 it cuts where a GPU rounds to nearest even, and gets subnormals wrong."""
        if (source, target) == (tl.bfloat16, tl.float32):
            return (x.astype(np.uint32) << 16).reshape(x.shape)
        if (source, target) != (tl.float32, tl.bfloat16) or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(x, source, target, rounding_mode)
        bits = x.view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # a carry goes on into the exponent, up to inf
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16).reshape(x.shape)

    interpreter._convert_float = convert_float

    def round_to_bf16(self, asm, constraints, values, *rest):
        """It has no inline assembly, and flash_attn.py one piece of it."""
        low = convert_float(values[0].data, tl.float32, tl.bfloat16, None)
        data = convert_float(low, tl.bfloat16, tl.float32, None).view(np.float32)
        return mock.Mock(get_result=lambda i: interpreter.TensorHandle(data, tl.float32))

    interpreter.InterpreterBuilder.create_inline_asm = round_to_bf16
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):  # it keeps bf16 as uint16, and would multiply these integers
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )
    create_fmul = interpreter.InterpreterBuilder.create_fmul

    def multiply(self, a, b):  # the same; only blackwell_kernel does it outside of a product
        product = create_fmul(self, widened(a), widened(b))
        if a.dtype.scalar != tl.bfloat16:
            return product
        return interpreter.TensorHandle(convert_float(product.data, tl.float32, tl.bfloat16, None), tl.bfloat16)

    interpreter.InterpreterBuilder.create_fmul = multiply
    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: interpreter.TensorHandle(
        convert_float(np.float32([value]), tl.float32, tl.bfloat16, None), tl.bfloat16
    )
    reduce = interpreter.ReduceOps.apply_impl

    def reduce_fast(self, input):  # it would call helion's max element by element
        if self.combine_fn == helpers._maximum_propagate_nan:
            return self.min_max(input[0], np.max)
        return reduce(self, input)

    interpreter.ReduceOps.apply_impl = reduce_fast
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):  # triton 3.6 with numpy 2.4: int() of a 1-element array
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_index


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_interpreter()

# SMs of the largest part, and KiB of shared memory per SM (CUDA C++ Programming Guide, technical
# specifications per compute capability).
CHIPS = {80: (108, 164), 86: (84, 100), 89: (128, 100), 90: (132, 228), 100: (148, 228), 120: (188, 100)}


@contextlib.contextmanager
def pretend(sm):
    """Inside, torch and helion believe that a GPU of compute capability sm / 10 is present."""
    from helion._compiler.compile_environment import CompileEnvironment
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sms, kib = CHIPS[sm]
    capability = divmod(sm, 10)
    device = mock.Mock(
        major=capability[0], minor=capability[1], multi_processor_count=sms, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName="",
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=(kib - 1) << 10,
        shared_memory_per_multiprocessor=kib << 10, total_memory=80 << 30, L2_cache_size=50 << 20,
    )
    device.name = f"sm_{sm}"
    properties = DeviceProperties(
        type="cuda", index=0, multi_processor_count=sms, cc=sm, major=capability[0],
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32,
    )
    to_fake = CompileEnvironment._to_fake_tensor

    def to_symbolic(self, x, source):
        """A fake tensor's sizes and strides as symbols, as helion makes them from a real tensor's."""
        if self.settings.static_shapes:
            return to_fake(self, x, source)
        n, none = x.dim(), [None] * x.dim()
        sizes, strides, _ = self.shape_env.create_symbolic_sizes_strides_storage_offset(
            x, source, symbolic_context=StatelessSymbolicContext(
                [DimDynamic.DYNAMIC] * n, [DimDynamic.INFER_STRIDE] * n, none, none))  # fmt: skip
        with self.fake_mode:
            fake = torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)
        self.input_sources[fake] = source
        return fake

    with contextlib.ExitStack() as stack:
        for target, value in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.cuda.get_device_capability": lambda device=None: capability,
            "torch.cuda.get_device_properties": lambda index=None: device,
            "torch.version.cuda": "13.0",
        }.items():
            stack.enter_context(mock.patch(target, value))
        for owner, name, value in (
            (DeviceProperties, "create", lambda device: properties),
            (CompileEnvironment, "tensor_descriptor_base_is_aligned", lambda self, tensor: True),
            (CompileEnvironment, "_to_fake_tensor", to_symbolic),
            (FakeTensor, "data_ptr", lambda self: 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        yield


def resources(cubin, sm, threads, shared):
    """What the file cubin takes for a CTA of so many threads and bytes of shared memory. Returns a dict:
    these two, registers per thread, spilled bytes per thread, CTAs that fit on an SM (0: it does not),
    and the tensor-core instruction in the machine code with its count, or "none".
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = run(tools / "cuobjdump", "-res-usage", cubin)
    sass = run(tools / "nvdisasm", "-c", cubin)
    registers, spilled = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("UTCHMMA", "HGMMA", "HMMA")}
    names = {"UTCHMMA": "tcgen05", "HGMMA": "wgmma", "HMMA": "mma"}
    return {
        "threads": threads,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "ctas": min(65536 // (registers * threads), (CHIPS[sm][1] << 10) // (shared + 1024), 2048 // threads),
        "instruction": next((f"{names[op]} ({n} {op})" for op, n in counts.items() if n), "none"),
    }


def cute_code(plan, head_dim, dtype, causal=False, group=1, with_lse=False, length=4096):
    """resources of blackwell_kernel for sm_100a, by Helion's cute backend and the compiler in cutlass-dsl."""
    os.environ["CUTE_DSL_ARCH"] = "sm_100a"
    launched = []

    def launch(kernel, grid, *args, block):
        """flash_attn.py has seen that this kernel is the recognised one: remember it instead."""
        from helion.runtime.cute import launcher

        entry = launcher._build_cute_schema_and_args(kernel, args, (*grid, 1, 1)[:3])
        wrapper = launcher._create_cute_wrapper(kernel, entry.schema, (*block, 1, 1)[:3], num_sm=CHIPS[100][0])
        launched.extend((wrapper, entry.launch_args, math.prod(block)))

    with pretend(100):
        q, k, v = (torch.empty(16, h, length, head_dim, dtype=DTYPES[dtype], device="cuda")
                   for h in (64, 64 // group, 64 // group))  # fmt: skip
        flash_attn._blackwell(True, causal, plan, with_lse, launch)(q, k, v)
    wrapper, arguments, threads = launched
    import cutlass.cute
    from cuda.bindings.driver import CUstream

    with tempfile.TemporaryDirectory() as folder:
        options = f"--enable-tvm-ffi --keep-cubin --dump-dir={folder}"
        host = str(cutlass.cute.compile(wrapper, *arguments, CUstream(0), options=options).ir_module)
        # The launch's dynamic shared memory: the i64 among the fields of cudaLaunchConfig_t.
        field = re.search(r"\[0, 2\] : .*struct<\(array<3 x i32>, array<3 x i32>, i64, .*\n.*store (%\w+), ", host)
        shared = re.findall(rf"{field[1]} = llvm.mlir.constant\((\d+) : i64\)", host[: field.start()])[-1]
        return resources(next(Path(folder).glob("*.cubin")), 100, threads, int(shared))


def machine_code(config, sm, head_dim=128, dtype="bfloat16", *case):
    """Compile a Plan or one of the report's Configs for compute capability sm / 10, without such a GPU.

    Returns the dict of `resources`. case: masked and online of hopper_kernel, what else cute_code takes.
    Triton must not be in interpreter mode: see compile_in_child.
    """
    if isinstance(config, configs.Plan) and config.kernel == "blackwell":
        return cute_code(config, head_dim, dtype, *case)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    shorts = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    launched = {}

    def launcher(fn, grid, *args, num_warps, num_stages, **options):
        """What helion calls to launch: remember it instead."""
        launched.update(fn=fn, args=args, options=dict(options, num_warps=num_warps, num_stages=num_stages))

    with tempfile.TemporaryDirectory() as folder:
        with pretend(sm):
            if isinstance(config, configs.Plan):  # which is compiled for the power of two
                head_dim = next(dim for dim in HEAD_DIMS if dim >= head_dim)
            q = torch.empty(16, 64, 4096, head_dim, dtype=DTYPES[dtype], device="cuda")
            scale = head_dim**-0.5 * LOG2E
            if isinstance(config, helion.Config):
                tensors = [q.view(-1, *q.shape[2:])] * 4
                run = flash_attn.attention_kernel.bind((*tensors, scale)).compile_config(config)
                run(*tensors, scale, _launcher=launcher)
            else:
                kernel = getattr(flash_attn, f"{config.kernel}_kernel")
                letters, numbers = flash_attn._TAKES[kernel.fn]
                tensors = [q.new_empty(16, 64, 4096, dtype=torch.float32) if x == "l" else q for x in letters]
                numbers = (scale, head_dim, 4096, CHIPS[sm][0], 0)[: len(numbers)]
                more = {"hopper": case or (False, dtype == "float16"), "general": (config.block_m,)}.get(config.kernel, ())
                constants = config.block_m, config.block_n, *more
                run = flash_attn._bind(kernel, config, constants, DTYPES[dtype], head_dim, q.device)
                run(*tensors, *numbers, *constants, _launcher=launcher)
        signature, constexprs, attributes = {}, {}, {}
        for i, (param, arg) in enumerate(zip(launched["fn"].params, launched["args"])):
            stride = "stride" in param.name and isinstance(arg, int)
            if param.is_constexpr or stride and arg == 1:
                signature[param.name], constexprs[param.name] = "constexpr", arg
            elif isinstance(arg, TensorDescriptor):
                block = str(list(arg.block_shape)).replace(" ", "")
                signature[param.name] = f"tensordesc<{shorts[arg.base.dtype]}{block}>"
            else:
                name = shorts.get(getattr(arg, "dtype", None))
                signature[param.name] = f"*{name}" if name else "fp32" if isinstance(arg, float) else "i32"
                if name or stride:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(launched["fn"], signature, constexprs, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launched["options"])
        tmem = getattr(compiled.metadata, "tmem_size", None) or 0
        if tmem > 512:  # the code is empty, and a launch would raise OutOfResources
            raise RuntimeError(f"needs {tmem} columns of tensor memory, an SM has 512")
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        # with the loading warps
        return resources(cubin, sm, 32 * compiled.metadata.num_warps, compiled.metadata.shared)


def compile_in_child(jobs):
    """machine_code for each (Plan or Config, sm, head dim, dtype and so on), in a child process.

    The child has the interpreter off. Returns a list of dicts; {"error": reason} where the compiler
    refused.
    """
    pack = lambda c: [c.to_json()] if isinstance(c, helion.Config) else [
        c.kernel, c.block_m, c.block_n, c.config.to_json()]  # fmt: skip
    child = subprocess.run(
        [sys.executable, __file__, "--compile", json.dumps([(pack(c), *rest) for c, *rest in jobs])],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )
    found = [json.loads(line[5:]) for line in child.stdout.splitlines() if line.startswith("CODE ")]
    reason = (child.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return found + [{"error": f"the compiler died: {reason}"}] * (len(jobs) - len(found))


# ---- The cases -----------------------------------------------------------------------------------
# Each is a function that raises where the kernel is wrong, and returns the line to print.


def seen(q, k, is_causal):
    """Which keys a row sees, [M, N]: is_causal as flash_attention takes it, False for all."""
    M, N = q.size(2), k.size(2)
    diagonal = N if is_causal is False else N - M if is_causal is CausalVariant.LOWER_RIGHT else 0
    return torch.ones(M, N, dtype=torch.bool, device=q.device).tril(diagonal)


def reference(q, k, v, scale=None, is_causal=False):
    """Attention by its definition, in float64. A row that sees nothing is 0."""
    if q.dim() == 4:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * (q.size(-1) ** -0.5 if scale is None else scale)
    if is_causal is False:
        return scores.softmax(-1) @ v
    mask = seen(q, k, is_causal)
    return scores.masked_fill(~mask, -math.inf).softmax(-1).where(mask.any(-1, keepdim=True), 0.0) @ v


def compare(out, q, k, v, scale=None, unit=1.0, least=0.0, is_causal=False):
    """Hold out to flash-attention's own bound (its tests/test_flash_attn.py): at most twice the
    error of PyTorch's SDPA in the same dtype against a float64 reference, plus rounding.
    Rows with NaN or inf must be the rows that have it in SDPA's math backend. (The fast backends
    lose some: the CPU's turns a NaN of inf - inf into a number.)
    unit: the size of the results, where it is not about 1. least: what SDPA's error counts at least."""
    assert out.shape == q.shape and out.dtype == q.dtype, (out.shape, out.dtype)
    mask = None if is_causal is False else seen(q, k, is_causal)
    sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, mask, scale=scale, enable_gqa=True)
    other, ref = sdpa(), reference(q, k, v, scale, is_causal)
    finite = ref.isfinite().all(-1)
    if not (finite.all() and other.isfinite().all()):
        with sdpa_kernel(SDPBackend.MATH):
            plain = sdpa()
        assert torch.equal(plain.isfinite().all(-1), finite), "SDPA's math backend has other rows"
        if not other[finite].isfinite().all():  # cuDNN gives NaN where the scale is not positive
            other = plain
    assert torch.equal(out.isfinite().all(-1), finite), "not finite in other rows than SDPA"
    ref = ref[finite]
    low = ref.to(q.dtype)
    rounding = (low + 0.3 * unit - 0.3 * unit - low).abs().max().item()
    bound = 2 * max((other[finite] - ref).abs().max().item(), least) + 2 * rounding
    error = (out[finite] - ref).abs().max().item()
    assert error <= bound, f"error {error:.2e} > bound {bound:.2e}"
    return f"error {error:.2e} <= bound {bound:.2e}"


def make(shape, dtype="bfloat16", keys=None, heads=None, seed=0):
    """Random normal q: [B, H, S, D] and k, v: [B, heads, keys, D]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    B, H, S, D = shape
    return [
        torch.randn(B, h, n, D, generator=generator, device=DEVICE).to(DTYPES[dtype])
        for h, n in ((H, S), (heads or H, keys or S), (heads or H, keys or S))
    ]


def random_input(config, shape, dtype="bfloat16", keys=None):
    q, k, v = make(shape, dtype, keys)
    try:
        out = flash_attention(q, k, v, config=NAMED[config])
    except Exception as error:
        if not GPU or config == "default":
            raise
        if type(error).__name__ == "OutOfResources":  # a named config need not fit every head dim
            return f"does not fit this GPU: {error}"
        # Triton before 3.9 fails on sm_90 where a batched tile's D is not its key block (README).
        known = config == "tile128" and shape[3] != 128 and torch.cuda.get_device_capability() == (9, 0)
        if not (known and "PassManager" in str(error)):
            raise
        return "refused by Triton's compiler, as documented for this head dim on sm_90"
    return compare(out, q, k, v)


CAUSAL = {"upper_left": True, "lower_right": CausalVariant.LOWER_RIGHT}


def causal(config, kind, dtype):
    """Groups of 1, 4 and 8 heads; lengths equal and not, ragged and not, one query, rows that see nothing."""
    for heads, M, N in ((8, 128, 256), (2, 300, 300), (1, 129, 520), (2, 300, 140), (2, 1, 400), (8, 384, 128), (8, 2, 129)):
        q, k, v = make((1, 8, M, D), dtype, N, heads)
        options = dict(is_causal=CAUSAL[kind], enable_gqa=True, config=NAMED[config])
        out, lse = flash_attention(q, k, v, return_lse=True, **options)
        line = compare(out, q, k, v, is_causal=CAUSAL[kind])
        compare_lse(lse, q, k, is_causal=CAUSAL[kind])
    return line


def compare_lse(lse, q, k, is_causal=False, atol=2e-5):
    """lse against float64. An error of it is a relative one of every p."""
    k = k.double().repeat_interleave(q.size(1) // k.size(1), 1)
    scores = (q.double() @ k.mT * q.size(3) ** -0.5).masked_fill(~seen(q, k, is_causal), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=atol, rtol=2e-6)
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32, (lse.shape, lse.dtype)


def head_dims(config, dtype):
    """Multiples of 8 that are no power of two: what fills them up must be 0, and the next head stays out."""
    for dim in (8, 24, 72, 80, 96, 112, 192, 200):
        if config != "default" and dim > 128:  # these tiles are not for as much
            continue
        q, k, v = (x.transpose(1, 2) for x in make((1, 150, 2, dim), dtype))  # [B, S, H, D] in memory
        q[0, 1], k[0, 1], v[0, 1] = math.nan, math.inf, math.nan  # TMA must not fill up the other head with these
        out = flash_attention(q, k, v, is_causal=True, config=NAMED[config])
        line = compare(*(x[:, :1] for x in (out, q, k, v)), is_causal=True)
        q, k, v = make((1, 2, 150, dim), dtype, 200)
        compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)
    return line


def unseen(config, dtype, with_lse):
    """Keys beyond the diagonal, in a row's own tile, that would beat all that it sees by 2^20 and more."""
    options = dict(config=NAMED[config], return_lse=with_lse)
    for kind, M, N in (("upper_left", 256, 256), ("lower_right", 200, 328), ("lower_right", 150, 300)):
        q, k, v = make((1, 1, M, D), dtype, N)
        q[..., 0], k[..., 0] = 8, 0
        k[:, :, -6:, 0] = 2.5 * D**0.5
        out = flash_attention(q, k, v, is_causal=CAUSAL[kind], **options)
        out = out[0] if with_lse else out
        rows = slice(0, M - 6)  # those that do not see them
        line = compare(out[:, :, rows], q[:, :, rows], k[:, :, : N - 6], v[:, :, : N - 6], is_causal=CAUSAL[kind])
    return line


def another_call(config):
    """A call that is like the last one but for one thing is another call: strides, alignment, options, dtypes."""
    config, (q, k, v) = NAMED[config], make((1, 2, 144, D))
    apart = lambda x: torch.cat([x, x], 2)[:, :, :144]
    odd = lambda x: torch.cat([x, x], -1)[..., 1 : D + 1].clone().view(-1).new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    for i in range(3):
        for change in (apart, odd):
            qkv = [change(x) if i == j else x for j, x in enumerate((q, k, v))]
            copies = []
            clone = torch.Tensor.clone
            with mock.patch.object(torch.Tensor, "clone", lambda x, **o: copies.append(x) or clone(x, **o)):
                out = flash_attention(*qkv, config=config)
            copies = [x for x in copies if any(x is y for y in qkv)]  # a compiler has others
            assert len(copies) == (change is odd and config is configs.HOPPER), "another alignment, and it was not seen"
            compare(out, *qkv)
            compare(flash_attention(q, k, v, config=config), q, k, v)
    for options in (dict(is_causal=True), dict(scale=0.2), dict(is_causal=CAUSAL["lower_right"])):
        compare(flash_attention(q, k[:, :, :130], v[:, :, :130], config=config, **options), q, k[:, :, :130],
                v[:, :, :130], options.get("scale"), is_causal=options.get("is_causal", False))  # fmt: skip
    compare_lse(flash_attention(q, k, v, return_lse=True, config=config)[1], q, k)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        flash_attn._bind.cache_clear()  # as in a process whose first call it is
        flash_attn._compiled.clear()
        flash_attn._calls.clear()
        out, lse = flash_attention(q, k, v, return_lse=True, config=config)
    finally:
        torch.set_default_dtype(before)
    compare_lse(lse, q, k)
    negative = torch.complex(q.float(), q.float()).conj().imag  # -q, of which only a bit says so
    for attend in (flash_attention, F.scaled_dot_product_attention):
        found = attend(negative, k.float(), v.float())
        torch.testing.assert_close(found, attend(-q.float(), k.float(), v.float()))
    return compare(out, q, k, v)


def split_keys(config, dtype):
    """The README's merge of results over parts of the keys, by their lse, is attention over all of them."""
    q, k, v = make((1, 2, 130, D), dtype, 400)
    parts = [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 150), (150, 151), (151, 400))]
    found = [flash_attention(q, *part, return_lse=True, config=NAMED[config]) for part in parts]
    out, lse = readme("def merge")["merge"](*zip(*found))
    compare_lse(lse, q, k)
    return compare(out.to(q.dtype), q, k, v)


def readme(text):
    """What the README's Python block with this text in it defines: its recipes are what is checked."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    defined = {}
    exec(next(block for block in blocks if text in block), defined)
    return defined


def operator(name):
    """torch.library's own checks, and one graph for all lengths."""
    attend = functools.partial(flash_attention, is_causal=True, enable_gqa=True, return_lse=True)
    backend = "inductor" if GPU else "aot_eager"
    q, k, v = make((2, 4, 140, D), "float16", heads=2)
    if name == "opcheck":
        for tensors in ((q, k, v), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]):
            torch.library.opcheck(flash_attn._operator, (*tensors, 1, None, True, True))
    elif name == "compile":
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        compiled = torch.compile(lambda *qkv: attend(*qkv), fullgraph=True, dynamic=True, backend=counting)
        for n in (140, 150, 300):
            q, k, v = make((2, 4, n, D), "float16", heads=2)
            out, lse = compiled(q, k, v)
            compare(out, q, k, v, is_causal=True)
            compare_lse(lse, q, k, is_causal=True)
        assert len(graphs) == 1, f"{len(graphs)} graphs"
    elif name == "export":
        class Attend(torch.nn.Module):
            forward = staticmethod(attend)

        length = torch.export.Dim("length", min=2, max=4096)
        program = torch.export.export(Attend(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
        q, k, v = make((2, 4, 200, D), "float16", heads=2)
        compare(program.module()(q, k, v)[0], q, k, v, is_causal=True)
    elif name == "autocast":
        q, k, v = (x.float() for x in (q, k, v))
        expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())[0]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
            assert torch.equal(attend(q, k, v)[0], expected)
            for wrong in (q.double(), [1.0]):
                try:
                    attend(wrong, k, v)
                except TypeError as error:
                    assert str(error).startswith("q"), error
                else:
                    raise AssertionError("nothing was raised")
    elif name == "vmap":
        try:
            torch.vmap(lambda q: flash_attention(q, q, q))(torch.stack([q, q]))
        except RuntimeError as error:
            assert "vmap" in str(error) and "fold" in str(error), error
        else:
            raise AssertionError("nothing was raised")
    return "as documented"


def decoder(dtype):
    """A block of a model in plain torch: prefill, then a token at a time with a cache, with SDPA and with us."""
    torch.manual_seed(0)
    H, Hk, C, S = 4, 2, 4 * D, 140
    project = [torch.randn(C, n * D, device=DEVICE) * C**-0.5 for n in (H, Hk, Hk, H)]
    x, dtype = torch.randn(1, S + 3, C, device=DEVICE).to(DTYPES[dtype]), DTYPES[dtype]

    def block(x, cache, attend):
        q, k, v = ((x @ w.to(x.dtype)).unflatten(-1, (-1, D)).transpose(1, 2) for w in project[:3])
        k, v = cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v))]
        mask = seen(q, k, CausalVariant.LOWER_RIGHT)
        return x + attend(q, k, v, mask).transpose(1, 2).flatten(2) @ project[3].to(x.dtype)

    def run(attend, dtype):
        cache = [torch.empty(1, Hk, 0, D, device=DEVICE, dtype=dtype)] * 2
        return torch.cat([block(x[:, a:b].to(dtype), cache, attend) for a, b in ((0, 100), (100, S), *(
            (n, n + 1) for n in range(S, S + 3)))], 1)  # fmt: skip

    ours = lambda q, k, v, mask: flash_attention(q, k, v, is_causal=CausalVariant.LOWER_RIGHT, enable_gqa=True)
    sdpa = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    ref = run(sdpa, torch.float64)
    error, other = ((run(attend, dtype) - ref).abs().max().item() for attend in (ours, sdpa))
    assert error <= 2 * other + 1e-6, f"error {error:.2e}, SDPA's {other:.2e}"
    return f"error {error:.2e}, SDPA's {other:.2e}"


def attend_by_definition(q, k, v, is_causal, scale=None):
    """out and lse as autograd differentiates them: a row that sees nothing has no gradient."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    mask = seen(q, k, is_causal)
    some = mask.any(-1)[:, None]
    scores = q @ k.mT * (q.size(3) ** -0.5 if scale is None else scale)
    scores = torch.where(some, scores.masked_fill(~mask, -math.inf), 0.0)
    return scores.softmax(-1).where(some, 0.0) @ v, scores.logsumexp(-1).where(some[:, 0], 0.0)


def compare_gradients(qkv, options, with_lse=False, scale=None):
    """dq, dk and dv of random gradients of out, and of lse, by the bound that `compare` has for out."""
    is_causal = options.get("is_causal", False)
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.randn(qkv[0].shape, generator=generator, device=DEVICE).to(qkv[0].dtype)
    of_lse = torch.randn(qkv[0].shape[:3], generator=generator, device=DEVICE) * with_lse

    def gradients(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out, lse = attend(*leaves)
        lse = torch.where(lse > -math.inf, lse, 0.0)
        loss = (out * weights.to(dtype)).sum().double() + (lse.double() * of_lse).sum()
        return torch.autograd.grad(loss, leaves)

    def ours(q, k, v):
        found = flash_attention(q, k, v, enable_gqa=True, scale=scale, return_lse=with_lse, **options)
        return found if with_lse else (found, torch.zeros_like(of_lse))

    def sdpa(q, k, v):  # which has no lse
        mask = None if is_causal is False else seen(q, k, is_causal)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        return out, attend_by_definition(q.float(), k.float(), v.float(), is_causal, scale)[1]

    lines, definition = [], functools.partial(attend_by_definition, is_causal=is_causal, scale=scale)
    largest = definition(*(x.double() for x in qkv))[1].abs().max().item()
    ref = gradients(definition, torch.float64)
    # ds is p times the difference of two sums, which may be 0: what the float32 rounding of these moves.
    q, k, v = (x.double().repeat_interleave(qkv[0].size(1) // x.size(1), 1) for x in qkv)
    scale_ = q.size(3) ** -0.5 if scale is None else scale
    p = torch.where(seen(q, k, is_causal), (q @ k.mT * scale_ - definition(q, k, v)[1][..., None]).exp(), 0.0)
    dp = weights.double() @ v.mT
    sums = p * (dp.abs() + (p * dp.abs()).sum(-1, keepdim=True)) * abs(scale_)
    cancelling = {"q": (sums @ k.abs()).max().item(), "k": (sums.mT @ q.abs()).max().item(), "v": 0.0}
    for name, x, other, y in zip("qkv", gradients(ours, qkv[0].dtype), gradients(sdpa, qkv[0].dtype), ref):
        unit = y.abs().max().item()
        # p is exp(score - lse), and both are rounded to float32.
        rounding = (y.to(x.dtype) - y).abs().max().item() + 2.0**-22 * ((2 + largest) * unit + cancelling[name])
        # In float32 p from lse alone is less exact than SDPA's, from the maximum and the sum.
        factor = 4 if x.dtype == torch.float32 else 2
        bound = factor * (other.nan_to_num() - y).abs().max().item() + 2 * rounding
        error = (x - y).abs().max().item()
        assert error <= bound, f"d{name}: error {error:.2e} > bound {bound:.2e}"
        lines.append(f"d{name} {error:.1e} <= {bound:.1e}")
    return ", ".join(lines)


def gradients(config, kind, dtype):
    """The cases of `causal`, dense ones, head dims that are filled up, [B, S, H, D], a given scale, lse."""
    options = dict(is_causal=CAUSAL.get(kind, False), config=NAMED[config])
    for heads, M, N, dim in ((4, 128, 256, D), (2, 150, 300, D), (1, 129, 260, 72), (2, 300, 140, 16), (4, 1, 200, D)):
        qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make((1, 4, M, dim), dtype, N, heads)]
        line = compare_gradients(qkv, options, with_lse=M != 128, scale=0.3 if M == 128 else None)
    return line


def hard_gradients(config, dtype):
    """Rows with scores far from 0, and with two levels, of which one has the values."""
    dtype = DTYPES[dtype]
    heads = SHIFTS[::3] + [dict(head, values=values) for head in LEVELS[::11] for values in ("upper", "lower")]
    for i, head in enumerate(heads):
        qkv = [x[None, None] for x in hard_head(dtype, KEYS, i, **head)]
        line = compare_gradients(qkv, dict(config=NAMED[config]))
    return f"{len(heads)} heads, the last one: {line}"


def autograd(name):
    """What autograd asks of a function, beside its numbers."""
    q, k, v = make((1, 2, 140, D), "float16")
    if name == "gradcheck":
        qkv = [x.requires_grad_() for x in make((1, 2, 3, 8), "float32", 5, 1)]
        attend = lambda *qkv: flash_attention(*qkv, is_causal=CAUSAL["lower_right"], enable_gqa=True, return_lse=True)
        assert torch.autograd.gradcheck(attend, qkv, eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0, fast_mode=True)
    elif name == "only what is asked for":
        for i, x in enumerate((q, k, v)):
            x.requires_grad_()
            with mock.patch.object(flash_attn, "_gradients", wraps=flash_attn._gradients) as spy:
                flash_attention(q, k, v).sum().backward()
            assert spy.call_args.args[-2:] == (i == 0, i > 0) and x.grad is not None
            assert [y.grad is None for y in (q, k, v)] == [y is not x for y in (q, k, v)]
            x.requires_grad_(False)
            x.grad = None
        with torch.no_grad():
            assert not flash_attention(q.requires_grad_(), k, v).requires_grad
    elif name == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            try:
                flash_attention(torch.autograd.forward_ad.make_dual(q, q), k, v)
            except RuntimeError as error:
                assert "forward-mode" in str(error), error
            else:
                raise AssertionError("nothing was raised")
    elif name == "second derivative":
        q.requires_grad_()
        (dq,) = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
        try:
            dq.sum().backward()
        except RuntimeError as error:
            assert "once_differentiable" in str(error), error
        else:
            raise AssertionError("nothing was raised")
    elif name == "same bits":
        q, k, v = (x.requires_grad_() for x in make((2, 16, 1000, D) if GPU else (1, 2, 140, D)))
        run = lambda: torch.autograd.grad(flash_attention(q, k, v, is_causal=True).square().sum(), (q, k, v))
        first = run()
        for _ in range(RUNS):
            assert all(map(torch.equal, run(), first))
    elif name == "compile":
        qkv = [x.requires_grad_() for x in make((2, 4, 140, D), "float16", heads=2)]
        attend = functools.partial(flash_attention, is_causal=True, enable_gqa=True, return_lse=True)
        compiled = torch.compile(attend, fullgraph=True, backend="inductor" if GPU else "aot_eager")
        loss = lambda out, lse: out.square().sum() + lse.sum()
        expected = torch.autograd.grad(loss(*attend(*qkv)), qkv)
        for x, y in zip(torch.autograd.grad(loss(*compiled(*qkv)), qkv), expected):
            torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
        torch.library.opcheck(flash_attn._operator, (*qkv, 1, None, True, True))
    return "as documented"


def training():
    """Two layers of a decoder, GQA and causal, learn random tokens in 50 steps as they do with SDPA; half of them
    with activation checkpointing."""
    from torch.utils.checkpoint import checkpoint

    H, Hk, C, S, steps = 2, 1, 64, 40, 50
    tokens = torch.randint(50, (1, S + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def losses(attend):
        torch.manual_seed(0)
        make_weight = lambda *shape: torch.nn.Parameter((torch.randn(*shape) * shape[0] ** -0.5).to(DEVICE))
        embed = make_weight(50, C)
        layers = [[make_weight(C, n * 16) for n in (H, Hk, Hk)] + [make_weight(H * 16, C)] for _ in range(2)]
        optimizer = torch.optim.Adam([embed, *sum(layers, [])], lr=3e-3)

        def block(x, *weights):
            q, k, v = ((F.rms_norm(x, (C,)) @ w).unflatten(-1, (-1, 16)).transpose(1, 2) for w in weights[:3])
            return x + attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2) @ weights[3]

        for step in range(steps):
            x = embed[tokens[:, :-1]]
            for weights in layers:
                x = checkpoint(block, x, *weights, use_reentrant=False) if step % 2 else block(x, *weights)
            loss = F.cross_entropy((x @ embed.T).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours, sdpa = (torch.tensor(list(losses(attend))) for attend in (flash_attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(ours, sdpa, rtol=2e-3, atol=2e-3)
    assert ours[-1] < ours[0] / 2
    return f"loss {ours[0]:.3f} to {ours[-1]:.3f}, SDPA's {sdpa[-1]:.3f}"


class Skipped(Exception):
    """A case that cannot run here, and why."""


def transformers_model():
    """A small random Llama with the README's recipe, prefill and cached decoding, against its own sdpa."""
    try:
        import transformers
    except ImportError:
        raise Skipped("transformers is not installed") from None
    readme("AttentionInterface")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=256, intermediate_size=128, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(DEVICE).eval()
    tokens = torch.randint(99, (2, 150), device=DEVICE)
    padded = torch.ones_like(tokens).index_fill(1, torch.arange(9, device=DEVICE), 0)
    found = {}
    for name in ("sdpa", "helion"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            prefill = model(tokens[:, :140], use_cache=True)
            chunk = model(tokens[:, 140:149], past_key_values=prefill.past_key_values, use_cache=True)
            last = model(tokens[:, 149:], past_key_values=chunk.past_key_values)
            masked = model(tokens, attention_mask=padded)
        found[name] = torch.cat([prefill.logits, chunk.logits, last.logits, masked.logits[:, 9:]], 1)
    torch.testing.assert_close(found["helion"], found["sdpa"], atol=1e-4, rtol=1e-4)
    return f"logits differ by at most {(found['helion'] - found['sdpa']).abs().max():.1e}"


def report_shape(config, shape):
    """A shape of the report, on a GPU; the float64 reference is taken of two heads."""
    q, k, v = make(shape)
    out = flash_attention(q, k, v, config=NAMED[config])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-2, rtol=2e-2)
    lines = [compare(*(x[b, h][None, None] for x in (out, q, k, v))) for b, h in ((0, 0), (-1, -1))]
    return lines[-1]


def strided(config):
    """Read in place: [B, S, H, D] in memory, k and v of one packed tensor, expanded heads; out in q's
    layout. Copied only by hopper_kernel: rows that are not aligned or not contiguous."""
    config, q = NAMED[config], make((2, 129, 2, D))[0].transpose(1, 2)
    k, v = torch.cat(make((2, 2, 300, D))[:2], -1).split(D, -1)
    k_bshd, v_bshd = (x.transpose(1, 2) for x in make((2, 300, 2, D))[:2])
    q_sbhd = make((129, 2, 2, D))[0].permute(1, 2, 0, 3)
    compare(flash_attention(q_sbhd, k_bshd, v_bshd, config=config), q_sbhd, k_bshd, v_bshd)
    one = [x[:, :1].expand(2, 2, -1, -1) for x in (k, v)]
    calls = [functools.partial(flash_attention, q, *kv, config=config) for kv in ((k, v), (k_bshd, v_bshd), one)]
    line = compare(calls[0](), q, k, v)
    compare(calls[2](), q, *one)
    out = calls[1]()
    with mock.patch.object(torch.Tensor, "clone", side_effect=AssertionError("it was copied")):
        for call in calls:  # compiled before, which copies
            call()
    assert out.transpose(1, 2).is_contiguous(), "out is not in q's layout"
    compare(out, q, k_bshd, v_bshd)
    k, v = (torch.cat([x, x], -1)[..., 1 : D + 1] for x in (k, v))
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    compare(flash_attention(q, k, v, config=config), q, k, v)
    return line


def lengths(config):
    """Other lengths, batches, heads and scales compile nothing, and the memory stays where it is."""
    config, calls = NAMED[config], 100 if GPU else 12
    sizes = [(1 + i % 3, 2 * (1 + i % 2), 130 + 3 * i if i % 2 else 1, 200 + 7 * i) for i in range(calls)]
    for M, N in ((1, 129), (130, 200), (130, 256)):  # the kinds of masking
        flash_attention(*make((1, 2, M, D), keys=N), is_causal=CAUSAL["lower_right"], config=config)
        flash_attention(*make((1, 2, M, D), keys=N), config=config)
    compiled, used = set(flash_attn._compiled), []
    with mock.patch.object(helion.Kernel, "bind", side_effect=AssertionError("it was compiled")):
        for i, (B, H, M, N) in enumerate(sizes):
            q, k, v = make((B, H, M, D), keys=N, heads=2)
            is_causal = CAUSAL["lower_right"] if i % 4 == 1 else False
            out = flash_attention(q, k, v, is_causal=is_causal, enable_gqa=True, scale=0.1 + i / 1000, config=config)
            if i % 10 == 1:
                compare(out, q, k, v, 0.1 + i / 1000, is_causal=is_causal)
            del q, k, v, out
            used.append(torch.cuda.memory_allocated() if GPU else 0)
    assert set(flash_attn._compiled) == compiled, "something was compiled"
    assert used[-1] <= used[2], used  # the reference has its workspace by then
    assert len(flash_attn._calls) <= flash_attn.CALLS
    return f"{calls} calls"


def empty(config):
    """No batch, heads, queries or keys give what SDPA gives."""
    for shape, keys in (((0, 2, 4, D), 5), ((2, 0, 4, D), 5), ((2, 2, 0, D), 5), ((2, 2, 4, D), 0)):
        B, H, S, _ = shape
        q, k, v = (torch.randn(B, H, n, D, device=DEVICE).bfloat16() for n in (S, keys, keys))
        with sdpa_kernel(SDPBackend.MATH):  # cuDNN returns None for some of these
            sdpa = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(flash_attention(q, k, v, config=NAMED[config]), sdpa)
    return "as SDPA"


def one_tensor(config):
    """q, k and v are one tensor in the first call of a shape, and three in the next, and other three."""
    x = make((1, 3, 144, D))[0]
    compare(flash_attention(x, x, x, config=NAMED[config]), x, x, x)
    for seed in (1, 2):
        qkv = make((1, 3, 144, D), seed=seed)
        line = compare(flash_attention(*qkv, config=NAMED[config]), *qkv)
    return line


def large_tensor(config):
    """More than 2^31 elements between the first and the last (GPU only)."""
    apart = 2**30 + 8 * D
    storage = torch.empty(2 * apart + 2 * 300 * D, dtype=torch.bfloat16, device=DEVICE)
    for large in ((0, 1, 2), (0,), (1, 2)):
        qkv = make((3, 2, 300, D))
        for i in large:
            x = storage.as_strided((3, 2, 300, D), (apart, 300 * D, D, 1))
            if i != large[0]:  # k and v, or all three, are one tensor then
                qkv[i] = qkv[large[0]]
            else:
                x.copy_(qkv[i])
                qkv[i] = x
        line = compare(flash_attention(*qkv, config=NAMED[config]), *qkv)
    return line


def threads():
    """Eight threads make their first calls at once, on a stream each (GPU only, in a new process)."""
    script = """
import threading, torch, check
from flash_attn import flash_attention
barrier, results = threading.Barrier(8), []
def work(i):
    q, k, v = check.make((1 + i % 3, 2, 100 + 50 * i, (64, 128)[i % 2]), ("bfloat16", "float16")[i // 4], seed=i)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    barrier.wait()
    with torch.cuda.stream(stream):
        for _ in range(20):
            out = flash_attention(q, k, v, is_causal=i % 3 == 0)
    stream.synchronize()
    results.append(check.compare(out, q, k, v, is_causal=i % 3 == 0))
workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert len(results) == 8, results
"""
    child = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr.strip()[-600:]
    return "eight right results"


def capture():
    """In a CUDA graph: not as the first call, and right afterwards (GPU only)."""
    q, k, v = make((2, 2, 200, 32))
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            flash_attention(q, k, v)
        raise AssertionError("it was compiled under capture")
    except RuntimeError as error:
        assert "before the capture" in str(error), error
    flash_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v)
    for x, new in zip((q, k, v), make((2, 2, 200, 32), seed=1)):
        x.copy_(new)
    graph.replay()
    return compare(out, q, k, v)


def large_logits(config):
    """exp of these overflows float32: only a softmax that subtracts its maximum survives."""
    q, k, v = make((2, 2, 129, D))
    q = q * 40
    assert (q.double() @ k.double().mT * D**-0.5).max() > 89
    return compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)


def rising_scores(config):
    """Later keys beat the first ones by more than 2^x can hold, in one head."""
    q, k, v = make((2, 2, 129, D), keys=300)
    k[1, 0, 200:240] *= 60
    scores = q.double() @ k.double().mT * D**-0.5
    assert (scores[1, 0].amax(-1) - scores[1, 0, :, :128].amax(-1)).min() > 45
    return compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)


def low_scores(config):
    """exp of every score of one head is 0 in float32: only their differences count."""
    q, k, v = make((2, 2, 129, D))
    q[0, 1, :, 0] += 40
    k[0, 1, :, 0] -= 40
    assert (q[0, 1].double() @ k[0, 1].double().mT * D**-0.5).max() < -104
    return compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)


def huge_values(config):
    """The sum of exp(score) * v overflows float32, their mean does not."""
    q, k, v = make((2, 2, 129, D))
    v = v.abs() * 3e36
    out, expected = flash_attention(q, k, v, config=NAMED[config]).double(), reference(q, k, v)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=0)
    return f"relative error {((out - expected) / expected).abs().max():.2e} <= bound 2.00e-02"


def given_scale(config):
    """0 gives the mean of v, -0.3 the smallest products the largest scores; 1e-50 is 0 in float32."""
    for dtype in ("bfloat16", "float16"):
        q, k, v = make((2, 2, 129, D), dtype)
        for scale in (0, -0.0, 1e-50):
            mean = flash_attention(q, k, v, scale=scale, config=NAMED[config])
            expected = v.mean(2, keepdim=True, dtype=torch.float64).expand_as(mean)
            torch.testing.assert_close(mean.double(), expected, atol=1e-3, rtol=1e-2)
        line = compare(flash_attention(q, k, v, scale=0.3, config=NAMED[config]), q, k, v, 0.3)
        # A maximum taken before the negative scale is a minimum, and 2^x of the others overflows.
        q = q * 40
        compare(flash_attention(q, k, v, scale=-0.3, config=NAMED[config]), q, k, v, -0.3)
    return line


def identical_keys(config):
    """Every probability is 1 / N and every output row the mean of v."""
    q, k, v = make((2, 2, 129, D))
    k = k[:, :, :1].expand_as(k)
    return compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)


def not_finite(config):
    for tensor, row, value in ((0, 5, float("nan")), (0, 128, float("inf")), (1, 7, float("inf")),
                               (2, 128, float("nan"))):  # fmt: skip
        qkv = make((2, 2, 129, D))
        qkv[tensor][1, 1, row, 3] = value
        compare(flash_attention(*qkv, config=NAMED[config]), *qkv)
    q, k, v = make((2, 2, 129, D))
    q[0, 0, 3] = float("nan")
    out = flash_attention(q, k, v, config=NAMED[config])
    assert out[0, 0, 3].isnan().all() and out.isnan().sum() == D
    return "NaN and inf stay in the rows where SDPA has them"


def same_bits(config):
    """Many runs on a GPU, where a race between warps would show in some of them."""
    kinds = [dict(config=NAMED[config])]
    if NAMED[config] is None or isinstance(NAMED[config], configs.Plan):
        kinds += [dict(kinds[0], is_causal=True), dict(kinds[0], is_causal=True, return_lse=True)]
    for options in kinds:
        for shape in ((4, 32, 1024, D), (2, 16, 1001, 64), (2, 8, 8192, D)) if GPU else ((2, 2, 129, D),):
            q, k, v = make(shape)
            first = flash_attention(q, k, v, **options)
            for _ in range(RUNS):
                torch.testing.assert_close(flash_attention(q, k, v, **options), first, atol=0, rtol=0)
    return f"the same bits as the first, {RUNS} times each"


def every_element_written(config):
    """torch.empty_like is poisoned with NaN, so an element that nobody writes shows."""
    q, k, v = make((2, 2, 129, D))
    config, poisoned = NAMED[config], []
    flash_attention(q, k, v, config=config)  # compiled before torch.empty_like is another

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.dtype == q.dtype:  # scratch space for descriptors is int8
                poisoned.append(x.fill_(float("nan")))
            return x

        return poisoned_allocate

    with mock.patch("torch.empty_like", poison(torch.empty_like)):
        out = flash_attention(q, k, v, config=config)
    assert any(x.data_ptr() == out.data_ptr() for x in poisoned), "out was not poisoned"
    return compare(out, q, k, v)


# Hard rows: heads whose rows are all of one kind, each head held to the bound by itself, so that a row
# that is wrong does not hide behind the error of a larger one. Everything about scores is in nats, the
# exponent of e. All kinds share one shape, so that a config compiles once for them; MANY keys are another.
HEADS, ROWS, KEYS, MANY = 8, 256 if GPU else 64, 300, 131072 if GPU else 4096
LN2 = math.log(2)
LARGEST = {torch.bfloat16: 1e36, torch.float16: 1e4, torch.float32: 1e36}  # of v


def in_pieces(x):
    """Three columns that sum up to x: one bf16 has 8 bits, which is too few for a score."""
    first = x.bfloat16().double()
    second = (x - first).bfloat16().double()
    return torch.stack([first, second, x - first - second], -1)


def hard_head(dtype, keys, seed, shift=0.0, sweep=0.0, spread=0.0, gap=0.0, upper=0.5, values="normal", size=1.0):
    """q: [ROWS, D], k, v: [keys, D]: one head with scores and values to measure.

    shift is added to all scores, and another 0 to sweep from the first row to the last. spread: their
    standard deviation. A share of `upper` of the keys, but one at least, is on an upper level; the
    others are lower by gap and another 0 to 1 bit, so that every row rounds its p in another way.
    values: "normal", "positive", on the "upper" or "lower" keys only, "opposed" on the two levels, or one
    of the two below that set scores, too. size: of the largest result, unless v would be over LARGEST.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    low = torch.randperm(keys, generator=generator) >= min(max(round(upper * keys), 1), keys - 1)
    scores, odd = torch.zeros(keys, dtype=torch.float64), torch.arange(keys) % 2 == 1
    if values == "cancelling":
        # p of even keys is 1/32 of its last bit above a number of that dtype, p of odd ones 31/32. To
        # nearest rounds both by 1/32, cutting by 1/32 and 31/32, and their values are opposed. So it is
        # where a kernel's p is SDPA's times a power of 2: where it subtracts the maximum, which is key 0
        # and a whole number of bits here, or any whole number of bits.
        eps = torch.finfo(dtype).eps
        scores = torch.log1p(torch.where(odd, 31 / 32 * eps, eps / 32)) - 4 * LN2
        scores[0], low = 0, torch.zeros_like(low)
        v = torch.where(odd, -1.0, 1.0)[:, None] * (1 + uniform(D))
        v[0] = 0
    elif values == "biased":
        # The mantissas of odd and even keys' p are a factor of 1.5 or 0.75 apart, and so is on average
        # what cutting takes away from them. Rounding to nearest takes nothing, whatever is subtracted.
        scores = LN2 * (0.1 * uniform(keys) + 0.6 * odd)
        low = torch.zeros_like(low)
        v = torch.where(odd, -(0.5**0.6), 1.0)[:, None] * (1 + uniform(D))
    else:
        v = {
            "normal": lambda: normal(keys, D),
            "positive": lambda: uniform(keys, D),
            "upper": lambda: normal(keys, D) * ~low[:, None],
            "lower": lambda: normal(keys, D) * low[:, None],
            "opposed": lambda: torch.where(low, 1.0, -1.0)[:, None] * (1 + uniform(D)),
        }[values]()
    root, rest, along = D**0.5, D - 9, torch.linspace(0, 1, ROWS, dtype=torch.float64)
    ones = lambda n: torch.ones(n, 3, dtype=torch.float64)
    shifts, gaps = in_pieces(root * (shift + sweep * along)), in_pieces(root * -(gap + LN2 * along))
    q = torch.cat([ones(ROWS), shifts, gaps, normal(ROWS, rest) * spread * (D / rest) ** 0.5], -1)
    k = torch.cat([in_pieces(root * scores), ones(keys), ones(keys) * low[:, None], normal(keys, rest)], -1)
    q, k = q.to(dtype), k.to(dtype)
    v *= min(size / reference(q, k, v).abs().max().item(), LARGEST[dtype] / v.abs().max().item())
    return q.to(DEVICE), k.to(DEVICE), v.to(dtype).to(DEVICE)


def tf32x3(x, y):
    """x @ y as tensor cores do it in float32: three products of numbers with 10 bits behind the point."""
    cut = lambda x: ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    (x, x_low), (y, y_low) = ((cut(z), cut(z - cut(z))) for z in (x.contiguous(), y.contiguous()))
    return x_low @ y + x @ y_low + x @ y


def rounded_once(q, k, v):
    """The largest error of a few ways to do attention in float32 with p rounded to v's dtype once.

    SDPA's error can be none by luck: its largest p is exactly 1, and where few keys count the other p
    may be exact, too. A kernel that subtracts another number than the maximum is as right, and has
    that error. So here the largest p is 2^-t for some t, and p is rounded to nearest and summed as it is
    multiplied. What SDPA may lack in float32 is here, too: sums over tiles of keys, one after the other,
    and for each t another order of the sums that are scores.
    """
    ref, errors = reference(q, k, v), []
    product = tf32x3 if v.dtype == torch.float32 else torch.matmul
    for t in (0, 0.25, 0.5, 0.75):
        q_t, k_t = (x.float().roll(int(t * D), -1) for x in (q, k))
        x = product(q_t, k_t.mT) * (D**-0.5 * LOG2E)
        p = torch.exp2(x - x.amax(-1, keepdim=True) - t).to(v.dtype).float()
        tiles = list(zip(p.split(32, -1), v.float().split(32, -2)))
        acc, l = sum(product(p, v) for p, v in tiles), sum(p.sum(-1, keepdim=True) for p, _ in tiles)
        errors.append((acc / l - ref).abs().max().item())
    return max(errors)


def hold(config, dtype, heads, keys=KEYS):
    """Some heads, [(seed, parameters of hard_head)], in one call, each to the bound by itself.
    Returns [(does it hold, text)]."""
    qkv = [torch.stack(x)[None] for x in zip(*(hard_head(dtype, keys, seed, **head) for seed, head in heads))]
    out, results = flash_attention(*qkv, config=NAMED[config]), []
    for i, (seed, head) in enumerate(heads):
        q, k, v = (x[:, i : i + 1] for x in qkv)
        # "cancelling" is to find what is as large as a priori errors; hard_head says why it is fair.
        least = 0.0 if head.get("values") == "cancelling" else rounded_once(q, k, v)
        if dtype == torch.float32:  # tensor cores cut sums off where float32 rounds them
            least *= 2
        try:
            line = compare(out[:, i : i + 1], q, k, v, None, reference(q, k, v).abs().max().item(), least)
            results.append((True, line))
        except AssertionError as error:
            results.append((False, f"{error} at seed {seed}, {head}"))
    return results


def hold_all(config, dtype, heads, keys=KEYS):
    """Any number of heads, HEADS in a call. Raises where one misses its bound, returns the line to print."""
    results = []
    for first in range(0, len(heads), HEADS):
        results += hold(config, dtype, heads[first : first + HEADS], keys)
    missed = [text for holds, text in results if not holds]
    assert not missed, f"{len(missed)} of {len(results)} heads, the first one: {missed[0]}"
    return f"{len(results)} heads, the last one: {results[-1][1]}"


# All rows of a head leave hopper's range in the same way, or those that are noticed would have the others
# computed again, too.
SHIFTS = [dict(shift=shift, sweep=0.5, spread=1.0) for shift in (-300, -100, -60, -20, 20, 60, 100, 300)]
# One key is on the upper level, or half of them, or most. At -4 they sum up to more than 1 nevertheless;
# at -60 to what float32 holds, but the lower level is then where it has no numbers left.
LEVELS = [dict(shift=shift, gap=gap, upper=upper) for shift in (-4, -60, 60) for gap, upper in (
    (2, 0.0), (2, 1.0), (5, 0.5), (8, 0.5), (8, 1.0), (11, 0.5), (20, 0.0), (40, 0.5))]  # fmt: skip
HARD = {
    "shifts": SHIFTS,
    "shifts_in_one_head": [dict(shift=-300, sweep=600, spread=spread) for spread in (0, 0.1, 0.3, 1, 2, 3, 5, 10)],
    # Just before 88 p sums up to inf in float32 without a single p, a tile's sum, or a sum of p v, that is
    # inf. hopper subtracts a constant, -40 bits, and has it from 55.1 to 56.1: fine steps hit it there.
    "edges": [dict(shift=shift, sweep=0.2, spread=0.1, size=2.0**-10) for shift in (
        *range(-100, 156, 4), *(52 + i / 4 for i in range(24)))],
    "large_values": [dict(head, values="positive", size=math.inf) for head in SHIFTS],
    "spreads": [dict(spread=spread) for spread in (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)],
    "upper_level": [dict(head, values="upper") for head in LEVELS],
    "lower_level": [dict(head, values="lower") for head in LEVELS],
    "cancelling": [dict(shift=bits * LN2, values="cancelling") for bits in range(-16, 16, 4)],
}
HARD_MANY = [  # one large p and many tiny ones that weigh as much; tiny ones that sum up to 1 or 2.7; biased
    dict(gap=math.log(MANY), upper=0.0, values="opposed"),
    dict(gap=math.log(MANY), upper=0.0, values="positive", shift=-0.5),
    dict(shift=-math.log(MANY), sweep=1.0, upper=1.0, values="positive"),
    dict(values="biased"),
]


def hard_rows(config, kind, dtype):
    heads, keys = (HARD_MANY, MANY) if kind == "many_keys" else (HARD[kind], KEYS)
    return hold_all(config, DTYPES[dtype], list(enumerate(heads)), keys)


def drawn(dtype, seed):
    """Parameters of hard_head: the seed says which, so that a draw can be had again without the others."""
    draw = random.Random(seed)
    return dict(
        shift=round(draw.choice([300, 90, 20, 6]) * draw.uniform(-1, 1), 3),
        sweep=draw.choice([0.0, 0.5, 5.0]),
        spread=draw.choice([0.0, 0.1, round(10 ** draw.uniform(-1, 1.5), 3)]),
        gap=round(draw.choice([10, 40]) * draw.random(), 3),
        upper=draw.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
        values=draw.choice(["normal", "positive", "upper", "lower", "lower", "opposed"]),
        size=10.0 ** draw.randint(*(-2, 4) if dtype == torch.float16 else (-6, 36)),
    )


def search(config, dtype, draws):
    """Random heads, the same ones at every call."""
    dtype = DTYPES[dtype]
    return hold_all(config, dtype, [(seed, drawn(dtype, seed)) for seed in range(-(-draws // HEADS) * HEADS)])


def interpreter_rounds():
    """The interpreter's casts between float32 and bf16 give the bits that PyTorch's give."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, ulp = interpreter.InterpreterBuilder(), 2.0**-7
    special = [0.0, 1 + ulp / 2, 1 + ulp / 2 + 2.0**-23, 1 + ulp / 2 - 2.0**-23, 1 + 3 * ulp / 2, 2 - ulp / 4,
               3.4e38, math.inf, math.nan, 1e-38, 1e-40, 2.0**-134, 1e-45]  # fmt: skip
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.tensor(special), -torch.tensor(special), bits.int().view(torch.float32)])
    low = builder.create_fp_trunc(interpreter.TensorHandle(x.numpy(), tl.float32), tl.bfloat16)
    back = torch.from_numpy(builder.create_fp_ext(low, tl.float32).data)
    expected = x.bfloat16().float()
    assert torch.equal(back.isnan(), x.isnan())
    assert torch.equal(back[~x.isnan()].view(torch.int32), expected[~x.isnan()].view(torch.int32))
    assert low.data.dtype == np.uint16 and low.data.shape == tuple(x.shape)
    return f"{len(x)} numbers, NaN, inf and subnormals among them"


def bad_input(name):
    """Each of these must be refused, by its name, before anything is compiled."""
    q, k, v = make((2, 2, 16, 64))
    grad = q.clone().requires_grad_()
    error, argument, call = {
        "rank": (ValueError, "q", lambda: flash_attention(q[0], k, v)),
        "batch": (ValueError, "k", lambda: flash_attention(q, k[:1], v)),
        "heads": (ValueError, "v", lambda: flash_attention(q, k, v[:, :1])),
        "head dim": (ValueError, "k", lambda: flash_attention(q, k[..., :32], v)),
        "length of v": (ValueError, "v", lambda: flash_attention(q, k, v[:, :, :8])),
        "mixed dtype": (TypeError, "k", lambda: flash_attention(q, k.half(), v)),
        "dtype": (TypeError, "q", lambda: flash_attention(q.double(), k.double(), v.double())),
        "unsupported head dim": (ValueError, "q", lambda: flash_attention(*(x[..., :44] for x in (q, k, v)))),
        "device": (ValueError, "k", lambda: flash_attention(q, k.to("meta"), v)),
        "gqa": (ValueError, "k", lambda: flash_attention(q, k[:, :1], v[:, :1])),
        "is_causal": (TypeError, "is_causal", lambda: flash_attention(q, k, v, is_causal="yes")),
        "gradient of the report": (ValueError, "config", lambda: flash_attention(
            grad, k, v, config=configs.TILE128)),
        "not a tensor": (TypeError, "v", lambda: flash_attention(q, k, [1.0])),
        "scale": (ValueError, "scale", lambda: flash_attention(q, k, v, scale=float("nan"))),
        "config": (TypeError, "config", lambda: flash_attention(q, k, v, config="tile128")),
        "config for 16 bits": (ValueError, "config", lambda: flash_attention(
            q.float(), k.float(), v.float(), config=configs.HOPPER)),
        "lse of the report": (ValueError, "config", lambda: flash_attention(
            q, k, v, return_lse=True, config=configs.TILE128)),
        "cpu": (ValueError, "q", lambda: flash_attention(*(x.cpu() for x in (q, k, v)))),
    }[name]
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"} if name == "cpu" else {}), mock.patch.object(
        helion.Kernel, "bind", side_effect=AssertionError("it was compiled")
    ):
        try:
            call()
        except (TypeError, ValueError) as raised:
            assert type(raised) is error and str(raised).startswith(argument), repr(raised)
            return str(raised)
    raise AssertionError("nothing was raised")


def copied_files(where):
    """flash_attn.py and configs.py work where they are copied to, and import nothing else of ours: into a
    folder, into a package, beside a package and beside a module of others that is called configs, too."""
    module, folder = {"folder": ("flash_attn", "."), "package": ("app.ops.flash_attn", "app/ops"),
                      "beside a package": ("flash_attn", "."), "beside a module": ("lib.flash_attn", "lib")}[where]
    script = f"""
import os
import sys
import torch
{'' if GPU else inspect.getsource(patch_interpreter) + f'import {module}, helion; from unittest import mock; patch_interpreter()'}
from {module} import flash_attention
q, k, v = torch.randn(3, 1, 2, 100, 64, device={DEVICE!r}, dtype=torch.float16)
out, sdpa = flash_attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(out, sdpa, atol=2e-3, rtol=2e-3)
ours = [m for m in sys.modules.values() if os.path.dirname(str(getattr(m, "__file__", ""))) == {str(HERE)!r}]
assert not ours and "check" not in sys.modules and "bench" not in sys.modules, ours
if {where.startswith("beside")}:
    import configs
    assert configs.THEIRS
"""
    with tempfile.TemporaryDirectory() as root:
        Path(root, folder).mkdir(parents=True, exist_ok=True)
        for name in ("flash_attn.py", "configs.py"):
            shutil.copy(HERE / name, Path(root, folder))
        if where == "package":
            Path(root, "app/ops/use.py").write_text("from .flash_attn import flash_attention")
            script += "import app.ops.use\n"
        if where == "beside a package":
            Path(root, "configs").mkdir()
            Path(root, "configs/__init__.py").write_text("THEIRS = True")
        if where == "beside a module":
            Path(root, "configs.py").write_text("THEIRS = True")
        Path(root, "caller.py").write_text(script)
        child = subprocess.run([sys.executable, "caller.py"], cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr.strip()[-500:]
    return "runs there"


def report_arithmetic(config):
    """The printed speedups and TFLOPS follow from the printed times, and so is what `flops` counts."""
    for shape, ms, torch_ms, speedup, tflops in PUBLISHED[config]:
        # Two of its printed speedups are cut, not rounded (26.7%: 0.6689 as 0.67 is not), so a
        # whole unit of the last digit is allowed; for the TFLOPS the rounding of 0.1 is.
        assert abs(torch_ms / ms - speedup) < 0.01, (shape, torch_ms / ms, speedup)
        assert abs(flops(shape) / ms / 1e9 - tflops) <= 0.1, (shape, flops(shape) / ms / 1e9, tflops)
    return f"{len(PUBLISHED[config])} rows"


# What the README says of the machine code: the tensor-core instruction, and how many bytes per thread
# the config spills, at least and at most. hopper keeps a few addresses there, but no data.
CLAIMS = {
    ("autotuned", 90): ("mma", 0, math.inf), ("autotuned", 100): ("mma", 0, math.inf),
    ("tma_persistent", 90): ("mma", 0, math.inf), ("tma_persistent", 100): ("mma", 0, math.inf),
    ("tile128", 90): ("wgmma", 1, math.inf), ("tile128", 100): ("tcgen05", 1, math.inf),
    ("hopper", 90): ("wgmma", 0, 32), ("general", 90): ("wgmma", 0, 0),
}  # fmt: skip


def cross_compile(config, sm):
    code = compile_in_child([(NAMED[config], sm, 128, "bfloat16")])[0]
    assert "error" not in code, code["error"]
    instruction, least, most = CLAIMS[config, sm]
    assert code["instruction"].startswith(instruction + " "), code
    assert least <= code["spilled"] <= most, code
    return f"{code['instruction']}, {code['registers']} registers, {code['spilled']} B spilled"


def hopper_variants(head_dim):
    """hopper_kernel is specialised, 12 warps, and spills no data, masked or not, online or not."""
    variants = [(masked, online) for masked in (False, True) for online in (False, True)]
    jobs = [(configs.HOPPER, 90, head_dim, "float16" if online else "bfloat16", masked, online)
            for masked, online in variants]  # fmt: skip
    for variant, code in zip(variants, compile_in_child(jobs)):
        assert "error" not in code, (variant, code["error"])
        assert code["threads"] == 384 and code["spilled"] <= 32 and code["ctas"] >= 1, (variant, code)
    return f"{len(variants)} variants, 384 threads each"


def default_config(sm):
    """What flash_attention takes when no config is named fits, for each head dim, and spills no data:
    at most 128 bytes per thread, which are addresses. So do the kernels of the gradient."""
    capability = divmod(sm, 10)
    jobs = [(configs.best(capability, dim, torch.bfloat16, 4096), sm, dim, "bfloat16") for dim in HEAD_DIMS]
    for dim in (128, 256):
        jobs += [(plan, sm, dim, "bfloat16") for plan in configs.best_gradient(capability, dim, torch.bfloat16)]
    for (plan, _, dim, _), code in zip(jobs, compile_in_child(jobs)):
        assert "error" not in code, (plan.kernel, dim, code["error"])
        assert code["ctas"] >= 1 and code["spilled"] <= 128 and code["instruction"] != "none", (plan.kernel, dim, code)
    return f"{len(jobs)} kernels fit, none spills data"


def needs(cute, sm_100=False):
    if cute and importlib.util.find_spec("cutlass") is None:
        raise Skipped("needs helion[cute]")
    if sm_100 and torch.cuda.get_device_capability()[0] != 10:
        raise Skipped("needs a GPU of compute capability 10.x, or none")


def blackwell(dim, dtype):
    """blackwell_kernel and its lse; without a GPU as Triton code, which scales q in q's dtype."""
    needs(GPU, GPU)
    for length, heads, is_causal in ((256, 4, False), (384, 1, True)):
        q, k, v = make((1, 4, length, dim), dtype, heads=heads)
        with mock.patch.object(flash_attn, "_prepare", side_effect=AssertionError("it was not blackwell_kernel")):
            attend = functools.partial(flash_attention, q, k, v, is_causal=is_causal, enable_gqa=True)
            out, (again, lse) = attend(config=NAMED["blackwell"]), attend(config=NAMED["blackwell"], return_lse=True)
        line = compare(out, q, k, v, is_causal=is_causal)
        compare_lse(lse, q, k, is_causal, 2e-2)
        assert torch.equal(again, out)
    return line


def blackwell_leaves():
    """What blackwell_kernel does not take, general_kernel computes."""
    needs(False, GPU)
    q, k, v = make((1, 2, 256, 64))
    apart = torch.cat([q, q], -1)[..., :64]
    cases = [((q[:, :, :129], k, v), {}), ((q, k[:, :, :128], v[:, :, :128]), {}), ((q, k, v), {"scale": 0.1}),
             ((apart, k, v), {}), (make((1, 2, 256, 64), "float32"), {}), (make((1, 2, 128, 32)), {})]  # fmt: skip
    with mock.patch.object(flash_attn, "_blackwell", side_effect=AssertionError("it was taken")):
        lines = [compare(flash_attention(*qkv, **options, config=NAMED["blackwell"]), *qkv, **options)
                 for qkv, options in cases]  # fmt: skip
    return lines[-1]


def blackwell_compiles(dim, is_causal):
    """With and without GQA and lse, and where 256 does not divide the length, Helion's cute backend
    recognises blackwell_kernel, and its machine code for sm_100a spills no data: 16 bytes are addresses."""
    needs(True)
    cases = [("bfloat16", is_causal), ("bfloat16", is_causal, 4, True), ("float16", is_causal, 1, True),
             ("bfloat16", is_causal, 4, False, 384)]  # fmt: skip
    codes = compile_in_child([(NAMED["blackwell"], 100, dim, *case) for case in cases])
    for case, code in zip(cases, codes):
        assert "error" not in code, (case, code["error"])
        assert code["instruction"].startswith("tcgen05 ") and code["spilled"] <= 16 and code["ctas"] >= 1, (case, code)
    return f"{len(cases)} cases, the first one: {codes[0]}"


def blackwell_refuses(what):
    """What the backend does not recognise, or not know, is an error instead of a slow kernel."""
    needs(True)
    change = {"misspelt": {"cute_flash_pipeline_family": "fa5"}, "order": {"l2_groupings": [4]}}.get(what, {})
    plan = NAMED["blackwell"]
    plan = dataclasses.replace(plan, config=helion.Config(**{**plan.config.config, **change}))
    code = compile_in_child([(plan, 100, 32 if what == "head dim" else 128, "bfloat16")])[0]
    expected = "pipeline_family must be one of" if what == "misspelt" else "did not recognise blackwell_kernel"
    assert expected in code.get("error", ""), code
    return code["error"]


def cases(draws):
    """[(function, arguments)], grouped so that one worker process compiles a group's kernel once.
    draws: how many random heads `search` tries for each config and dtype."""
    shared = (strided, large_logits, rising_scores, low_scores, huge_values, given_scale, identical_keys,
              not_finite, same_bits, every_element_written)  # fmt: skip
    # The slow ones first, so that no worker is left alone with them. sm_86 has the instructions of
    # sm_80 and the shared memory of sm_89.
    for sm in (80, 89, 90, 100, 120):
        yield [(default_config, (sm,))]
    for key in CLAIMS:
        yield [(cross_compile, key)]
    yield [(hopper_variants, (dim,)) for dim in (64, 128)]
    for dim in (64, 128):
        for is_causal in (False, True):
            yield [(blackwell_compiles, (dim, is_causal))]
        for dtype in ("bfloat16", "float16"):
            yield [(blackwell, (dim, dtype))]
    yield [(blackwell_refuses, (what,)) for what in ("misspelt", "order", "head dim")]
    yield [(blackwell_leaves, ())]
    for name, dtypes in (("hopper", ("bfloat16", "float16")), ("default", DTYPES)):
        for dtype in dtypes:
            # float32 does not round p, and only hopper has edges.
            skip = {"float32": ["cancelling"]}.get(dtype, []) + ["edges"] * (name == "default")
            kinds = [kind for kind in HARD if kind not in skip]
            searches = [(search, (name, dtype, draws))] * (draws > 0)
            yield [(hard_rows, (name, kind, dtype)) for kind in kinds] + searches
            yield [(hard_rows, (name, "many_keys", dtype))]
    # Without a GPU "default" is general_kernel, too.
    for name in NAMED.keys() - ({"blackwell"} if GPU else {"blackwell", "general"}):
        yield [(case, (name,)) for case in shared]
        # hopper takes no float32 and no D = 256
        dims = (16, 64, 128) if name == "hopper" else (16, 64, 128, 256)
        for dtype in ("bfloat16", "float16"):
            yield [(random_input, (name, (1, 2, 129, dim), dtype, 300)) for dim in dims]
        yield [(random_input, (name, (1, 2, 64, dim), "float32", 150)) for dim in (16, 64, 128) if name != "hopper"]
        yield [(random_input, (name, (2, 1, n, D))) for n in (1, 17, 128, 129, 300)]
        yield [(random_input, (name, (1, 3, 300, D), "bfloat16", keys)) for keys in (1, 129, 520)]
    yield [(random_input, ("default", (1, 2, 100, dim), dtype)) for dim in (32, 256) for dtype in DTYPES]
    for name in ("hopper", "general", "default") if GPU else ("hopper", "default"):
        for dtype in DTYPES if name == "default" else ("bfloat16", "float16"):
            yield [(causal, (name, kind, dtype)) for kind in CAUSAL]
            yield [(head_dims, (name, dtype)), (split_keys, (name, dtype))]
            yield [(unseen, (name, dtype, with_lse)) for with_lse in (False, True)]
        yield [(lengths, (name,)), (empty, (name,)), (one_tensor, (name,))]
        yield [(another_call, (name,))]
        if GPU:
            yield [(large_tensor, (name,))]
    yield [(bad_input, (name,)) for name in (
        "rank", "batch", "heads", "head dim", "length of v", "mixed dtype", "dtype", "unsupported head dim",
        "device", "gqa", "is_causal", "gradient of the report", "not a tensor", "scale", "config",
        "config for 16 bits", "lse of the report", "cpu")]  # fmt: skip
    if not GPU:
        yield [(interpreter_rounds, ())]
    for where in ("folder", "package", "beside a package", "beside a module"):
        yield [(copied_files, (where,))]
    yield [(operator, (name,)) for name in ("opcheck", "compile", "export", "autocast", "vmap")]
    yield [(decoder, (dtype,)) for dtype in DTYPES]
    for kind in ("dense", *CAUSAL):
        for dtype in DTYPES:
            yield [(gradients, ("default", kind, dtype))]
        yield [(gradients, ("hopper", kind, "bfloat16"))]
    for dtype in DTYPES:
        yield [(hard_gradients, ("default", dtype))]
    yield [(hard_gradients, ("hopper", "bfloat16"))]
    yield [(autograd, (name,)) for name in (
        "gradcheck", "only what is asked for", "forward mode", "second derivative", "same bits", "compile")]  # fmt: skip
    yield [(training, ())]
    yield [(transformers_model, ())]
    yield [(report_arithmetic, (name,)) for name in PUBLISHED]
    if GPU:
        yield [(threads, ())]
        yield [(capture, ())]
        for name in PUBLISHED:
            yield [(report_shape, (name, row[0])) for row in PUBLISHED[name]]
        yield [(report_shape, ("hopper", row[0])) for row in PUBLISHED["tile128"]]


def label(case):
    function, arguments = case
    return " ".join([function.__name__, *(str(a).replace(" ", "") for a in arguments)])


def run(group):
    """[(label, "ok", "skip" or "FAIL", text)] of one group, in a worker process."""
    results = []
    for function, arguments in group:
        try:
            outcome, text = "ok", function(*arguments)
        except Skipped as reason:
            outcome, text = "skip", str(reason)
        except Exception as error:
            outcome = "FAIL"
            text = f"{type(error).__name__}: {str(error).strip()[:600] or traceback.format_exc(limit=-1)}"
        results.append((label((function, arguments)), outcome, text))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="REGEX", default="", help="run only the cases in whose name it is found")
    parser.add_argument("--search", metavar="N", type=int, default=64, help="random heads per config and dtype")
    parser.add_argument("--compile", metavar="JSON", help=argparse.SUPPRESS)  # see compile_in_child
    args = parser.parse_args()
    if args.compile:
        for (*plan, config), *rest in json.loads(args.compile):
            config = helion.Config.from_json(config)
            try:
                code = machine_code(configs.Plan(*plan, config) if plan else config, *rest)
            except Exception as error:
                code = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            print("CODE", json.dumps(code), flush=True)
        return 0
    print(f"on {torch.cuda.get_device_name() if GPU else 'the CPU, through Triton`s interpreter'}, "
          f"torch {torch.__version__}, helion {importlib.metadata.version('helion')}", flush=True)  # fmt: skip
    groups = [[case for case in group if re.search(args.k, label(case))] for group in cases(args.search)]
    count = dict.fromkeys(("ok", "FAIL", "skip"), 0)
    workers = min(16, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        jobs = [pool.submit(run, group) for group in groups if group]
        for job in concurrent.futures.as_completed(jobs):
            for name, outcome, text in job.result():
                count[outcome] += 1
                print(f"{outcome:4s} {name}: {text}", flush=True)
    if not any(count.values()):
        print(f"{args.k!r} is in no case's name")
    skipped = f", {count['skip']} skipped" if count["skip"] else ""
    print(f"{count['ok']} passed, {count['FAIL']} failed{skipped}")
    return 1 if count["FAIL"] or not count["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())

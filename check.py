"""Is the kernel right? Run it against PyTorch's SDPA and print every error beside its bound.

    python check.py             # everything; the last line is `N passed, N failed`, and `, N skipped` if any
    python check.py -k hopper   # only the cases with "hopper" in their name
    python check.py -k search --search 5000   # look for rows that miss the bound, at random

On a GPU this runs the real kernels. Without one it executes the Triton code that Helion generates, tiles,
masks and program order, in Triton's interpreter, and compiles it for GPUs that are not here.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
import unittest
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
import triton
from flash_attn import LOG2E, configs, flash_attention
from torch.nn.attention.bias import CausalVariant

DEVICE = "cuda" if GPU else "cpu"
HEAD_DIMS = (16, 32, 64, 128, 256)  # others are filled up, or hopper_kernel reads them as two of them
D = 128 if GPU else 64  # head dim of most cases; the interpreter is slow
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in flash_attn.DTYPES}
NAMED = {**configs.CONFIGS, "hopper": configs.HOPPER, "hopper_64": configs.HOPPER_64, "hopper_256": configs.HOPPER_256,
         "hopper_96": configs.HOPPER, "hopper_192": configs.HOPPER_256,  # their cases have such head dims
         "general": configs.HOPPER_GENERAL, "blackwell": configs.BLACKWELL_CUTE, "default": None}  # fmt: skip
CAUSAL = {"dense": False, "upper_left": True, "lower_right": CausalVariant.LOWER_RIGHT}
SPAWN = multiprocessing.get_context("spawn")
raises = unittest.TestCase().assertRaisesRegex


class Skipped(Exception):
    """A case that cannot run here, and why."""


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


# ---- What flash_attn.py keeps to itself and is used here ------------------------------------------


def forget():
    """The next call is as the first one of a process."""
    flash_attn._bind.cache_clear()
    flash_attn._compiled.clear()
    flash_attn._calls.clear()


def compiled():
    return set(flash_attn._compiled)


def launches(config, q, k, v, is_causal):
    """Call what flash_attention calls with fake tensors; "gradient" for config is also its gradient."""
    grouped = k.size(1) < q.size(1)
    if config == "gradient":
        _, lse = flash_attn._eager(q, k, v, is_causal, None, grouped, None, True)
        flash_attn._gradients(q, k, v, q, lse, q, None, is_causal, None, True, True)
    else:
        flash_attn._eager(q, k, v, is_causal, None, grouped, config, False)


def opcheck(q, k, v):
    """torch.library's own checks of the operator behind flash_attention."""
    torch.library.opcheck(flash_attn._operator, (q, k, v, 1, None, True, True))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = flash_attention(q, k, v, is_causal=True, enable_gqa=True, return_lse=True)
    for kept in (flash_attn.KEPT, 1):  # in one part and in several
        forget()
        with mock.patch.object(flash_attn, "KEPT", kept):
            torch.library.opcheck(flash_attn._backward_operator, (q, k, v, out, lse, q, None, 1, None), test_utils="test_faketensor")
    forget()


# ---- Without a GPU: execute and compile ----------------------------------------------------------


def patch_interpreter():
    """Close the gaps of Triton's interpreter that stand between it and our kernels, and make it faster."""
    import dataclasses
    import helion.runtime
    import numpy as np
    import triton.language as tl
    from helion.autotuner.config_spec import ConfigSpec
    from helion.runtime.triton import helpers
    from torch._inductor.runtime.triton_compat import libdevice
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    libdevice.exp2, libdevice.exp = lambda x: tl.exp2(x), lambda x: tl.exp(x)  # it has no libdevice
    helion._compat._supports_tensor_descriptor = lambda: True  # but TMA it executes, and helion
    supports = ConfigSpec.supports_config_key  # only has to be told
    ConfigSpec.supports_config_key = lambda self, key: key == "host_tensor_descriptors" or supports(self, key)
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

    to_bf16 = lambda x: interpreter.TensorHandle(convert_float(x, tl.float32, tl.bfloat16, None), tl.bfloat16)

    def widened(x):  # it keeps bf16 as uint16, and would multiply these integers
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def assembly(self, asm, constraints, values, *rest):
        """It has none, and flash_attn.py three pieces: a rounding, a load, and one on barriers that are not here."""
        (x, *_), kinds = values, ("cvt.rn.bf16x2.f32", "ld.global.f32", "mbarrier.inval")
        (kind,) = (kind for kind in kinds if kind in asm)
        if kind == "cvt.rn.bf16x2.f32":
            x = widened(to_bf16(x.data))
        elif kind == "ld.global.f32":
            x = self.create_load(interpreter.TensorHandle(x.data.astype(np.uint64), tl.pointer_type(tl.float32)), "", "", False)
        return mock.Mock(get_result=lambda i: x)

    def multiply(self, a, b):  # only blackwell_kernel does it outside of a product
        product = create_fmul(self, widened(a), widened(b))
        return to_bf16(product.data) if a.dtype.scalar == tl.bfloat16 else product

    def reduce_fast(self, input):  # it would call helion's max element by element
        fast = self.combine_fn == helpers._maximum_propagate_nan
        return self.min_max(input[0], np.max) if fast else reduce(self, input)

    def patch_index(tensor, scope):  # triton 3.6 with numpy 2.4: int() of a 1-element array
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def call_inner(self, *args, **options):  # it would patch triton.language again at every call
        if tl.core.is_builtin(tl.core.full):
            interpreter._patch_lang(tl.zeros.fn)
        return self.rewrite()(*args, **options)

    interpreter._convert_float = convert_float
    create_fmul, create_dot, reduce = builder.create_fmul, builder.create_dot, interpreter.ReduceOps.apply_impl
    builder.create_fmul, builder.create_inline_asm = multiply, assembly
    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    builder.get_bf16 = lambda self, value: to_bf16(np.float32([value]))
    interpreter.ReduceOps.apply_impl = reduce_fast
    patch_tensor, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_index
    interpreter.InterpretedFunction.__call__ = call_inner
    # A GPU does not look for overflows of integers, either.
    instance = interpreter.interpreter_builder
    instance.options = dataclasses.replace(instance.options, sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_interpreter()

# SMs of the largest part, and KiB of shared memory per SM (CUDA C++ Programming Guide).
CHIPS = {80: (108, 164), 86: (84, 100), 89: (128, 100), 90: (132, 228), 100: (148, 228), 120: (188, 100)}
LAUNCHED = []  # (kernel, grid, arguments, options) of what was launched for a GPU that is not here


def record(kernel, grid, *args, **options):
    LAUNCHED.append((kernel, grid, args, options))


@contextlib.contextmanager
def pretend(sm):
    """Inside, torch and helion believe that a GPU of compute capability sm / 10 is present, tensors are
    fake, and a launch is recorded."""
    from helion._compiler.compile_environment import CompileEnvironment
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sms, kib = CHIPS[sm]
    capability = divmod(sm, 10)
    common = dict(multi_processor_count=sms, major=capability[0], warp_size=32, regs_per_multiprocessor=65536,
                  max_threads_per_multi_processor=2048)  # fmt: skip
    device = mock.Mock(
        minor=capability[1], gcnArchName="", total_memory=80 << 30, L2_cache_size=50 << 20,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=(kib - 1) << 10,
        shared_memory_per_multiprocessor=kib << 10, **common,
    )  # fmt: skip
    device.name = f"sm_{sm}"
    properties = DeviceProperties(type="cuda", index=0, cc=sm, **common)
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
            "torch.cuda.device_of": lambda x: contextlib.nullcontext(),
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.cuda.get_device_capability": lambda device=None: capability,
            "torch.cuda.get_device_properties": lambda index=None: device,
            "torch.version.cuda": "13.0",
            "helion.runtime.default_launcher": record,
            "helion.runtime.default_cute_launcher": record,
        }.items():
            stack.enter_context(mock.patch(target, value))
        for owner, name, value in (
            (DeviceProperties, "create", lambda device: properties),
            (CompileEnvironment, "tensor_descriptor_base_is_aligned", lambda self, tensor: True),
            (CompileEnvironment, "_to_fake_tensor", to_symbolic),
            (FakeTensor, "data_ptr", lambda self: 16),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        yield


def resources(cubin, sm, threads, shared):
    """What the file cubin takes for a CTA of so many threads and bytes of shared memory. Returns a dict:
    these two, registers per thread, spilled bytes per thread, CTAs that fit on an SM (0: it does not),
    and the tensor-core instruction in the machine code with its count, or "none".
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = run(tools / "cuobjdump", "-res-usage", cubin)
    sass = run(tools / "nvdisasm", "-c", cubin)
    registers, spilled = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("UTCHMMA", "HGMMA", "HMMA")}
    names = {"UTCHMMA": "tcgen05", "HGMMA": "wgmma", "HMMA": "mma"}
    ctas = min(65536 // (registers * threads), (CHIPS[sm][1] << 10) // (shared + 1024), 2048 // threads)
    instruction = next((f"{names[op]} ({n} {op})" for op, n in counts.items() if n), "none")
    return dict(threads=threads, registers=registers, spilled=spilled, shared=shared, ctas=ctas, instruction=instruction)


def cute_code(sm, kernel, grid, args, options):
    """resources of what Helion's cute backend launched, by the compiler in cutlass-dsl."""
    import cutlass.cute
    from cuda.bindings.driver import CUstream
    from helion.runtime.cute import launcher

    block = (*options["block"], 1, 1)[:3]
    with pretend(sm):
        entry = launcher._build_cute_schema_and_args(kernel, args, (*grid, 1, 1)[:3])
        wrapper = launcher._create_cute_wrapper(kernel, entry.schema, block, num_sm=CHIPS[sm][0])
    with tempfile.TemporaryDirectory() as folder:
        options = f"--enable-tvm-ffi --keep-cubin --dump-dir={folder}"
        host = str(cutlass.cute.compile(wrapper, *entry.launch_args, CUstream(0), options=options).ir_module)
        # The launch's dynamic shared memory: the i64 among the fields of cudaLaunchConfig_t.
        field = re.search(r"\[0, 2\] : .*struct<\(array<3 x i32>, array<3 x i32>, i64, .*\n.*store (%\w+), ", host)
        shared = re.findall(rf"{field[1]} = llvm.mlir.constant\((\d+) : i64\)", host[: field.start()])[-1]
        return resources(next(Path(folder).glob("*.cubin")), sm, math.prod(block), int(shared))


def invalidated(ptx):
    """Whether `fresh` of flash_attn.py does what it says: the mbarriers in the first 16 bytes of shared memory are
    made invalid, nothing else is done with them, and no others are under the first tile."""
    if not all(f"mbarrier.inval.shared::cta.b64 [global_smem{at}];" in ptx for at in ("", "+8")):
        return False
    sums = {m[1]: (m[2], m[3]) for m in re.finditer(r"add\.s32\s+(%r\d+), (%r\d+), (%?\w+);", ptx)}
    begin = set(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx))
    place = lambda register: sums.get(register, (register, "0"))

    def first_16(register):
        """Whether an address may be there: it is not, where something from 16 on is added to the beginning."""
        x, y = place(register)
        if x in sums:  # base, and perhaps 8 times a stage
            return first_16(x) if not y.isdigit() or int(y) < 16 else False
        return x in begin and (not y.isdigit() or int(y) < 16)

    places = map(place, re.findall(r"mbarrier\.init[\w.:]+\s+\[(%r\d+)\]", ptx))
    under = {y for x, y in places if x in begin and y.isdigit() and int(y) < 1024}  # a tile has at least as much
    used = re.findall(r"mbarrier\.(?!init|inval)[\w.:]+\s+[^;]*\[(%r\d+)\]", ptx)
    return len(used) > 0 and under == {"0", "8"} and not any(map(first_16, used))


def triton_code(sm, kernel, grid, args, options):
    """resources of what was launched, by Triton's compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    shorts = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    signature, constexprs, attributes = {}, {}, {}
    for i, (param, arg) in enumerate(zip(kernel.params, args)):
        specialized = isinstance(arg, int) and not param.do_not_specialize
        if param.is_constexpr or specialized and arg == 1:
            signature[param.name], constexprs[param.name] = "constexpr", arg
        elif isinstance(arg, TensorDescriptor):
            block = str(list(arg.block_shape)).replace(" ", "")
            signature[param.name] = f"tensordesc<{shorts[arg.base.dtype]}{block}>"
        else:
            name = shorts.get(getattr(arg, "dtype", None))
            signature[param.name] = f"*{name}" if name else "fp32" if isinstance(arg, float) else "i32"
            if name or specialized and arg % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    tmem = getattr(compiled.metadata, "tmem_size", None) or 0
    if tmem > 512:  # the code is empty, and a launch would raise OutOfResources
        raise RuntimeError(f"needs {tmem} columns of tensor memory, an SM has 512")
    if compiled.metadata.num_warps == 12 and not invalidated(compiled.asm["ptx"]):  # specialised
        raise RuntimeError("barriers in the first 16 bytes of shared memory are used, or not made invalid")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        # with the loading warps
        return resources(cubin, sm, 32 * compiled.metadata.num_warps, compiled.metadata.shared)


def machine_code(config, sm, head_dim=128, dtype="bfloat16", is_causal=False, group=1, length=4096, keys=None):
    """Compile what flash_attention launches on compute capability sm / 10, without such a GPU.

    config: as flash_attention takes it, or "gradient". group: how many heads of q share one of k.
    Returns the dict of `resources` of the first kernel, and as "then" those of the others.
    Triton must not be in interpreter mode: see compile_in_child.
    """
    os.environ["CUTE_DSL_ARCH"] = f"sm_{sm}a"
    cute = isinstance(config, configs.Plan) and config.kernel == "blackwell"
    forget()
    LAUNCHED.clear()
    with pretend(sm):
        B, H = (1, 16) if config == "gradient" else (16, 64)
        shapes = (H, length), (H // group, keys or length), (H // group, keys or length)
        launches(config, *(torch.empty(B, *shape, head_dim, dtype=DTYPES[dtype], device="cuda")
                           for shape in shapes), is_causal)  # fmt: skip
    first, *others = [(cute_code if cute else triton_code)(sm, *launch) for launch in LAUNCHED]
    return {**first, "then": others}


def compile_in_child(jobs):
    """machine_code of each of the jobs, its arguments, in a process that has the interpreter off.
    Returns a list of dicts; {"error": reason} where the compiler refused."""
    reason = lambda error: (str(error).strip().splitlines() or ["no message"])[0][:200]
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"), concurrent.futures.ProcessPoolExecutor(1, SPAWN) as pool:
        futures = [pool.submit(machine_code, *job) for job in jobs]
        return [{"error": f"{type(error).__name__}: {reason(error)}"} if (error := future.exception())
                else future.result() for future in futures]  # fmt: skip


# ---- Definition and bounds -------------------------------------------------------------------------


def seen(q, k, is_causal):
    """Which keys a row sees, [M, N]: is_causal as flash_attention takes it, False for all."""
    M, N = q.size(2), k.size(2)
    diagonal = N if is_causal is False else N - M if is_causal is CausalVariant.LOWER_RIGHT else 0
    return torch.ones(M, N, dtype=torch.bool, device=q.device).tril(diagonal)


def definition(q, k, v, is_causal=False, scale=None):
    """Attention by its definition, and lse. A row that sees nothing is 0, has lse -inf and no gradient."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = q @ k.mT * (q.size(3) ** -0.5 if scale is None else scale)
    if is_causal is False:
        return scores.softmax(-1) @ v, scores.logsumexp(-1)
    mask = seen(q, k, is_causal)
    some = mask.any(-1)
    scores = scores.masked_fill(~mask, -math.inf).where(some[:, None], 0.0)
    return scores.softmax(-1).where(some[:, None], 0.0) @ v, scores.logsumexp(-1).where(some, -math.inf)


def compare(out, q, k, v, scale=None, unit=1.0, least=0.0, is_causal=False, lse=None, atol=2e-5, ref=None):
    """Hold out to flash-attention's own bound (its tests/test_flash_attn.py): at most twice the
    error of PyTorch's SDPA in the same dtype against a float64 reference, plus rounding.
    Rows with NaN or inf must be the rows that have it in SDPA's math backend. (The fast backends
    lose some: the CPU's turns a NaN of inf - inf into a number.)
    unit: the size of the results, where it is not about 1. least: what SDPA's error counts at least.
    lse: held to atol where it is given, since an error of it is a relative one of every p. ref: if known."""
    what = f"at q {tuple(q.shape)}, k {tuple(k.shape)}, is_causal {is_causal}, scale {scale}"
    assert out.shape == q.shape and out.dtype == q.dtype, (out.shape, out.dtype, what)
    mask = None if is_causal is False else seen(q, k, is_causal)
    sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, mask, scale=scale, enable_gqa=True)
    other = sdpa()
    if ref is None or lse is not None:
        ref, lse_ref = definition(q.double(), k.double(), v.double(), is_causal, scale)
    if lse is not None:
        assert lse.shape == q.shape[:3] and lse.dtype == torch.float32, (lse.shape, lse.dtype, what)
        torch.testing.assert_close(lse.double(), lse_ref, atol=atol, rtol=2e-6, msg=lambda m: f"lse: {m} {what}")
    finite = ref.isfinite().all(-1)
    if not (finite.all() and other.isfinite().all()):
        with sdpa_kernel(SDPBackend.MATH):
            plain = sdpa()
        assert torch.equal(plain.isfinite().all(-1), finite), "SDPA's math backend has other rows"
        if not other[finite].isfinite().all():  # cuDNN gives NaN where the scale is not positive
            other = plain
    assert torch.equal(out.isfinite().all(-1), finite), f"not finite in other rows than SDPA {what}"
    ref = ref[finite]
    low = ref.to(q.dtype)
    rounding = (low + 0.3 * unit - 0.3 * unit - low).abs().max().item()
    bound = 2 * max((other[finite] - ref).abs().max().item(), least) + 2 * rounding
    error = (out[finite] - ref).abs().max().item()
    assert error <= bound, f"error {error:.2e} > bound {bound:.2e} {what}"
    return f"error {error:.2e} <= bound {bound:.2e}"


def compare_gradients(qkv, options, with_lse=False, scale=None):
    """dq, dk and dv of random gradients of out, and of lse, by the bound that `compare` has for out.

    SDPA's error may be small by luck: where one key has most of p, one sum of ds in 16 bits is the largest
    error of dk, and two kernels that round alike differ by any factor. So its error counts at least as
    two standard deviations of what the rounding of p, ds and out moves: the root of the sum of squares.
    """
    is_causal, dtype = options.get("is_causal", False), qkv[0].dtype
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.randn(qkv[0].shape, generator=generator, device=DEVICE).to(dtype)
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
        return out, definition(q.float(), k.float(), v.float(), is_causal, scale)[1]

    ref = gradients(functools.partial(definition, is_causal=is_causal, scale=scale), torch.float64)
    q, k, v = (x.double().repeat_interleave(qkv[0].size(1) // x.size(1), 1) for x in qkv)
    out, lse = definition(q, k, v, is_causal, scale)
    do, lse, s = weights.double(), lse.where(lse > -math.inf, 0.0), q.size(3) ** -0.5 if scale is None else scale
    p = torch.where(seen(q, k, is_causal), (q @ k.mT * s - lse[..., None]).exp(), 0.0)
    dp, s, rounding = do @ v.mT, abs(s), lambda x: x.to(dtype) - x
    of_p, of_ds = rounding(p), rounding(p * (dp - (out * do).sum(-1, keepdim=True) + of_lse[..., None]))
    of_delta = (rounding(out) * do).sum(-1, keepdim=True)
    summed = lambda x: x.unflatten(1, (qkv[1].size(1), -1)).sum(2)  # over a group of heads
    noise = {"q": s * (of_ds**2 @ k**2 + (of_delta * (p @ k)) ** 2).sqrt(),
             "k": s * summed((of_ds**2 + (of_delta * p) ** 2).mT @ q**2).sqrt(),
             "v": summed((of_p**2).mT @ do**2).sqrt()}  # fmt: skip
    # ds is p times the difference of two sums, which may be 0: what the float32 rounding of these moves.
    sums = p * (dp.abs() + (p * dp.abs()).sum(-1, keepdim=True)) * s
    cancelling = {"q": (sums @ k.abs()).max(), "k": (sums.mT @ q.abs()).max(), "v": torch.zeros(())}
    lines = []
    for name, x, other, y in zip("qkv", gradients(ours, dtype), gradients(sdpa, dtype), ref):
        # p is exp(score - lse), and both are rounded to float32.
        exact = 2.0**-22 * ((2 + lse.abs().max().item()) * y.abs().max().item() + cancelling[name].item())
        # In float32 p from lse alone is less exact than SDPA's, from the maximum and the sum.
        factor = 4 if dtype == torch.float32 else 2
        least = 0.0 if dtype == torch.float32 else 2 * noise[name].max().item()
        bound = factor * max((other.nan_to_num() - y).abs().max().item(), least) + 2 * rounding(y).abs().max().item() + 2 * exact
        error = (x - y).abs().max().item()
        assert error <= bound, f"d{name}: error {error:.2e} > bound {bound:.2e} at {[tuple(x.shape) for x in qkv]}"
        lines.append(f"d{name} {error:.1e} <= {bound:.1e}")
    return ", ".join(lines)


def make(shape, dtype="bfloat16", keys=None, heads=None, seed=0):
    """Random normal q: [B, H, S, D] and k, v: [B, heads, keys, D]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    B, H, S, D = shape
    return [
        torch.randn(B, h, n, D, generator=generator, device=DEVICE).to(DTYPES[dtype])
        for h, n in ((H, S), (heads or H, keys or S), (heads or H, keys or S))
    ]


def bshd(x):
    """The same numbers, in memory as [B, S, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# ---- The forward -----------------------------------------------------------------------------------
# Each case is a function that raises where the kernel is wrong, and returns the line to print.

def bound(call, *args, **options):
    """The names of the kernels that helion compiles for a call, and what it returns."""
    with mock.patch.object(helion.Kernel, "bind", autospec=True, side_effect=helion.Kernel.bind) as bind:
        found = call(*args, **options)
    return {call.args[0].name for call in bind.call_args_list}, found


# [B, H, M, D], N, heads of k. Groups of 1, 2 and 8 heads; one query; rows that see nothing.
MASKED = [((1, 2, 128, D), 256, 2), ((1, 2, 450, D), 450, 1), ((1, 8, 129, D), 520, 1), ((1, 2, 300, D), 140, 2),
          ((1, 4, 1, D), 400, 2), ((1, 2, 384, D), 128, 2), ((1, 2, 2, D), 129, 2)]  # fmt: skip
SHAPES = {
    "lengths": [*(((2, 1, n, D), n, 1) for n in (1, 17, 128, 129, 300)), *(((1, 3, 300, D), n, 3) for n in (1, 129, 520))],
    **{f"D={d}": [((1, 2, 129, d), 300, 2)] for d in HEAD_DIMS}, "upper_left": MASKED, "lower_right": MASKED,
}  # fmt: skip


def dim_of(config):
    """The head dim of its cases."""
    return int(config.removeprefix("hopper_")) if config.startswith("hopper_") else D


def attention(config, kind, dtype):
    """Shapes of a kind, by a config. With and without lse, where that is another kernel."""
    is_causal, shapes = CAUSAL.get(kind, False), SHAPES[kind]
    if config.startswith("hopper_"):  # every second one: they are what hopper's are, and larger
        half = slice(config == "hopper_64", None, 2)  # which has two tiles of 300 and 450 queries
        shapes = [((*shape[:3], dim_of(config)), keys, heads) for shape, keys, heads in shapes[half]]
    config = NAMED[config]
    options = dict(is_causal=is_causal, config=config)
    for shape, keys, heads in shapes:
        q, k, v = make(shape, dtype, keys, heads)
        attend = functools.partial(flash_attention, q, k, v, enable_gqa=heads < shape[1], **options)
        try:
            out = attend()
        except Exception as error:  # a named config need not take every head dim
            if config is not None and type(error).__name__ == "OutOfResources":
                raise Skipped(f"does not fit this GPU: {error}") from None
            if config is configs.TILE128 and shape[3] != 128 and "PassManager" in str(error):
                raise Skipped("Triton before 3.9 does not compile it for this head dim on sm_90") from None
            raise
        line = compare(out, q, k, v, is_causal=is_causal)
        if is_causal is True and dtype != "float32":
            expected = v[:, :, :1].repeat_interleave(shape[1] // heads, 1)
            assert torch.equal(out[:, :, :1], expected), "a row of one key is not its v"
        if not isinstance(config, helion.Config):
            out, lse = attend(return_lse=True)
            compare(out, q, k, v, is_causal=is_causal, lse=lse)
    return f"{len(shapes)} shapes, the last one: {line}"


def padded_head_dims(config, dtype):
    """Multiples of 8 that are no power of two, as one or two parts: what fills them up must be 0, and the next head
    stays out."""
    for dim in (8, 24, 72, 80, 96, 112, 136, 192, 200) if GPU else (8, 24, 72, 136, 200):
        most = 128 if config == "general" else getattr(NAMED[config], "head_dim", 256)
        if dim > most or config == "hopper_256" and dim <= 128:
            continue  # what their tiles are not for
        q, k, v = (x.transpose(1, 2) for x in make((1, 150, 2, dim), dtype))  # [B, S, H, D] in memory
        q[0, 1], k[0, 1], v[0, 1] = math.nan, math.inf, math.nan  # TMA must not fill up the other head with these
        out = flash_attention(q, k, v, is_causal=True, config=NAMED[config])
        line = compare(*(x[:, :1] for x in (out, q, k, v)), is_causal=True)
        q, k, v = make((1, 2, 150, dim), dtype, 200)
        one = torch.cat([q, q.new_full((1, 2, 150, 40), math.nan)], -1)[:, :, :1, :dim]  # beside it what nobody may read
        for q in (q, one, one[:, :, :1].expand_as(q)):
            compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)
    return line


def unseen(config, dtype):
    """Keys beyond the diagonal, in a row's own tile, that would beat all that it sees by 2^20 and more."""
    for kind, M, N in (("upper_left", 256, 256), ("lower_right", 200, 328), ("lower_right", 150, 300)):
        q, k, v = make((1, 1, M, dim_of(config)), dtype, N)
        q[..., 0], k[..., 0] = 8, 0
        k[:, :, -6:, 0] = 2.5 * q.size(3) ** 0.5
        options = dict(config=NAMED[config], is_causal=CAUSAL[kind])
        for out in (flash_attention(q, k, v, **options), flash_attention(q, k, v, return_lse=True, **options)[0]):
            out, q_ = out[:, :, :-6], q[:, :, :-6]  # the rows that do not see them
            line = compare(out, q_, k[:, :, :-6], v[:, :, :-6], is_causal=CAUSAL[kind])
    return line


def layouts(config):
    """Read in place: [B, S, H, D] in memory, k and v of one packed tensor, expanded heads; out in q's layout."""
    dim, config = dim_of(config), NAMED[config]
    q, k, v = make((2, 2, 129, dim), keys=300)
    q, packed = bshd(q), torch.cat([k, v], -1).split(dim, -1)
    k, v = bshd(k), bshd(v)
    one = [x[:, :1].expand(2, 2, -1, -1) for x in packed]
    line = compare(flash_attention(q, k, v, config=config), q, k, v)
    if isinstance(config, helion.Config) and config is not configs.TILE128:  # the same kernel, slower here
        return line
    for kv in (packed, one):
        compare(flash_attention(q, *kv, config=config), q, *kv)
    with mock.patch.object(torch.Tensor, "clone", side_effect=AssertionError("it was copied")):
        for kv in ((k, v), packed, one):  # compiled before, which copies
            out = flash_attention(q, *kv, config=config)
            assert out.transpose(1, 2).is_contiguous(), "out is not in q's layout"
    q = q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # [S, B, H, D] in memory
    compare(flash_attention(q, k, v, config=config), q, k, v)
    k, v = (torch.cat([x, x], -1)[..., 1 : dim + 1] for x in (k, v))
    q = q.transpose(2, 3).contiguous().transpose(2, 3)  # rows that are not contiguous
    return compare(flash_attention(q, k, v, config=config), q, k, v)


def another_call(config):
    """A call that is like the last one but for one thing is another call: strides, alignment, options, dtypes."""
    config, (x, k, v) = NAMED[config], make((1, 2, 144, D))
    forget()
    compare(flash_attention(x, x, x, config=config), x, x, x)  # then three tensors, not one
    q = make((1, 2, 144, D), seed=1)[0]
    plan = config or configs.best(torch.cuda.get_device_capability() if GPU else None, D, q.dtype, 2, 144, 144)
    apart = lambda x: torch.cat([x, x], 2)[:, :, :144]
    odd = lambda x: x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    compare(flash_attention(q, k, v, config=config), q, k, v)
    for i in range(3):
        for change in (apart, odd):
            qkv = [change(x) if i == j else x for j, x in enumerate((q, k, v))]
            copies, clone = [], torch.Tensor.clone
            with mock.patch.object(torch.Tensor, "clone", lambda x, **o: copies.append(x) or clone(x, **o)):
                out = flash_attention(*qkv, config=config)
            # Only TMA needs aligned rows. A compiler clones other tensors.
            copies = [x for x in copies if any(x is y for y in qkv)]
            assert len(copies) == (change is odd and plan.kernel == "hopper"), "another alignment, and it was not seen"
            compare(out, *qkv)
            compare(flash_attention(q, k, v, config=config), q, k, v)
    k_, v_ = k[:, :, :130], v[:, :, :130]
    for options in (dict(is_causal=True), dict(scale=0.2), dict(is_causal=CAUSAL["lower_right"])):
        compare(flash_attention(q, k_, v_, config=config, **options), q, k_, v_, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        forget()
        out, lse = flash_attention(q, k, v, return_lse=True, config=config)
    finally:
        torch.set_default_dtype(torch.float32)
    negative = torch.complex(q.float(), q.float()).conj().imag  # -q, of which only a bit says so
    found = flash_attention(negative, k.float(), v.float())
    torch.testing.assert_close(found, flash_attention(-q.float(), k.float(), v.float()))
    return compare(out, q, k, v, lse=lse)


def special_values(config):
    """NaN, inf, scales of any sign or none, and nothing at all give what SDPA gives."""
    attend = functools.partial(flash_attention, config=NAMED[config])
    for tensor, row, value in ((0, 5, math.nan), (0, 128, math.inf), (1, 7, math.inf), (2, 128, math.nan)):
        qkv = make((2, 2, 129, D))
        qkv[tensor][1, 1, row, 3] = value
        compare(attend(*qkv), *qkv)
    q, k, v = make((2, 2, 129, D))
    line = compare(attend(q * 40, k, v, scale=-0.3), q * 40, k, v, -0.3)  # a maximum before the scale is a minimum
    if isinstance(NAMED[config], helion.Config):
        return line
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        for scale in (0, -0.0, 1e-50):  # the mean of v
            expected = v.mean(2, keepdim=True, dtype=torch.float64).expand(-1, -1, 129, -1)
            torch.testing.assert_close(attend(q, k, v, scale=scale).double(), expected, atol=1e-3, rtol=1e-2)
        compare(attend(q, k, v, scale=0.3), q, k, v, 0.3)
        compare(attend(q * 40, k, v, scale=-0.3), q * 40, k, v, -0.3)
    for B, H, S, keys in ((0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0)):
        q, k, v = (torch.randn(B, H, n, D, device=DEVICE).bfloat16() for n in (S, keys, keys))
        with sdpa_kernel(SDPBackend.MATH):  # cuDNN returns None for some of these
            torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    return line


def bad_input():
    """Each of these must be refused, by its name, before anything is compiled."""
    q, k, v = make((2, 2, 16, 64))
    three_stages = helion.Config(**{**configs.HOPPER.config.config, "range_num_stages": [1, 3]})
    lists = {
        TypeError: [
            ("k", (q, k.half(), v), {}), ("q", (q.double(), k.double(), v.double()), {}), ("v", (q, k, [1.0]), {}),
            ("is_causal", (q, k, v), {"is_causal": "yes"}), ("config", (q, k, v), {"config": "tile128"})],
        ValueError: [
            ("q", (q[0], k, v), {}), ("k", (q, k[:1], v), {}), ("v", (q, k, v[:, :1]), {}), ("k", (q, k[..., :32], v), {}),
            ("v", (q, k, v[:, :, :8]), {}), ("q", (q[..., :44], k[..., :44], v[..., :44]), {}),
            ("k", (q, k.to("meta"), v), {}), ("k", (q, k[:, :1], v[:, :1]), {}), ("scale", (q, k, v), {"scale": math.nan}),
            ("config", (q.float(), k.float(), v.float()), {"config": configs.HOPPER}),
            ("config", [x.repeat(1, 1, 1, 2)[..., :72] for x in (q, k, v)], {"config": configs.HOPPER_64}),
            ("config", [x.repeat(1, 1, 1, 3)[..., :136] for x in (q, k, v)], {"config": configs.HOPPER}),
            ("config", (q, k, v), {"config": configs.Plan("hopper", 128, 128, helion.Config())}),
            ("config", (q, k, v), {"config": dataclasses.replace(configs.HOPPER, config=three_stages)}),
            ("config", (q.clone().requires_grad_(), k, v), {"config": configs.TILE128}),
            ("config", (q, k, v), {"return_lse": True, "config": configs.TILE128}),
            ("q must be on a CUDA device", (q.cpu(), k.cpu(), v.cpu()), {})],
    }  # fmt: skip
    with mock.patch.object(helion.Kernel, "bind", side_effect=AssertionError("it was compiled")):
        for error, calls in lists.items():
            for message, qkv, options in calls:
                interpret = "0" if "CUDA" in message else os.environ.get("TRITON_INTERPRET", "0")
                with mock.patch.dict(os.environ, TRITON_INTERPRET=interpret), raises(error, f"^{message}"):
                    flash_attention(*qkv, **options)
        with pretend(80):
            for name in ("hopper", "blackwell"):
                with raises(ValueError, "^config takes GPUs of compute capability"):
                    launches(NAMED[name], *(torch.empty(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv"), False)
    return "refused"


# ---- The forward, where only a GPU can fail --------------------------------------------------------


def same_bits(config, runs=200):
    """Many runs, where a race between warps would show in some of them; of the gradient, too."""
    def gradient(*qkv, **options):
        return torch.autograd.grad(flash_attention(*(x.requires_grad_() for x in qkv), **options).square().sum(), qkv)

    report = isinstance(NAMED[config], helion.Config)
    of_plans = [(gradient, {}), (gradient, dict(is_causal=True))]
    of_plans += [(flash_attention, options) for options in (dict(is_causal=True), dict(is_causal=True, return_lse=True))]
    for attend, options in [(flash_attention, {}), *([] if report else of_plans)]:
        for shape in ((4, 32, 1024, 128), (2, 16, 1001, 128 if report else 64), (2, 8, 8192, 128)):
            shape = (*shape[:3], dim_of(config)) if config.startswith("hopper_") else shape
            qkv = make(shape)
            first = attend(*qkv, config=NAMED[config], **options)
            for _ in range(runs):
                torch.testing.assert_close(attend(*qkv, config=NAMED[config], **options), first, atol=0, rtol=0)
    return f"the same bits as the first, {runs} times each"


def compiles_nothing(config):
    """Other lengths, batches, heads and scales compile nothing, and the memory stays where it is."""
    config, used = NAMED[config], []
    for M, N in ((1, 129), (130, 200), (130, 256)):  # the kinds of masking
        for is_causal in (False, CAUSAL["lower_right"]):
            flash_attention(*make((1, 2, M, D), keys=N), is_causal=is_causal, config=config)
    before = compiled()
    with mock.patch.object(helion.Kernel, "bind", side_effect=AssertionError("it was compiled")):
        for i in range(100):
            shape = (1 + i % 3, 2 * (1 + i % 2), 130 + 3 * i if i % 2 else 1, D)
            q, k, v = make(shape, keys=200 + 7 * i, heads=2)
            options = dict(is_causal=CAUSAL["lower_right"] if i % 4 == 1 else False, scale=0.1 + i / 1000)
            out = flash_attention(q, k, v, enable_gqa=True, config=config, **options)
            if i % 10 == 1:
                compare(out, q, k, v, **options)
            del q, k, v, out
            used.append(torch.cuda.memory_allocated())
    assert compiled() == before, "something was compiled"
    assert used[-1] <= used[2], used  # the reference has its workspace by then
    return f"{len(used)} calls"


def large_tensor(config):
    """More than 2^31 elements between the first and the last. A CPU has only those in memory that are touched."""
    apart = 2**30 + 8 * D
    storage = torch.UntypedStorage(2 * (2 * apart + 2 * 300 * D), device=DEVICE)  # nobody fills it
    for large in ((0, 1, 2), (0,), (1, 2)):
        qkv = make((3, 2, 300, D))
        for i in large:
            x = qkv[i].new_empty(0).set_(storage, 0, (3, 2, 300, D), (apart, 300 * D, D, 1))
            if i != large[0]:  # k and v, or all three, are one tensor then
                qkv[i] = qkv[large[0]]
            else:
                x.copy_(qkv[i])
                qkv[i] = x
        line = compare(flash_attention(*qkv, config=NAMED[config]), *qkv)
    with gradient_of(config):
        compare_gradients(qkv, dict(config=NAMED[config]))
    return line


def threads():
    """Eight threads make their first calls at once, on a stream each."""
    barrier = threading.Barrier(8)

    def work(i):
        q, k, v = make((1 + i % 3, 2, 100 + 50 * i, (64, 128)[i % 2]), ("bfloat16", "float16")[i // 4], seed=i)
        torch.cuda.synchronize()
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                out = flash_attention(q, k, v, is_causal=i % 3 == 0)
        torch.cuda.synchronize()
        return compare(out, q, k, v, is_causal=i % 3 == 0)

    forget()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(8)))[-1]


def capture():
    """In a CUDA graph: not as the first call, and right afterwards."""
    q, k, v = make((2, 2, 200, 32))
    forget()
    with raises(RuntimeError, "before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flash_attention(q, k, v)
    flash_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v)
    for x, new in zip((q, k, v), make((2, 2, 200, 32), seed=1)):
        x.copy_(new)
    graph.replay()
    return compare(out, q, k, v)


def report_shape(config, *shape):
    """A shape of the report; the float64 reference is taken of two heads."""
    q, k, v = make(shape)
    out = flash_attention(q, k, v, config=NAMED[config])
    for x, y in zip(out, F.scaled_dot_product_attention(q, k, v)):  # one b at a time: it takes several times as much
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)
    return [compare(*(x[b, h][None, None] for x in (out, q, k, v))) for b, h in ((0, 0), (-1, -1))][-1]


# ---- Hard rows -------------------------------------------------------------------------------------
# Heads whose rows are all of one kind, each head held to the bound by itself, so that a row that is wrong
# does not hide behind the error of a larger one. Everything about scores is in nats, the exponent of e.
# All kinds share one shape, so that a config compiles once for them; MANY keys are another.
HEADS, ROWS, KEYS, MANY = 8, 256 if GPU else 64, 300, 131072 if GPU else 4096
LN2 = math.log(2)
LARGEST = {torch.bfloat16: 1e36, torch.float16: 1e4, torch.float32: 1e36}  # of v


def in_pieces(x):
    """Three columns that sum up to x: one bf16 has 8 bits, which is too few for a score."""
    first = x.bfloat16().double()
    second = (x - first).bfloat16().double()
    return torch.stack([first, second, x - first - second], -1)


def hard_head(dtype, keys, seed, dim=D, shift=0.0, sweep=0.0, spread=0.0, gap=0.0, upper=0.5, values="normal", size=1.0,
              columns=slice(None)):  # fmt: skip
    """q: [ROWS, dim], k, v: [keys, dim]: one head with scores and values to measure.

    shift is added to all scores, and another 0 to sweep from the first row to the last. spread: their
    standard deviation. A share of `upper` of the keys, but one at least, is on an upper level; the
    others are lower by gap and another 0 to 1 bit, so that every row rounds its p in another way.
    values: "normal", "positive", on the "upper" or "lower" keys only, "opposed" on the two levels, or
    "biased", which sets scores, too. size: of the largest result, unless v would be over LARGEST.
    columns: v is 0 in others than these.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    low = torch.randperm(keys, generator=generator) >= min(max(round(upper * keys), 1), keys - 1)
    scores, odd = torch.zeros(keys, dtype=torch.float64), torch.arange(keys) % 2 == 1
    if values == "biased":
        # The mantissas of odd and even keys' p are a factor of 1.5 or 0.75 apart, and so is on average
        # what cutting takes away from them. Rounding to nearest takes nothing, whatever is subtracted.
        scores = LN2 * (0.1 * uniform(keys) + 0.6 * odd)
        low = torch.zeros_like(low)
        v = torch.where(odd, -(0.5**0.6), 1.0)[:, None] * (1 + uniform(dim))
    elif values == "positive":
        v = uniform(keys, dim)
    elif values == "opposed":
        v = torch.where(low, 1.0, -1.0)[:, None] * (1 + uniform(dim))
    else:
        v = normal(keys, dim) * {"normal": 1.0, "upper": ~low[:, None], "lower": low[:, None]}[values]
    outside = torch.ones(dim, dtype=torch.bool)
    outside[columns] = False
    v[:, outside] = 0
    root, rest, along = dim**0.5, dim - 9, torch.linspace(0, 1, ROWS, dtype=torch.float64)
    ones = lambda n: torch.ones(n, 3, dtype=torch.float64)
    shifts, gaps = in_pieces(root * (shift + sweep * along)), in_pieces(root * -(gap + LN2 * along))
    q = torch.cat([ones(ROWS), shifts, gaps, normal(ROWS, rest) * spread * (dim / rest) ** 0.5], -1)
    k = torch.cat([in_pieces(root * scores), ones(keys), ones(keys) * low[:, None], normal(keys, rest)], -1)
    q, k = q.to(dtype), k.to(dtype)
    largest = definition(*(x[None, None].double() for x in (q, k, v)))[0].abs().max().item()
    v *= min(size / largest, LARGEST[dtype] / v.abs().max().item())
    return q.to(DEVICE), k.to(DEVICE), v.to(dtype).to(DEVICE)


def tf32x3(x, y):
    """x @ y as tensor cores do it in float32: three products of numbers with 10 bits behind the point."""
    cut = lambda x: ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    (x, x_low), (y, y_low) = ((cut(z), cut(z - cut(z))) for z in (x.contiguous(), y.contiguous()))
    return x_low @ y + x @ y_low + x @ y


def rounded_once(q, k, v, ref):
    """The largest error of a few ways to do attention in float32 with p rounded to v's dtype once.

    SDPA's error can be none by luck: its largest p is exactly 1, and where few keys count the other p
    may be exact, too. A kernel that subtracts another number than the maximum is as right, and has
    that error. So here the largest p is 2^-t for some t. For each t the sums have another order.
    """
    errors, product = [], tf32x3 if v.dtype == torch.float32 else torch.matmul
    for t in (0, 0.25, 0.5, 0.75):
        q_t, k_t = (x.float().roll(int(t * x.size(-1)), -1) for x in (q, k))
        x = product(q_t, k_t.mT) * (q.size(-1) ** -0.5 * LOG2E)
        p = torch.exp2(x - x.amax(-1, keepdim=True) - t).to(v.dtype).float()
        tiles = list(zip(p.split(32, -1), v.float().split(32, -2)))
        acc, l = sum(product(p, v) for p, v in tiles), sum(p.sum(-1, keepdim=True) for p, _ in tiles)
        errors.append((acc / l - ref).abs().max().item())
    return max(errors) * (2 if v.dtype == torch.float32 else 1)  # tensor cores cut sums off where float32 rounds


def hold(config, dtype, heads, keys=KEYS):
    """Heads, [(seed, parameters of hard_head)], each to the bound by itself."""
    missed = []
    for first in range(0, len(heads), HEADS):
        some = heads[first : first + HEADS]
        qkv = [torch.stack(x)[None] for x in zip(*(hard_head(dtype, keys, seed, dim_of(config), **head) for seed, head in some))]
        out = flash_attention(*qkv, config=NAMED[config])
        for i, (seed, head) in enumerate(some):
            q, k, v = (x[:, i : i + 1] for x in qkv)
            ref = definition(q.double(), k.double(), v.double())[0]
            least = rounded_once(q, k, v, ref)
            try:
                line = compare(out[:, i : i + 1], q, k, v, None, ref.abs().max().item(), least, ref=ref)
            except AssertionError as error:
                missed.append(f"{error} at seed {seed}, {head}")
    assert not missed, f"{len(missed)} of {len(heads)} heads, the first one: {missed[0]}"
    return f"{len(heads)} heads, the last one: {line}"


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
    # inf. hopper subtracts a constant, -40 bits, and has it from 55.1 to 56.1: fine steps hit it there. The last
    # heads are at its lower edge: tiny p of large values, which a few bits less of all p would lose.
    "edges": [dict(shift=shift, sweep=0.2, spread=0.1, size=2.0**-10) for shift in (
        *range(-100, 156, 8), *(52 + i / 4 for i in range(24)))] + [
        dict(shift=shift, gap=86, upper=1.0, values="lower", size=math.inf) for shift in range(-35, -27)],
    # Two heads are beyond hopper's range in their first or last columns alone.
    "large_values": [dict(head, values="positive", size=math.inf, columns=columns) for head, columns in zip(
        SHIFTS, [slice(None)] * 3 + [slice(-8, None), slice(8)] + [slice(None)] * 3)],
    "spreads": [dict(spread=spread) for spread in (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)],
    "upper_level": [dict(head, values="upper") for head in LEVELS],
    "lower_level": [dict(head, values="lower") for head in LEVELS],
    # One large p and many tiny ones that weigh as much; tiny ones that sum up to 1 or 2.7; biased.
    "many_keys": [
        dict(gap=math.log(MANY), upper=0.0, values="opposed"),
        dict(gap=math.log(MANY), upper=0.0, values="positive", shift=-0.5),
        dict(shift=-math.log(MANY), sweep=1.0, upper=1.0, values="positive"),
        dict(values="biased"),
    ],
    # One of each, for the report's kernel: equal keys, scores far off, one key far above, large values.
    "mixed": [dict(), SHIFTS[0], SHIFTS[7], dict(gap=60, upper=0.0, values="lower"), dict(gap=60, upper=0.0),
              dict(spread=30.0), dict(SHIFTS[1], values="positive", size=math.inf), dict(spread=2.0)],
}  # fmt: skip


def hard_rows(config, kind, dtype):
    keys = MANY if kind == "many_keys" else KEYS - KEYS % 64 if config == "hopper_256" else KEYS  # no mask then
    return hold(config, DTYPES[dtype], list(enumerate(HARD[kind])), keys)


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
    return hold(config, DTYPES[dtype], [(seed, drawn(DTYPES[dtype], seed)) for seed in range(draws)])


# ---- The gradient ----------------------------------------------------------------------------------


@contextlib.contextmanager
def gradient_of(config):
    """Inside, the gradient of "hopper" runs with Hopper's plans, here too."""
    best = configs.best_gradient
    of_hopper = lambda capability, *rest, **options: best((9, 0) if config == "hopper" else capability, *rest, **options)
    forget()
    with mock.patch.object(configs, "best_gradient", of_hopper):
        yield
    forget()


def gradients(config, kind, dtype):
    """Unequal and ragged lengths, groups of heads, padded head dims, [B, S, H, D], a given scale, lse."""
    is_causal = CAUSAL[kind]
    kept = 2**17 if kind == "dense" else 1  # whole heads at a time, one after the other; or some queries of one
    with gradient_of(config), mock.patch.object(flash_attn, "KEPT", kept):
        for B, H, heads, M, N, dim in ((1, 2, 2, 128, 256, D), (2, 4, 2, 150, 300, D), (1, 4, 1, 129, 200, 72),
                                       (1, 10, 5, 200, 140, 16), (1, 3, 1, 260, 133, 40), (1, 2, 2, 256, 256, 64),
                                       (1, 2, 2, 1, 200, D), (1, 1, 1, 200, 209, 128), (1, 1, 1, 200, 209, 256)):  # fmt: skip
            if dim > 128 and kind == "lower_right":
                continue  # as upper_left, and slow
            options = dict(is_causal=is_causal, config=NAMED[config if dim <= 128 or config != "hopper" else "hopper_256"])
            layout = bshd if dim != 40 else lambda x: x.mT.contiguous().mT  # which TMA does not read
            qkv = [layout(x) for x in make((B, H, M, dim), dtype, N, heads)]
            with mock.patch.object(flash_attn, "BUSY", 3 * N):  # three heads at a time
                line = compare_gradients(qkv, options, with_lse=M not in (1, 128), scale={1: -0.3, 128: 0.3}.get(M))
    return line


def hard_gradients(config, dtype):
    """Rows with scores far from 0, and with two levels, of which one has the values."""
    heads = SHIFTS[::3] + [dict(head, values=values) for head in LEVELS[::11] for values in ("upper", "lower")]
    with gradient_of(config):
        for i, head in enumerate(heads):
            qkv = [x[None, None] for x in hard_head(DTYPES[dtype], KEYS, i, **head)]
            line = compare_gradients(qkv, dict(config=NAMED[config]))
    return f"{len(heads)} heads, the last one: {line}"


def saved_lse(config):
    """The gradient takes p from lse, which has to be exact, though nobody asked for it."""
    q, k, v = (x.requires_grad_() for x in make((1, 2, 200, D)))
    out = flash_attention(q, k, v, config=NAMED[config])
    (lse,) = (x for x in out.grad_fn.saved_tensors if x.shape == q.shape[:3])
    return compare(out, q, k, v, lse=lse)


def asked_for(config, dim):
    """No gradient is computed that nobody asked for, as the kernels tell that are compiled; the others are as they
    are together. out's gradient is one number, expanded; q, k and v stay as they are."""
    q, k, v = make((1, 2, 140, dim), "float16")
    copies = [x.clone() for x in (q, k, v)]

    def found(*which):
        forget()
        leaves = [x.detach().requires_grad_(i in which) for i, x in enumerate((q, k, v))]
        names, _ = bound(lambda: flash_attention(*leaves).sum().backward())
        assert [x.grad is not None for x in leaves] == [i in which for i in range(3)]
        return names, [x.grad for x in leaves]

    with gradient_of(config):
        of_all, expected = found(0, 1, 2)
        again = "_hopper_dq_kernel" in of_all  # which does not read what _dkdv_kernel keeps
        for i, x in enumerate(expected):
            names, grads = found(i)
            unasked = {"_dq_kernel", "_hopper_dq_kernel"} if i else {"_dkdv_kernel"} if again else set()
            assert names == of_all - unasked, (i, names, of_all)
            torch.testing.assert_close(grads[i], x, atol=2e-3, rtol=2e-3)
    assert all(map(torch.equal, (q, k, v), copies)), "an input was written"
    with torch.no_grad():
        assert not flash_attention(q.requires_grad_(), k, v).requires_grad
    return ", ".join(sorted(of_all))


# ---- In torch and in models ------------------------------------------------------------------------
BACKEND = "inductor" if GPU else "aot_eager"


def in_torch(name):
    """Under torch's own checks, torch.compile, torch.export, autocast, and where a clear error is due."""
    attend = functools.partial(flash_attention, is_causal=True, enable_gqa=True, return_lse=True)
    q, k, v = make((2, 4, 140, D), "float16", heads=2)
    if name == "opcheck":
        for qkv in ((q, k, v), map(bshd, (q, k, v)), (x.clone().requires_grad_() for x in (q, k, v))):
            opcheck(*qkv)
    elif name == "gradcheck":
        qkv = [x.requires_grad_() for x in make((1, 2, 3, 8), "float32", 5, 1)]
        assert torch.autograd.gradcheck(attend, qkv, eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0, fast_mode=True)
    elif name == "compile":  # one graph for all lengths, and its gradient
        counter = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
        compiled = torch.compile(lambda *qkv: attend(*qkv), fullgraph=True, dynamic=True, backend=counter)
        for n in (140, 150, 300):
            qkv = [x.requires_grad_() for x in make((2, 4, n, D), "float16", heads=2)]
            (out, lse), loss = compiled(*qkv), lambda out, lse: out.square().sum() + lse.sum()
            compare(out, *qkv, is_causal=True, lse=lse)
            expected = torch.autograd.grad(loss(*attend(*qkv)), qkv)
            torch.testing.assert_close(torch.autograd.grad(loss(out, lse), qkv), expected, atol=2e-3, rtol=2e-3)
        assert counter.frame_count == 1, f"{counter.frame_count} graphs"
    elif name == "sdpa":  # its flash backend, on a CPU what it would call
        qkv = [x.requires_grad_() for x in make((2, 4, 140, D), "float16")]
        registered = flash_attn._Registered("CUDA" if GPU else "CPU")
        try:
            if GPU:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    out = F.scaled_dot_product_attention(*qkv, is_causal=True, scale=0.1)
            else:
                out = torch.ops.aten._scaled_dot_product_flash_attention(*qkv, 0.0, True, scale=0.1)[0]
            found = torch.autograd.grad(out.square().sum(), qkv)
        finally:
            registered.remove()
        expected = torch.autograd.grad(flash_attention(*qkv, is_causal=True, scale=0.1).square().sum(), qkv)
        compare(out, *qkv, 0.1, is_causal=True)
        assert all(map(torch.equal, found, expected)), "other kernels than ours"
        listed = getattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["helion"])  # older torch has no list
        assert "helion" in listed()
    elif name == "export":
        module = torch.nn.Module()
        module.forward = attend
        length = torch.export.Dim("length", min=2, max=4096)
        program = torch.export.export(module, (q, k, v), dynamic_shapes=[{2: length}] * 3)
        q, k, v = make((2, 4, 200, D), "float16", heads=2)
        compare(program.module()(q, k, v)[0], q, k, v, is_causal=True)
    elif name == "autocast":
        q, k, v = (x.float() for x in (q, k, v))
        expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())[0]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(attend(q, k, v)[0], expected)
            for wrong in (q.double(), [1.0]):
                with raises(TypeError, "^q"):
                    attend(wrong, k, v)
    elif name == "errors":
        with raises(RuntimeError, "vmap.*fold"):
            torch.vmap(lambda q: flash_attention(q, q, q))(torch.stack([q, q]))
        with torch.autograd.forward_ad.dual_level(), raises(RuntimeError, "forward-mode"):
            attend(torch.autograd.forward_ad.make_dual(q, q), k, v)
        (dq,) = torch.autograd.grad(attend(q.requires_grad_(), k, v)[0].square().sum(), q, create_graph=True)
        with raises(RuntimeError, "once_differentiable"):
            dq.sum().backward()
    return "as documented"


def training(how):
    """Two layers of a decoder, GQA and causal, learn random tokens in 50 steps; half of them with activation
    checkpointing. At each step the gradient of every weight is SDPA's from the same weights, to 0.1%.
    The losses are close to those of another training, with SDPA: to 5% of the first one, since small
    differences grow. Then tokens one at a time, with a cache, have the logits that they have together.
    """
    from torch.utils.checkpoint import checkpoint

    H, Hk, C, S, steps = 2, 1, 64, 40, 50
    tokens = torch.randint(50, (1, S + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    ours = functools.partial(flash_attention, is_causal=True, enable_gqa=True)
    cached = functools.partial(flash_attention, is_causal=CAUSAL["lower_right"], enable_gqa=True)

    def block(attend, x, cache, *weights):
        q, k, v = ((F.rms_norm(x, (C,)) @ w).unflatten(-1, (-1, 16)).transpose(1, 2) for w in weights[:3])
        if cache is not None:
            k, v = cache[:] = [torch.cat(x, 2) for x in zip(*[cache] * bool(cache), (k, v))]
        return x + attend(q, k, v).transpose(1, 2).flatten(2) @ weights[3]

    def logits(attend, embed, layers, tokens, caches=(None, None), keep=False, run=block):
        x = embed[tokens]
        for weights, cache in zip(layers, caches):
            call = functools.partial(checkpoint, run, use_reentrant=False) if keep else run
            x = call(attend, x, cache, *weights)
        return x @ embed.T

    def train(attend, run=block, other=None):
        torch.manual_seed(0)
        weight = lambda *shape: torch.nn.Parameter((torch.randn(*shape) * shape[0] ** -0.5).to(DEVICE))
        embed = weight(50, C)
        layers = [[weight(C, n * 16) for n in (H, Hk, Hk)] + [weight(H * 16, C)] for _ in range(2)]
        parameters, losses = [embed, *sum(layers, [])], []
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        for step in range(steps):

            def loss(attend, run):
                found = logits(attend, embed, layers, tokens[:, :-1], keep=step % 2 == 1, run=run)
                return F.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten())

            losses.append(loss(attend, run))
            optimizer.zero_grad()
            losses[-1].backward()
            expected = torch.autograd.grad(loss(other, block), parameters) if other else ()
            for i, y in enumerate(expected):
                error = ((parameters[i].grad - y).abs().max() / y.abs().max()).item()
                assert error < 1e-3, f"step {step}, weight {i}: relative error {error:.1e} of its gradient"
            optimizer.step()
        return torch.stack(losses).detach(), embed, layers

    run = torch.compile(block, fullgraph=True, backend=BACKEND) if how == "compile" else block
    (losses, embed, layers), (expected, *_) = train(ours, run, sdpa), train(sdpa)
    drift = (losses - expected).abs().max() / losses[0]
    assert drift < 0.05 and losses[-1] < losses[0] / 2, (drift, losses[-1])
    with torch.no_grad():
        caches, ends = ([], []), (0, 30, *range(31, S + 1))
        parts = [logits(cached, embed, layers, tokens[:, a:b], caches) for a, b in zip(ends, ends[1:])]
        torch.testing.assert_close(torch.cat(parts, 1), logits(sdpa, embed, layers, tokens[:, :S]), atol=1e-3, rtol=1e-3)
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}, at most {drift:.1e} of the first one from SDPA's"


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def readme(text):
    """What the README's Python block with this text in it defines: its recipes are what is checked."""
    defined, randn = {}, torch.randn
    small = lambda *shape, device=None, **options: randn(*(min(n, 40) for n in shape), device=DEVICE, **options)
    with contextlib.nullcontext() if GPU else mock.patch("torch.randn", small):
        exec(next(block for block in readme_blocks() if text in block), defined)
    return defined


def readme_block(i):
    """Each Python block of the README runs; without a GPU, with small tensors."""
    block = readme_blocks()[i]
    compile(block, "README.md", "exec")
    if "transformers" in block and importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    return f"defines {', '.join(name for name in readme(block) if name[0] != '_')}"


def split_keys(config):
    """The README's merge of results over parts of the keys, by their lse, is attention over all of them."""
    q, k, v = make((1, 2, 130, D), keys=400)
    parts = [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 150), (150, 151), (151, 400))]
    found = [flash_attention(q, *part, return_lse=True, config=NAMED[config]) for part in parts]
    out, lse = readme("def merge")["merge"](*zip(*found))
    return compare(out.to(q.dtype), q, k, v, lse=lse)


def transformers_model():
    """A small random Llama with the README's recipe, prefill and cached decoding, against its own sdpa."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    import transformers

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
        logits, cache = [], None
        with torch.no_grad():
            for part in tokens.split([140, 9, 1], 1):
                step = model(part, past_key_values=cache, use_cache=True)
                logits, cache = [*logits, step.logits], step.past_key_values
            masked = model(tokens, attention_mask=padded).logits[:, 9:]
        found[name] = torch.cat([*logits, masked], 1)
    torch.testing.assert_close(found["helion"], found["sdpa"], atol=1e-4, rtol=1e-4)
    return f"logits differ by at most {(found['helion'] - found['sdpa']).abs().max():.1e}"


# ---- Nothing is silently wrong around the kernels -----------------------------------------------


def rows(*numbers, dim=8, dtype=torch.float32):
    """[1, 1, S, dim]: each row repeats one number."""
    x = torch.tensor(numbers, dtype=dtype, device=DEVICE)
    return x[None, None, :, None].repeat(1, 1, 1, dim)


def zeros(n, dim=8, dtype=torch.float32):
    return rows(*[0] * n, dim=dim, dtype=dtype)


def holds(x, *numbers):
    """x is rows(*numbers), also as [B, S, H, D]."""
    found, expected = x.detach().float().flatten(0, 2), rows(*numbers, dim=x.size(3))[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def sdpa_lower_right(how):
    """SDPA with causal_lower_right and our flash backend, M != N: forward and backward. A CPU has
    only the operator that SDPA calls for it."""
    from torch.nn.attention.bias import causal_lower_right

    attend = lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if not GPU:
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        attend = lambda q, k, v, bias: operator(q, k, v, 0.0, True)[0]
    compiled = torch.compile(attend, backend=BACKEND) if how == "compile" else attend
    half = dict(dtype=torch.float16)

    def run(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return compiled(q, k, v, causal_lower_right(q.size(2), k.size(2)))

    registered = flash_attn._Registered("CUDA" if GPU else "CPU")
    try:
        v = rows(1, 3, **half).requires_grad_()
        out = run(zeros(1, **half), zeros(2, **half), v)
        holds(out, 2.0)
        holds(torch.autograd.grad(out.sum(), v)[0], 0.5, 0.5)
        q, k, v = (x.requires_grad_() for x in make((1, 2, 70, 64), "float16", 100))
        out, lower_right = run(q, k, v), CAUSAL["lower_right"]
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    finally:
        registered.remove()
    ours = flash_attention(q, k, v, is_causal=lower_right)
    expected = torch.autograd.grad(ours.square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    return compare(out, q, k, v, is_causal=lower_right)


def dispatch_modes(name):
    """While a TorchDispatchMode is active there is one operator, also after an equal call."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import checkpoint as ckpt
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = make((1, 2, 64, 32), "float32")
    flops = 4 * 2 * 64 * 64 * 32
    attend = lambda q, k, v: flash_attention(q, k, v, enable_gqa=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)  # is kept
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    if name == "make_fx":

        def step(*qkv):
            qkv = [x.detach().requires_grad_() for x in qkv]
            return torch.autograd.grad(attend(*qkv).sum(), qkv)

        for function, right, ours in ((attend, out, ["forward"]), (step, expected, ["forward", "backward"])):
            graph = make_fx(function)(q, k, v)
            targets = [str(node.target) for node in graph.graph.nodes]
            assert [x for x in targets if "flash" in x] == [f"flash_attn.{x}.default" for x in ours], targets
            assert not any("empty" in x for x in targets), targets
            torch.testing.assert_close(graph(q, k, v), right)
    elif name == "flops":
        with FlopCounterMode(display=False) as forward:
            attend(q, k, v)
            attend(q, k[:, :1], v[:, :1])
        with FlopCounterMode(display=False) as backward:  # of a call before it
            torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), expected)
        with FlopCounterMode(display=False) as both:
            attend(*leaves).sum().backward()
        found = [mode.get_total_flops() / flops for mode in (forward, backward, both)]
        assert flops == 1048576 and found == [2, 2.5, 3.5], found
    elif name == "selective":  # a policy that saves the output: it is not computed again
        for saved, products in ((True, 3.5), (False, 4.5)):
            policy = lambda ctx, op, *_, **__: saved and op is torch.ops.flash_attn.forward.default
            contexts = functools.partial(ckpt.create_selective_checkpoint_contexts, policy)
            with FlopCounterMode(display=False) as mode:
                found = ckpt.checkpoint(attend, *leaves, use_reentrant=False, context_fn=contexts)
                torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), expected)
            assert mode.get_total_flops() == products * flops, mode.get_total_flops() / flops
    elif name == "logging":
        seen = []

        class Logging(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                seen.append(str(op))
                return op(*args, **kwargs or {})

        with Logging():
            found = attend(q, k, v)
            with raises(ValueError, "config must be None under"):
                flash_attention(q, k, v, config=NAMED["general"])
        torch.testing.assert_close(found, out)
        assert seen == ["flash_attn.forward.default"], seen
    return "one operator"


def unseen_by_all():
    """The README's merge for a row that no part sees: 0 and -inf, and a gradient that is not NaN."""
    merge = readme("def merge")["merge"]
    leaves = [x.requires_grad_() for x in (zeros(2), zeros(1), rows(1))]
    out, lse = flash_attention(*leaves, is_causal=CAUSAL["lower_right"], return_lse=True)
    for parts in (1, 2):
        found, found_lse = merge([out] * parts, [lse] * parts)
        holds(found, 0, 1)
        torch.testing.assert_close(found_lse, lse + math.log(parts))
        loss = found.sum() + found_lse[..., 1:].sum()
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(x.isfinite().all() for x in grads), grads
        holds(grads[2], 1)
    nan = merge([out, out], [lse, lse * math.nan])[0]
    assert nan.isnan().all(), "merge hides a NaN"
    return "0 and -inf"


def nothing_is_kept(config):
    """After a call and its gradient no tensor of the caller, and no result, is reachable."""
    wide, options = config == "wide", {} if config == "wide" else dict(config=NAMED[config])
    forget()
    q, k, v = make((2, 1, 16, 16) if wide else (1, 2, 128, 64))
    if wide:  # on a CPU only what is touched takes memory
        storage = torch.UntypedStorage(2 * (2**31 + 256), device=DEVICE)
        q = q.new_empty(0).set_(storage, 0, q.shape, (2**31, 256, 16, 1)).copy_(q)
        del storage
    tensors = [q, k, v, flash_attention(q, k, v, **options)]
    if config not in (*configs.CONFIGS, "blackwell"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves, **options)
        do = torch.ones_like(out)
        tensors += [out, do, *torch.autograd.grad(out, leaves, do)]
        del leaves, out, do
    places, count = {x.untyped_storage().data_ptr() for x in tensors}, len(tensors)
    del q, k, v, tensors
    gc.collect()
    here = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == DEVICE]
    held = [tuple(x.shape) for x in here if x.untyped_storage().data_ptr() in places]
    assert not held, f"{len(held)} tensors are kept: {held}"
    return f"{count} tensors are free"


def clear_errors():
    """Where flash_attention cannot run, one sentence says what to do instead."""
    q, k, v = make((2, 2, 8, 16), "float32")
    attend = lambda q: flash_attention(q, k, v)
    with raises(RuntimeError, r"torch\.func.*torch\.autograd\.grad"):
        torch.func.grad(lambda q: attend(q).sum())(q)
    with raises(RuntimeError, r"torch\.func.*torch\.autograd\.grad"):
        torch.func.vjp(attend, q)
    with raises(RuntimeError, r"torch\.jit\.trace.*torch\.export"):
        torch.jit.trace(attend, (q,))
    parts = [x[:, : 8 - i].transpose(0, 1) for i, x in enumerate(q)]  # [S, H, D]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    strided = torch.nested.nested_tensor([x.transpose(0, 1) for x in parts])
    for x in (jagged, strided):
        with raises(ValueError, "q must not be nested: pad it, or call once for each of q.unbind"):
            flash_attention(x, x, x)
        with raises(ValueError, "k must not be nested"):
            flash_attention(q, x, x)
    return "as documented"


# ---- In models of transformers ----------------------------------------------------------------------


def transformers_or_skip():
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    import transformers

    return transformers


def recipe_values():
    """The README's recipe by hand: a keyword that changes the result does so, or is refused."""
    transformers_or_skip()
    attend = readme("AttentionInterface")["helion_attention"]
    decoder, encoder, unknown = (torch.nn.Identity() for _ in range(3))
    decoder.is_causal, encoder.is_causal = True, False
    mask = torch.tensor([[[[True, False]]]], device=DEVICE)
    additive = torch.zeros(1, 1, 1, 2, device=DEVICE).masked_fill(~mask, -math.inf)
    bias, sink = additive.masked_fill(~mask, math.log(3)), torch.zeros(1, device=DEVICE)

    def right(numbers, values, queries=1, mask=None, module=decoder, dim=8, dim_v=8, **options):
        v = rows(*values, dim=dim_v)
        q, k = zeros(queries, dim), zeros(len(values), dim)
        out, weights = attend(module, q, k, v, mask, **options)
        holds(out, *numbers)
        assert weights is None and out.shape == (1, queries, 1, dim_v) and out.is_contiguous()

    no_effect = dict(scaling=0.1, softcap=None, output_attentions=False, dropout=0.0,
                     sliding_window=None, position_ids=sink)  # fmt: skip
    for options in ({}, no_effect):
        right((1, 2), (1, 3, 0, 0), 2, **options)  # a static cache that is not full
        right((1,), (1, 3, 0, 0), **options)  # one query sees all keys
        right((1, 1), (1, 3, 0, 0), 2, module=encoder, **options)
        right((1, 1), (1, 3, 0, 0), 2, is_causal=False, **options)
    right((0.75,), (0, 1), position_bias=bias)
    right((0,), (0, 1), mask=mask, position_bias=bias)
    right((0, 0.75), (0, 1), 2, position_bias=bias.expand(1, 1, 2, 2))
    right((0, 0.5, 1.5, 2.5), (0, 1, 2, 3), 4, sliding_window=2)
    right((0.5, 1, 2, 2.5), (0, 1, 2, 3), 4, module=encoder, sliding_window=2)
    right((2.5,), (0, 1, 2, 3), sliding_window=2)
    for dim, dim_v in ((8, 16), (16, 8), (20, 20), (264, 264)):
        right((1, 2), (1, 3), 2, dim=dim, dim_v=dim_v)
    for sinks in (dict(s_aux=sink), dict(sinks=sink[None, None, None])):
        right((0.5,), (1,), **sinks)
        right((0.5, 2 / 3, 0.75), (1, 1, 1), 3, **sinks)
        right((0.5, 2 / 3, 0.75), (1, 1, 1), 3, dim_v=16, **sinks)
        right((0.5, 2 / 3, 2 / 3), (1, 1, 1), 3, sliding_window=2, **sinks)
        right((0.5,), (1, 5), mask=mask, **sinks)
        right((0.5,), (1, 5), mask=additive, **sinks)
        right((0.6,), (0, 1), position_bias=bias, **sinks)
    refused = dict(softcap=1.0, output_attentions=True, cu_seq_lens_q=torch.arange(3), indices=mask,
                   block_indices=mask)  # fmt: skip
    for name, x in refused.items():
        for some in (None, mask):
            with raises(ValueError, f"no {name}$"):
                attend(decoder, zeros(1), zeros(2), zeros(2), some, **{name: x})
    with raises(AttributeError, "'Identity' .*'is_causal'"):
        attend(unknown, zeros(2), zeros(2), zeros(2), None)
    sink.fill_(0.3).requires_grad_()
    for some in (None, mask[..., :1]):  # the gradient of a sink
        attend(decoder, zeros(1), zeros(1), rows(1), some, s_aux=sink)[0].sum().backward()
        (slope,) = torch.autograd.grad(8 * torch.sigmoid(-sink).sum(), sink)
        torch.testing.assert_close(sink.grad, slope, atol=1e-4, rtol=1e-4)
        sink.grad = None
    return f"{', '.join(refused)} are refused, the rest is right"


def recipe_compiles():
    """The recipe is one graph for all lengths but 1, with sinks, and a mask makes it another."""
    transformers_or_skip()
    attend, module = readme("AttentionInterface")["helion_attention"], torch.nn.Identity()
    module.is_causal, module.num_key_value_groups = True, 2
    options = dict(scaling=0.2, dropout=0.0, sliding_window=None, s_aux=torch.zeros(2, device=DEVICE))
    call = lambda q, k, v, mask: attend(module, q, k, v, mask, **options)[0]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=BACKEND)
    for M, N in ((12, 12), (14, 14), (1, 14), (6, 20)):
        q, k, v = make((1, 2, M, 16), "float32", N, 1)
        for mask in (None, torch.ones(1, 1, M, N, dtype=torch.bool, device=DEVICE).tril()):
            found, expected = compiled(q, k, v, mask), call(q, k, v, mask)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return "one graph"


def recipe_keywords():
    """The recipe knows every keyword that a model of transformers gives its attention function."""
    folder, calls = Path(transformers_or_skip().__file__).parent, 0
    recipe = next(block for block in readme_blocks() if "AttentionInterface" in block)
    known = {"cu_seq_lens_k", "max_length_k", *re.findall(r"\w+", recipe)}  # two come with cu_seq_lens_q
    for file in folder.glob("models/*/modeling_*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "attention_interface":
                calls += 1
                unknown = {keyword.arg for keyword in call.keywords} - known - {None}
                assert not unknown, f"{file.name}: {unknown}"
    assert calls > 100, calls
    return f"{calls} calls"


SPECIAL = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENCODER = dict(SPECIAL, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SMALL = dict(ENCODER, num_key_value_heads=1, head_dim=16)
WINDOW = dict(SMALL, sliding_window=8)
T5 = dict(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
WHISPER = dict(SPECIAL, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
               decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
               max_source_positions=20, max_target_positions=30, decoder_start_token_id=1)  # fmt: skip
MODELS = {  # its prefix in transformers, what it is of, and its options
    "llama": ("Llama", "ForCausalLM", SMALL),
    "mistral": ("Mistral", "ForCausalLM", WINDOW),
    "gemma2": ("Gemma2", "ForCausalLM", WINDOW),
    "gpt_oss": ("GptOss", "ForCausalLM", dict(WINDOW, num_local_experts=2, num_experts_per_tok=1)),
    "bert": ("Bert", "Model", ENCODER),
    "t5": ("T5", "ForConditionalGeneration", T5),
    "whisper": ("Whisper", "ForConditionalGeneration", WHISPER),
}


def small_model(name, **options):
    """With random weights that are not small: attention is not uniform then."""
    prefix, suffix, given = MODELS[name]
    transformers, numbers = transformers_or_skip(), torch.Generator().manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**given, **options)
    model = getattr(transformers, prefix + suffix)(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            size = 1 if x.dim() == 1 else 2 * x.size(-1) ** -0.5
            x.copy_(torch.randn(x.shape, generator=numbers) * size)
    return model.to(DEVICE)


def same_as(theirs, model, run, calls):
    """What run returns with the recipe is what it returns with transformers' own attention. calls: how
    often flash_attention is called at least; the other calls have a mask or a position_bias."""
    recipe = readme("AttentionInterface")
    count = recipe["flash_attention"] = mock.Mock(wraps=flash_attention)
    found = {}
    for name in (theirs, "helion"):
        model.set_attn_implementation(name)
        found[name] = run(model)
    torch.testing.assert_close(found["helion"], found[theirs], atol=2e-4, rtol=2e-4)
    assert count.call_count >= calls, f"{count.call_count} calls of flash_attention, not {calls}"
    return f"as with {theirs}, {count.call_count} calls of flash_attention"


def models(name):
    """Small random models of transformers: kinds of attention, caches, masks, a step of training."""
    transformers = transformers_or_skip()
    tokens = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    padded = torch.ones_like(tokens)
    padded[0, :5] = 0  # at the left
    positions = torch.arange(24, device=DEVICE)[None]

    def logits(model, ids=tokens, mask=None, **options):
        out = model(ids, attention_mask=mask, **options)
        found = (out.logits if "logits" in out else out.last_hidden_state).detach()
        return found if mask is None or "decoder_input_ids" in options else found[mask.bool()]

    def cached(model, *lengths, **options):
        cache = transformers.StaticCache(config=model.config, **options) if options else None
        found, n = [], 0
        for part in tokens[:, : sum(lengths)].split(lengths, 1):
            n += part.size(1)
            seen = None if n == lengths[0] else torch.ones_like(tokens[:, :n])
            step = model(part, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            found.append(step.logits.detach())
        return found

    def generated(model, mask=None, **options):
        mask = torch.ones_like(tokens[:, :9]) if mask is None else mask
        return model.generate(
            tokens[:, :9], attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            output_logits=True, return_dict_in_generate=True, disable_compile=True, **options,
        ).logits  # fmt: skip

    def packed(model):
        found = logits(model, tokens[:1], position_ids=positions % 12, use_cache=False)
        parts = tokens[:1].split(12, 1)
        alone = torch.cat([logits(model, part, use_cache=False) for part in parts], 1)
        torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-4)
        return found

    def step(model):
        model.zero_grad()
        model.train()(tokens, labels=tokens).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    kind, _, how = name.partition(" ")
    static = functools.partial(generated, cache_implementation="static")
    if kind == "llama":
        run, calls = {
            "dynamic cache": (lambda model: cached(model, 12, 3, 1), 4),
            "static cache": (lambda model: cached(model, 12, 1, 1, max_cache_len=20), 2),
            "generate": (generated, 8),
            "generate, static cache": (static, 2),
            "left padding": (lambda model: logits(model, mask=padded), 0),
            "generate, left padding": (lambda model: generated(model, padded[:, :9]), 0),
            "packed": (packed, 4),
            "training": (step, 2),
        }[how]
        return same_as("sdpa", small_model(kind), run, calls)
    if kind == "gpt_oss":  # sinks without a mask, with a window, with padding
        model = small_model(kind, layer_types=["sliding_attention", "full_attention"])
        model.set_experts_implementation("eager")
        some = lambda model: [logits(model), logits(model, tokens[:, :6]), logits(model, mask=padded)]
        return same_as("eager", model, lambda model: [*some(model), *generated(model)], 5)
    if kind == "mistral":
        run = lambda model: [logits(model), logits(model, tokens[:, :6]), *generated(model)]
        return same_as("sdpa", small_model(kind), run, 2)
    if kind == "gemma2":
        with raises(ValueError, "no softcap"):
            same_as("eager", small_model(kind), logits, calls=0)
        return same_as("eager", small_model(kind, attn_logit_softcapping=None), logits, 1)
    if kind == "bert":
        run = lambda model: [logits(model), logits(model, mask=padded)]
        return same_as("sdpa", small_model(kind), run, 2)
    if kind == "t5":  # each of its layers has a position_bias
        some = functools.partial(logits, decoder_input_ids=tokens[:, :9])
        run = lambda model: [some(model), some(model, mask=padded), *generated(model)]
        return same_as("sdpa", small_model(kind), run, 0)
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    run = functools.partial(logits, ids=sound, decoder_input_ids=tokens[:, :9])
    with raises(ValueError, "no output_attentions"):
        same_as("eager", small_model(kind), functools.partial(run, output_attentions=True), 0)
    return same_as("sdpa", small_model(kind), run, 3)


LLAMA = ("dynamic cache", "static cache", "generate", "generate, static cache", "left padding",
         "generate, left padding", "packed", "training")  # fmt: skip


def copied_files(module):
    """flash_attn.py and configs.py work where they are copied to, a folder or a package, beside a package or
    a module of others that is called configs, and import nothing else of ours."""
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
import configs
assert configs.THEIRS
"""
    with tempfile.TemporaryDirectory() as root:
        folder, theirs = Path(root, *module.split(".")[:-1]), Path(root, "configs.py")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("flash_attn.py", "configs.py"):
            shutil.copy(HERE / name, folder)
        if folder == Path(root):
            theirs = Path(root, "configs", "__init__.py")
            theirs.parent.mkdir()
        else:
            Path(folder, "use.py").write_text("from .flash_attn import flash_attention")
            script += "import app.ops.use\n"
        theirs.write_text("THEIRS = True")
        Path(root, "caller.py").write_text(script)
        child = subprocess.run([sys.executable, "caller.py"], cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr.strip()[-500:]
    return "runs there"


# ---- Machine code ----------------------------------------------------------------------------------
NO_CUTE = importlib.util.find_spec("cutlass") is None
LOWER_RIGHT = CAUSAL["lower_right"]
# What flash_attention takes by itself on sm, for head dims, and its gradient; sm_90's is in best_specialised.
# sm_86 and sm_89 have sm_80's instructions and less shared memory.
BEST = {89: ((32, 64, 128, 256), (128, 256)), 100: ((32, 64, 128, 256), (128, 256)), 120: ((128,), (128,))}
VARIANTS = {  # of hopper_kernel: masked or not, online or not; of blackwell_kernel: causal or not, GQA, lengths
    "hopper": (("bfloat16",), ("float16",), ("bfloat16", LOWER_RIGHT, 1, 4096, 4097), ("float16", True)),
    "gradient": (("bfloat16",), ("float16", True), ("bfloat16", LOWER_RIGHT, 1, 4096, 4097)),
    "blackwell": (("bfloat16",), ("bfloat16", True, 4), ("bfloat16", False, 1, 384), ("float16", True)),
}  # fmt: skip


def fits(job, code, spilled=128):
    """Each kernel fits on an SM and spills no data: a few addresses, at most so many bytes per thread."""
    assert "error" not in code, (job, code["error"])
    for kernel in (code, *code["then"]):
        assert kernel["ctas"] >= 1 and kernel["spilled"] <= spilled, (job, kernel)


def compiles(jobs, spilled=128, threads=None):
    """All of them fit. threads: how many the first kernel of each has."""
    for job, code in zip(jobs, compile_in_child(jobs)):
        fits(job, code, spilled)
        assert threads in (None, code["threads"]), (job, code)
    return f"{len(jobs)} of them fit, none spills data"


def best_config(sm):
    dims, of_gradient = BEST[sm]
    return compiles([*((None, sm, dim) for dim in dims), *(("gradient", sm, dim) for dim in of_gradient)])


def report_config(sm):
    """The report's configs compile; how much they spill is in the README."""
    return compiles([(config, sm) for config in configs.CONFIGS.values()], math.inf)


def hopper_variants(name):
    """hopper_kernel is specialised, 12 warps."""
    return compiles([(NAMED[name], 90, dim_of(name), *case) for case in VARIANTS["hopper"]], threads=384)


def best_specialised(head_dim):
    """On sm_90, with a Triton of configs.SPECIALISED: the forward is specialised, also where lse is exact; of the
    gradient's kernels dkdv_kernel up to D = 128, and hopper_dq_kernel."""
    general = configs.hopper_general(head_dim), 90, head_dim
    many, few = (None, 90, head_dim), (None, 90, head_dim, "bfloat16", False, 1, 200, 4096)  # queries; many keys
    of_gradient = [("gradient", 90, head_dim, *case) for case in VARIANTS["gradient"]]
    jobs = [general, *of_gradient] if head_dim > 64 else [general, many, few, *of_gradient]
    codes, threads = dict(zip(jobs, compile_in_child(jobs))), {64: [384, 384], 128: [384, 256], 256: [256, 256, 256]}[head_dim]
    for job, code in codes.items():
        fits(job, code)
    for code in map(codes.get, of_gradient):
        assert code["threads"] == 384 and [x["threads"] for x in code["then"]][-len(threads) :] == threads, code
    if head_dim == 64:  # HOPPER_64, and HOPPER, which takes more shared memory
        assert codes[many]["shared"] < codes[few]["shared"], ("the same tiles for both", codes[many], codes[few])
    return f"{len(codes)} of them fit, none spills data"


def blackwell_compiles(head_dim):
    """Helion's cute backend recognises blackwell_kernel: causal or not, GQA, where 256 does not divide the length.
    With another order of programs it does not: an error instead of a slow kernel."""
    if NO_CUTE:
        raise Skipped("needs helion[cute]")
    line = compiles([(configs.BLACKWELL_CUTE, 100, head_dim, *case) for case in VARIANTS["blackwell"]], spilled=16)
    plan = configs.Plan("blackwell", 128, 128, helion.Config(**configs.BLACKWELL_CUTE.config.config | {"l2_groupings": [4]}))
    code = compile_in_child([(plan, 100, head_dim)])[0]
    assert "did not recognise blackwell_kernel" in code.get("error", ""), code
    return line


def blackwell(dim, dtype):
    """blackwell_kernel and its lse; without a GPU as Triton code, which scales q in q's dtype."""
    if GPU and (NO_CUTE or torch.cuda.get_device_capability()[0] != 10):
        raise Skipped("needs helion[cute] and a GPU of compute capability 10.x, or none")
    for length, heads, is_causal in ((256, 4, False), (384, 1, True)):
        q, k, v = make((1, 4, length, dim), dtype, heads=heads)
        options = dict(config=NAMED["blackwell"], is_causal=is_causal, enable_gqa=True)
        kernels, (out, lse) = bound(flash_attention, q, k, v, return_lse=True, **options)
        assert kernels == {"_blackwell_kernel"}, kernels
        line = compare(out, q, k, v, is_causal=is_causal, lse=lse, atol=2e-2)
        assert torch.equal(flash_attention(q, k, v, **options), out)
    return line


def blackwell_leaves():
    """What blackwell_kernel does not take, general_kernel computes."""
    if GPU and torch.cuda.get_device_capability()[0] != 10:
        raise Skipped("needs a GPU of compute capability 10.x, or none")
    forget()
    q, k, v = make((1, 2, 256, 64))
    apart = torch.cat([q, q], -1)[..., :64]
    for qkv, options in (((q[:, :, :129], k, v), {}), ((q, k[:, :, :128], v[:, :, :128]), {}), ((q, k, v), {"scale": 0.1}),
                         ((apart, k, v), {}), (make((1, 2, 256, 64), "float32"), {}), (make((1, 2, 128, 32)), {})):  # fmt: skip
        kernels, out = bound(flash_attention, *qkv, **options, config=NAMED["blackwell"])
        assert "_blackwell_kernel" not in kernels, "it was taken"
        line = compare(out, *qkv, **options)
    return line


# ---- All of them -----------------------------------------------------------------------------------


def cases(draws):
    """[(function, arguments)], grouped so that one worker process compiles a group's kernel once.
    draws: how many random heads `search` tries for each config and dtype."""
    plans = ("hopper", "general", "default") if GPU else ("hopper", "default")  # which is general's without a GPU
    of_dims = [name for name in NAMED if name.startswith("hopper_")]
    of = lambda name: ("bfloat16", "float16") if name in ("hopper", "general") else DTYPES
    # The slow ones first, so that no worker is left alone with them.
    for sm in BEST:
        yield [(best_config, (sm,))]
    for name in (*of_dims, "hopper"):
        yield [(hopper_variants, (name,))]
    for dim in (64, 128, 256):
        yield [(best_specialised, (dim,))]
    for dim in (64, 128):
        yield [(blackwell_compiles, (dim,))]
    for sm in (90, 100):
        yield [(report_config, (sm,))]
    yield [(training, ("eager",))]
    yield [(training, ("compile",))]
    for name in ("default", "hopper"):
        for kind in CAUSAL:
            for dtype in DTYPES if name == "default" else ("bfloat16",):
                yield [(gradients, (name, kind, dtype))]
        for dtype in DTYPES if name == "default" else ("bfloat16",):
            yield [(hard_gradients, (name, dtype))]
    for name in ("hopper", "default"):
        for dtype in of(name):
            # Only hopper in bfloat16 has edges, without a running maximum.
            skip = ("mixed", "many_keys", *["edges"] * ((name, dtype) != ("hopper", "bfloat16")))
            yield [(hard_rows, (name, "many_keys", dtype)), (search, (name, dtype, draws))]
            yield [(hard_rows, (name, kind, dtype)) for kind in HARD if kind not in skip]
    for name in (*configs.CONFIGS, *plans):
        for dtype in of(name):
            # hopper takes no D = 256, and the report's three configs share a kernel
            dims = [f"D={dim}" for dim in HEAD_DIMS if not (name == "hopper" and dim == 256 or name in configs.CONFIGS and dim == 32)]
            yield [(attention, (name, kind, dtype)) for kind in dims if dtype != "float32" or kind != "D=256"]
            if name in plans:
                yield [(attention, (name, kind, dtype)) for kind in ("upper_left", "lower_right")]
                yield [(padded_head_dims, (name, dtype)), (unseen, (name, dtype))]
        yield [(attention, (name, "lengths", "bfloat16")), (layouts, (name,))]
    for name in ("hopper_64", "hopper_256"):
        for dtype in ("bfloat16", "float16"):
            yield [(attention, (name, kind, dtype)) for kind in ("lengths", "upper_left", "lower_right")]
            yield [(padded_head_dims, (name, dtype)), (unseen, (name, dtype))]
        some = ("shifts_in_one_head", "large_values", "lower_level", "upper_level", "many_keys")
        yield [(hard_rows, (name, kind, "bfloat16")) for kind in some]
    for name in ("hopper_96", "hopper_192"):  # the same tiles, and heads in two parts
        yield [(attention, (name, kind, "bfloat16")) for kind in ("lengths", "upper_left", "lower_right")]
        yield [(attention, (name, "upper_left", "float16")), (unseen, (name, "bfloat16")), (layouts, (name,))]
        yield [(hard_rows, (name, kind, "bfloat16")) for kind in ("shifts_in_one_head", "large_values")]
    yield [(special_values, ("tile128",)), (hard_rows, ("tile128", "mixed", "bfloat16"))]
    for name in plans:
        yield [(special_values, (name,)), (another_call, (name,)), (split_keys, (name,)), (saved_lse, (name,))]
        yield [(large_tensor, (name,))]
    for dim in (64, 128):
        yield [(blackwell, (dim, dtype)) for dtype in ("bfloat16", "float16")]
    yield [(blackwell_leaves, ())]
    for module in ("flash_attn", "app.ops.flash_attn"):
        yield [(copied_files, (module,))]
    yield [(bad_input, ())] + [(asked_for, case) for case in (("default", D), ("hopper", 64), ("hopper", 192))]
    yield [(in_torch, (name,)) for name in ("opcheck", "gradcheck", "compile", "sdpa", "export", "autocast", "errors")]
    yield [(readme_block, (i,)) for i in range(len(readme_blocks()))] + [(transformers_model, ())]
    yield [(sdpa_lower_right, (how,)) for how in ("eager", "compile")]
    yield [(unseen_by_all, ()), (clear_errors, ())]
    yield [(dispatch_modes, (name,)) for name in ("make_fx", "flops", "selective", "logging")]
    yield [(nothing_is_kept, (name,)) for name in ("wide", "tile128", *plans)]
    yield [(recipe_values, ()), (recipe_compiles, ()), (recipe_keywords, ())]
    yield [(models, (f"llama {how}",)) for how in LLAMA]
    yield [(models, (name,)) for name in MODELS if name != "llama"]
    if GPU:
        yield [(threads, ()), (capture, ())]
        for name in (*configs.CONFIGS, *plans, *of_dims):
            yield [(same_bits, (name,))]
        for name in plans:
            yield [(compiles_nothing, (name,))]
        for name in (*configs.CONFIGS, "hopper"):
            yield [(report_shape, (name, *row[0])) for row in PUBLISHED.get(name, PUBLISHED["tile128"])]


def label(case):
    function, arguments = case
    return " ".join([function.__name__, *map(str, arguments)])


def prepare():
    """A worker's start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # It fills new memory with NaN, so that an element that nobody writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)  # the workers have all the cores already


def run(group):
    """[(label, "ok", "skip" or "FAIL", text)] of one group, in a worker process."""
    results = []
    for case in group:
        function, arguments = case
        of_hopper = function is not hopper_variants and any(str(x).startswith("hopper") for x in arguments)
        try:
            if GPU and of_hopper and torch.cuda.get_device_capability()[0] != 9:
                raise Skipped("needs a GPU of compute capability 9.x, or none")
            results.append((label(case), "ok", function(*arguments)))
        except Skipped as reason:
            results.append((label(case), "skip", str(reason)))
        except Exception as error:
            text = str(error).strip()[:600] or traceback.format_exc(limit=-1)
            results.append((label(case), "FAIL", f"{type(error).__name__}: {text}"))
        if GPU:  # which has as much memory for all workers
            torch.cuda.empty_cache()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="REGEX", default="", help="run only the cases in whose name it is found")
    parser.add_argument("--search", metavar="N", type=int, default=64 if GPU else 32, help="random heads per config and dtype")
    args = parser.parse_args()
    groups = [[case for case in group if re.search(args.k, label(case))] for group in cases(args.search)]
    groups, workers = [group for group in groups if group], min(16, os.cpu_count() or 1)
    total, count = sum(map(len, groups)), dict.fromkeys(("ok", "FAIL", "skip"), 0)
    where = torch.cuda.get_device_name() if GPU else "the CPU, in Triton's interpreter: no GPU was found"
    print(f"Executing on {where}.\n{total} cases in {workers} processes; torch {torch.__version__}, triton "
          f"{triton.__version__}, helion {importlib.metadata.version('helion')}.", flush=True)  # fmt: skip
    with concurrent.futures.ProcessPoolExecutor(workers, SPAWN, prepare) as pool:
        jobs = {pool.submit(run, group): group for group in groups}
        for job in concurrent.futures.as_completed(jobs):
            died = job.exception() and f"a process died, here or in another case: {job.exception()}"
            for name, outcome, text in [(label(case), "FAIL", died) for case in jobs[job]] if died else job.result():
                count[outcome] += 1
                alone = f"\n     alone: python check.py -k '^{name}$'" if outcome == "FAIL" else ""
                print(f"{outcome:4s} {name}: {text}{alone}", flush=True)
    if not total:
        print(f"{args.k!r} is in no case's name")
    skipped = f", {count['skip']} skipped" if count["skip"] else ""
    print(f"{count['ok']} passed, {count['FAIL']} failed{skipped}")
    return 1 if count["FAIL"] or not count["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())

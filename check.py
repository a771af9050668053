"""Is the kernel right? Run it against PyTorch's SDPA and print every error beside its bound.

    python check.py             # everything; the last line is `N passed, N failed`
    python check.py -k hopper   # only the cases with "hopper" in their name

On a GPU this runs the real kernels. Without one it executes the Triton code that Helion generates,
with its tiles, masks and program order, in Triton's interpreter, and compiles it for GPUs that are
not here with the compiler that Triton brings along.
"""
import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
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

import configs
import helion
import flash_attn
from flash_attn import HEAD_DIMS, LOG2E, bind, flash_attention, select, tensors_of

DEVICE = "cuda" if GPU else "cpu"
D = 128 if GPU else 64  # head dim of most cases; the interpreter is slow
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in flash_attn.DTYPES}
NAMED = {**configs.CONFIGS, "hopper": configs.HOPPER, "hopper_online": configs.HOPPER_ONLINE}

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

    libdevice.exp2 = lambda x: tl.exp2(x)  # it has no libdevice
    helion._compat._supports_tensor_descriptor = lambda: True  # but TMA it executes, and helion
    supports = ConfigSpec.supports_config_key  # only has to be told
    ConfigSpec.supports_config_key = (
        lambda self, key: key == "host_tensor_descriptors" or supports(self, key)
    )
    helion.runtime.get_num_sm = lambda device, *, reserved_sms=0: 2  # persistent grids ask for it
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):  # it keeps bf16 as uint16, and would multiply these integers
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
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
    with contextlib.ExitStack() as stack:
        for target, value in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.get_device_capability": lambda device=None: capability,
            "torch.cuda.get_device_properties": lambda index=None: device,
            "torch.version.cuda": "13.0",
        }.items():
            stack.enter_context(mock.patch(target, value))
        for owner, name, value in (
            (DeviceProperties, "create", lambda device: properties),
            (CompileEnvironment, "tensor_descriptor_base_is_aligned", lambda self, tensor: True),
            (FakeTensor, "data_ptr", lambda self: 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        yield


def machine_code(config, sm, head_dim=128, dtype="bfloat16"):
    """Compile one config for compute capability sm / 10; no such GPU is needed.

    Returns a dict: registers per thread, spilled bytes per thread, shared memory in bytes, CTAs
    that fit on an SM (0: it does not), and the tensor-core instruction in the machine code, or "none".
    Triton must not be in interpreter mode: see compile_in_child.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel, constants, config = select(config, head_dim**-0.5 * LOG2E)
    shorts = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    launched = {}

    def launcher(fn, grid, *args, num_warps, num_stages, **options):
        """What helion calls to launch: remember it instead."""
        launched.update(fn=fn, args=args, options=dict(options, num_warps=num_warps, num_stages=num_stages))

    with tempfile.TemporaryDirectory() as folder:
        with pretend(sm):
            qkv = (torch.empty(16, 64, 4096, head_dim, dtype=DTYPES[dtype], device="cuda") for _ in "qkv")
            tensors = tensors_of(kernel, *qkv)
            source = Path(folder, "generated.py")
            source.write_text(bind(kernel, (*tensors, *constants)).to_triton_code(config))
            spec = importlib.util.spec_from_file_location("generated", source)
            generated = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(generated)
            getattr(generated, kernel.name)(*tensors, *constants, _launcher=launcher)
        signature, constexprs, attributes = {}, {}, {}
        for i, (param, arg) in enumerate(zip(launched["fn"].params, launched["args"])):
            if param.is_constexpr:
                signature[param.name], constexprs[param.name] = "constexpr", arg
            elif isinstance(arg, TensorDescriptor):
                block = str(list(arg.block_shape)).replace(" ", "")
                signature[param.name] = f"tensordesc<{shorts[arg.base.dtype]}{block}>"
            else:
                signature[param.name], attributes[(i,)] = f"*{shorts[arg.dtype]}", [["tt.divisibility", 16]]
        source = ASTSource(launched["fn"], signature, constexprs, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launched["options"])
        tmem = getattr(compiled.metadata, "tmem_size", None) or 0
        if tmem > 512:  # the code is empty, and a launch would raise OutOfResources
            raise RuntimeError(f"needs {tmem} columns of tensor memory, an SM has 512")
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = run(tools / "cuobjdump", "-res-usage", cubin)
        sass = run(tools / "nvdisasm", "-c", cubin)
    registers, spilled = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared  # with the loading warps
    kib = CHIPS[sm][1]
    names = {"UTCHMMA": "tcgen05 (UTCHMMA)", "HGMMA": "wgmma (HGMMA)", "HMMA": "mma (HMMA)"}
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "ctas": min(65536 // (registers * threads), (kib << 10) // (shared + 1024), 2048 // threads),
        "instruction": next((names[op] for op in names if re.search(rf"\b{op}\b", sass)), "none"),
    }


def compile_in_child(jobs):
    """machine_code for each (helion.Config, sm, head dim, dtype), in a child process.

    The child has the interpreter off. Returns a list of dicts; {"error": reason} where the compiler
    refused.
    """
    child = subprocess.run(
        [sys.executable, __file__, "--compile", json.dumps([(c.to_json(), *rest) for c, *rest in jobs])],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )
    found = [json.loads(line[5:]) for line in child.stdout.splitlines() if line.startswith("CODE ")]
    reason = (child.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return found + [{"error": f"the compiler died: {reason}"}] * (len(jobs) - len(found))


# ---- The cases -----------------------------------------------------------------------------------
# Each is a function that raises where the kernel is wrong, and returns the line to print.


def reference(q, k, v, scale=None):
    """Attention by its definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * (q.size(-1) ** -0.5 if scale is None else scale)
    return scores.softmax(-1) @ v


def compare(out, q, k, v, scale=None):
    """Hold out to flash-attention's own bound (its tests/test_flash_attn.py): at most twice the
    error of PyTorch's SDPA in the same dtype against a float64 reference, plus rounding.
    Rows with NaN or inf must be the rows that have it in SDPA's math backend. (The fast backends
    lose some: the CPU's turns a NaN of inf - inf into a number.)"""
    assert out.shape == q.shape and out.dtype == q.dtype, (out.shape, out.dtype)
    sdpa, ref = F.scaled_dot_product_attention(q, k, v, scale=scale), reference(q, k, v, scale)
    finite = ref.isfinite().all(-1)
    if not finite.all():
        with sdpa_kernel(SDPBackend.MATH):
            plain = F.scaled_dot_product_attention(q, k, v, scale=scale)
        assert torch.equal(plain.isfinite().all(-1), finite), "SDPA's math backend has other rows"
    assert torch.equal(out.isfinite().all(-1), finite), "not finite in other rows than SDPA"
    ref = ref[finite]
    low = ref.to(q.dtype)
    rounding = (low + 0.3 - 0.3 - low).abs().max().item()
    bound = 2 * (sdpa[finite] - ref).abs().max().item() + 2 * rounding
    error = (out[finite] - ref).abs().max().item()
    assert error <= bound, f"error {error:.2e} > bound {bound:.2e}"
    return f"error {error:.2e} <= bound {bound:.2e}"


def make(shape, dtype="bfloat16", keys=None, seed=0):
    """Random normal q: [B, H, S, D] and k, v: [B, H, keys, D]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    B, H, S, D = shape
    return [
        torch.randn(B, H, n, D, generator=generator, device=DEVICE).to(DTYPES[dtype])
        for n in (S, keys or S, keys or S)
    ]


def random_input(config, shape, dtype="bfloat16", keys=None):
    q, k, v = make(shape, dtype, keys)
    try:
        out = flash_attention(q, k, v, config=None if config == "default" else NAMED[config])
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


def report_shape(config, shape):
    """A shape of the report, on a GPU; the float64 reference is taken of two heads."""
    q, k, v = make(shape)
    out = flash_attention(q, k, v, config=NAMED[config])
    assert out.isfinite().all()
    lines = [compare(*(x[b, h][None, None] for x in (out, q, k, v))) for b, h in ((0, 0), (-1, -1))]
    return lines[-1]


def strided(config):
    """[B, S, H, D] transposed, k and v out of one packed tensor, and rows that are not aligned."""
    q = make((2, 129, 2, D))[0].transpose(1, 2)
    k, v = torch.cat(make((2, 2, 300, D))[:2], -1).split(D, -1)
    line = compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)
    k, v = (torch.cat([x, x], -1)[..., 1 : D + 1] for x in (k, v))
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    compare(flash_attention(q, k, v, config=NAMED[config]), q, k, v)
    return line


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
    q, k, v = make((2, 2, 129, D))
    mean = flash_attention(q, k, v, scale=0, config=NAMED[config])  # cuDNN gives NaN here
    expected = v.mean(2, keepdim=True, dtype=torch.float64).expand_as(mean)
    torch.testing.assert_close(mean.double(), expected, atol=1e-3, rtol=1e-2)
    return compare(flash_attention(q, k, v, scale=0.3, config=NAMED[config]), q, k, v, 0.3)


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
    q, k, v = make((4, 32, 1024, D) if GPU else (2, 2, 129, D))
    first, runs = flash_attention(q, k, v, config=NAMED[config]), 500 if GPU else 1
    for _ in range(runs):
        assert torch.equal(flash_attention(q, k, v, config=NAMED[config]), first)
    return f"the same bits as the first, {runs} times"


def every_element_written(config):
    """torch.empty is poisoned with NaN, so an element that nobody writes shows."""
    q, k, v = make((2, 2, 129, D))
    config, poisoned = NAMED[config], []
    flash_attention(q, k, v, config=config)  # compiled before torch.empty is another

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.dtype == q.dtype:  # scratch space for descriptors is int8
                poisoned.append(x.fill_(float("nan")))
            return x

        return poisoned_allocate

    with mock.patch("torch.empty", poison(torch.empty)), mock.patch(
        "torch.empty_like", poison(torch.empty_like)
    ):
        out = flash_attention(q, k, v, config=config)
    assert any(x.data_ptr() == out.data_ptr() for x in poisoned), "out was not poisoned"
    return compare(out, q, k, v)


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
        "unsupported head dim": (ValueError, "q", lambda: flash_attention(*(x[..., :48] for x in (q, k, v)))),
        "device": (ValueError, "k", lambda: flash_attention(q, k.to("meta"), v)),
        "empty": (ValueError, "k", lambda: flash_attention(q, k[:, :, :0], v[:, :, :0])),
        "requires grad": (ValueError, "q", lambda: flash_attention(grad, k, v)),
        "not a tensor": (TypeError, "v", lambda: flash_attention(q, k, [1.0])),
        "scale": (ValueError, "scale", lambda: flash_attention(q, k, v, scale=float("nan"))),
        "config": (TypeError, "config", lambda: flash_attention(q, k, v, config="tile128")),
        "config for 16 bits": (ValueError, "config", lambda: flash_attention(
            q.float(), k.float(), v.float(), config=configs.HOPPER)),
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


def copied_files():
    """flash_attn.py and configs.py work in an empty folder and import nothing else of ours."""
    script = f"""
import sys
import torch
{'' if GPU else inspect.getsource(patch_interpreter) + 'import flash_attn, helion; patch_interpreter()'}
from flash_attn import flash_attention
q, k, v = torch.randn(3, 1, 2, 100, 64, device={DEVICE!r}, dtype=torch.float16)
out, sdpa = flash_attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(out, sdpa, atol=2e-3, rtol=2e-3)
ours = [m for m in sys.modules.values() if {str(HERE)!r} in str(getattr(m, "__file__", ""))]
assert not ours and "check" not in sys.modules and "bench" not in sys.modules, ours
"""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("flash_attn.py", "configs.py"):
            shutil.copy(HERE / name, folder)
        Path(folder, "caller.py").write_text(script)
        child = subprocess.run([sys.executable, "caller.py"], cwd=folder, capture_output=True, text=True)
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
    ("hopper", 90): ("wgmma", 0, 32), ("hopper_online", 90): ("wgmma", 0, 0),
}  # fmt: skip


def cross_compile(config, sm):
    code = compile_in_child([(NAMED[config], sm, 128, "bfloat16")])[0]
    assert "error" not in code, code["error"]
    instruction, least, most = CLAIMS[config, sm]
    assert code["instruction"].startswith(instruction + " "), code
    assert least <= code["spilled"] <= most, code
    return f"{code['instruction']}, {code['registers']} registers, {code['spilled']} B spilled"


def default_config(sm):
    """What flash_attention takes when no config is named fits and does not spill, for each head dim.
    hopper at D = 128 may do what CLAIMS says."""
    best = lambda dim: configs.best(divmod(sm, 10), dim, torch.bfloat16, 4096)
    for dim, code in zip(HEAD_DIMS, compile_in_child([(best(d), sm, d, "bfloat16") for d in HEAD_DIMS])):
        assert "error" not in code, (dim, code["error"])
        most = CLAIMS["hopper", 90][2] if (sm, dim) == (90, 128) else 0
        assert code["ctas"] >= 1 and code["spilled"] <= most and code["instruction"] != "none", (dim, code)
    return "all head dims fit, none spills" + (" data" if sm == 90 else "")


def cases():
    """[(function, arguments)], grouped so that one worker process compiles a group's kernel once."""
    shared = (strided, large_logits, rising_scores, low_scores, huge_values, given_scale, identical_keys,
              not_finite, same_bits, every_element_written)  # fmt: skip
    # The slow ones first, so that no worker is left alone with them. sm_86 has the instructions of
    # sm_80 and the shared memory of sm_89.
    for sm in (80, 89, 90, 100, 120):
        yield [(default_config, (sm,))]
    for key in CLAIMS:
        yield [(cross_compile, key)]
    for name in NAMED:
        yield [(case, (name,)) for case in shared]
        warps = name == "hopper"  # which takes no float32 and no D = 256
        dims = (16, 64, 128) if warps else (16, 64, 128, 256)
        for dtype in ("bfloat16", "float16"):
            yield [(random_input, (name, (1, 2, 129, dim), dtype, 300)) for dim in dims]
        yield [(random_input, (name, (1, 2, 64, dim), "float32", 150)) for dim in (16, 64, 128) if not warps]
        yield [(random_input, (name, (2, 1, n, D))) for n in (1, 17, 128, 129, 300)]
        yield [(random_input, (name, (1, 3, 300, D), "bfloat16", keys)) for keys in (1, 129, 520)]
    yield [(random_input, ("default", (1, 2, 100, dim), dtype)) for dim in (32, 256) for dtype in DTYPES]
    yield [(bad_input, (name,)) for name in (
        "rank", "batch", "heads", "head dim", "length of v", "mixed dtype", "dtype", "unsupported head dim",
        "device", "empty", "requires grad", "not a tensor", "scale", "config",
        "config for 16 bits", "cpu")]  # fmt: skip
    yield [(copied_files, ())] + [(report_arithmetic, (name,)) for name in PUBLISHED]
    if GPU:
        for name in PUBLISHED:
            yield [(report_shape, (name, row[0])) for row in PUBLISHED[name]]
        yield [(report_shape, ("hopper", row[0])) for row in PUBLISHED["tile128"]]


def label(case):
    function, arguments = case
    return " ".join([function.__name__, *(str(a).replace(" ", "") for a in arguments)])


def run(group):
    """[(label, passed, text)] of one group, in a worker process."""
    results = []
    for function, arguments in group:
        try:
            results.append((label((function, arguments)), True, function(*arguments)))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip()[:600] or traceback.format_exc(limit=-1)}"
            results.append((label((function, arguments)), False, text))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="TEXT", default="", help="run only the cases whose name has TEXT in it")
    parser.add_argument("--compile", metavar="JSON", help=argparse.SUPPRESS)  # see compile_in_child
    args = parser.parse_args()
    if args.compile:
        for config, sm, head_dim, dtype in json.loads(args.compile):
            try:
                code = machine_code(helion.Config.from_json(config), sm, head_dim, dtype)
            except Exception as error:
                code = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            print("CODE", json.dumps(code), flush=True)
        return 0
    print(f"on {torch.cuda.get_device_name() if GPU else 'the CPU, through Triton`s interpreter'}, "
          f"torch {torch.__version__}, helion {importlib.metadata.version('helion')}", flush=True)  # fmt: skip
    groups = [[case for case in group if args.k in label(case)] for group in cases()]
    passed = failed = 0
    workers = min(16, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        jobs = [pool.submit(run, group) for group in groups if group]
        for job in concurrent.futures.as_completed(jobs):
            for name, ok, text in job.result():
                passed, failed = passed + ok, failed + (not ok)
                print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
    if not passed + failed:
        print(f"no case has {args.k!r} in its name")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())

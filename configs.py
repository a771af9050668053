"""The tilings of the kernels in flash_attn.py, and the functions that pick one.

First the three configurations of the report that this project began with ("the report" here: NVIDIA
B200, bf16, 2026-01-24, Helion against SDPA; its tables are in the README), then ours.
"""
import dataclasses
import functools
import warnings

import torch
import torch._inductor.runtime.triton_compat as triton_compat

if not hasattr(triton_compat, "IntelGPUError"):
    # helion 1.5.1 imports this name, which torch has from 2.12 on. Nothing raises it here.
    triton_compat.IntelGPUError = type("IntelGPUError", (Exception,), {})

import helion
import triton

# ---- The published report: report_kernel ---------------------------------------------------------
# block_sizes: [batch * head, query, key]. indexing: load q, load k, load v, store out.

# From Helion's autotuner for [16, 64, 4096, 128], as the report prints it. The listing ends in
# "# ...": other fields have Helion's defaults. 32 x 16 tiles are too small for wgmma (64 rows) and
# tcgen05 (128 rows): sm_90 and sm_100 run HMMA, Ampere's instruction, and SDPA is faster.
AUTOTUNED = helion.Config(
    block_sizes=[2, 32, 16],
    indexing=["tensor_descriptor", "pointer", "tensor_descriptor", "tensor_descriptor"],
    l2_groupings=[4],
    load_eviction_policies=["last", "last", ""],
    loop_orders=[[0, 1]],
    num_stages=8,
    num_warps=2,
    pid_type="flat",
)
# The report says only "tensor_descriptor (TMA) and persistent_blocked scheduling". Still HMMA.
TMA_PERSISTENT = helion.Config(
    **{**AUTOTUNED.config, "indexing": ["tensor_descriptor"] * 4, "pid_type": "persistent_blocked"}
)
# The report says: 128 x 128 tiles, 4 warps, flat, "standard pointer loads". Two stages and the loop
# order are ours: query tiles of one head run back to back, so that its K and V stay in L2. wgmma on
# sm_90, tcgen05 on sm_100; 4 warps have too few registers: 184 and 1,048 bytes spilled.
TILE128 = helion.Config(
    block_sizes=[1, 128, 128],
    indexing=["pointer"] * 4,
    loop_orders=[[1, 0]],
    num_stages=2,
    num_warps=4,
    pid_type="flat",
)
CONFIGS = {"autotuned": AUTOTUNED, "tma_persistent": TMA_PERSISTENT, "tile128": TILE128}

# ---- Ours ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)  # equal by identity: a Config is slow to hash
class Tuning:
    """A kernel of flash_attn.py and what it is compiled with."""
    kernel: str  # "forward", "hopper_forward", "delta", "dkdv", "dq": <name>_kernel; "hopper_dkdv":
    # dkdv_kernel with tma; "hopper_dq": hopper_dq_kernel; "blackwell": report_kernel with cute
    block_m: int  # queries a tile
    block_n: int  # keys a tile
    helion_config: helion.Config
    head_dim: int = 256  # of "hopper_forward": the largest one that it has registers for


def _tuning(kernel, block_m, block_n, num_warps, num_stages, **options):
    config = helion.Config(num_warps=num_warps, num_stages=num_stages, **options)
    return Tuning(kernel, block_m, block_n, config)


def _general(block_m, block_n, num_warps, num_stages):
    """Of forward_kernel. As in TILE128, query tiles of one head run back to back."""
    return _tuning("forward", block_m, block_n, num_warps, num_stages, loop_orders=[[1, 0]])


def _gradient(dkdv, dq, dk=None):
    """Of dkdv_kernel, of dq_kernel, and of dkdv_kernel for dk alone, or None: with dkdv's block_n,
    at most 128. Each argument: block_m, block_n, num_warps, num_stages."""
    return _tuning("dkdv", *dkdv), _tuning("dq", *dq), _tuning("dkdv", *dk) if dk else None


# Triton versions with which check.py has seen on a GPU that the Hopper kernels are right. With
# another one the plain kernels run. The first two need inval_dead_mbarriers of flash_attn.py.
DEAD_MBARRIERS = triton.__version__.startswith(("3.6.", "3.7."))
SPECIALISED = DEAD_MBARRIERS or triton.__version__.startswith(("3.8.", "3.9."))

# Hopper, bf16 and fp16, D up to 128. One program per SM: q, a last V and two stages of K and V fill
# shared memory. num_warps is that of one warpgroup; there are three. maxnreg is a thread's share;
# Triton moves registers from the loading warpgroup to the others.
_HOPPER = helion.Config(
    host_tensor_descriptors=True, indexing="tensor_descriptor", maxnreg=168, num_stages=2,
    num_warps=4, pid_type="persistent_interleaved", range_num_stages=[1, 2],
    range_warp_specializes=[None, True])  # fmt: skip
HOPPER = Tuning("hopper_forward", 128, 128, _HOPPER, head_dim=128)
HOPPER_64 = Tuning("hopper_forward", 256, 64, _HOPPER, head_dim=64)  # reads K half as often
HOPPER_256 = Tuning("hopper_forward", 128, 64, _HOPPER)  # 229,664 of 232,448 bytes shared
# forward_kernel on Hopper: small calls, two CTAs an SM; the fix-up and what no Hopper kernel takes.
HOPPER_FEW = _general(64, 64, 4, 3)
HOPPER_GENERAL, HOPPER_GENERAL_256 = _general(128, 128, 8, 2), _general(128, 64, 8, 2)
# hopper_dkdv keeps k and v of a tile in shared memory, hopper_dq q and do; TMA loads the rest.
# hopper_dq: D = 64, and D = 128 with `visible`, where the size of ds is not known.
_HOPPER_GRADIENT = dict(host_tensor_descriptors=True, indexing="tensor_descriptor", pid_type="flat",
                        range_num_stages=[0, 2], range_warp_specializes=[None, True])  # fmt: skip
HOPPER_DKDV = _tuning("hopper_dkdv", 64, 128, 4, 2, **_HOPPER_GRADIENT)
HOPPER_DKDV_64 = _tuning("hopper_dkdv", 128, 128, 4, 2, **_HOPPER_GRADIENT)
HOPPER_DQ = _tuning("hopper_dq", 128, 64, 4, 2, **_HOPPER_GRADIENT)
HOPPER_DQ_64 = _tuning("hopper_dq", 128, 128, 4, 2, **_HOPPER_GRADIENT)
# D > 128: a launch of its own for dk is 1.4x faster; dk and dv together do not fit in registers.
HOPPER_GRADIENT = _gradient((64, 128, 8, 2), (128, 64, 8, 3))
HOPPER_GRADIENT_256 = _gradient((64, 128, 8, 1), (128, 64, 8, 4), (64, 128, 8, 4))

# sm_100 by Helion's cute backend: compiled, never run, so `best` does not pick it. The backend
# needs these tiles and chooses everything else.
BLACKWELL_CUTE = Tuning("blackwell", 128, 128, helion.Config(block_sizes=[1, 128, 128]))

# forward_kernel for few queries, by rows a tile and padded head dim, and merge_kernel. Three stages
# of 16 KB of K and of V and two CTAs an SM take 0.9 to 1.1 of cuDNN's time (H200, one query).
DECODE = {(m, d): _tuning("forward", m, n, 8 if m * d > 2**13 else 4, 3) for m in (16, 32, 64)
          for d, n in ((16, 128), (32, 128), (64, 128), (128, 64), (256, 32))}  # fmt: skip
DECODE_WAVES = 2  # programs for each SM
MERGE = _tuning("merge", 1, 16, 4, 1)

# Other GPUs, by padded head dim. Chosen by machine code, not measured: tiles that fit in 100 KiB of
# shared memory (sm_86, sm_89, sm_120) and spill no data (`check.py -k best_config`).
GENERAL = {d: _general(128, 64, 4, 3) for d in (16, 32)} | {
    64: _general(128, 64, 8, 3), 128: _general(128, 32, 8, 2), 256: _general(64, 32, 8, 2),
}  # fmt: skip
FLOAT32 = {d: _general(64, 32, 4, 2) for d in (16, 32, 64)} | {  # three tf32 products for each
    128: _general(32, 16, 4, 2), 256: _general(16, 16, 8, 1)}  # fmt: skip
DELTA, RANGES = _tuning("delta", 64, 0, 8, 1), _tuning("ranges", 128, 0, 4, 1)
GRADIENT = {d: _gradient((64, 64, 4, 2), (128, 64, 8, 2)) for d in (16, 32, 64)} | {
    128: _gradient((64, 64, 8, 2), (128, 64, 8, 2)),
    256: _gradient((32, 32, 8, 2), (64, 64, 8, 2))}  # fmt: skip
GRADIENT_FLOAT32 = {d: _gradient((32, 32, 4, 1), (32, 32, 4, 1)) for d in (16, 32, 64)} | {
    128: _gradient((32, 16, 8, 1), (32, 32, 8, 1)),
    256: _gradient((16, 16, 8, 1), (32, 32, 8, 1))}  # fmt: skip


def padded(head_dim):
    """The power of two that the kernels pad a head dim to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def hopper_general(head_dim):
    """The Tuning of forward_kernel on Hopper."""
    return HOPPER_GENERAL_256 if head_dim > 128 else HOPPER_GENERAL


@functools.lru_cache
def warn_of_plain_kernels():
    """Once: Hopper with an untried Triton has plain kernels, 1.6 to 2.2 times the time (H200)."""
    warnings.warn(
        "The Hopper kernels of flash_attn.py were tried with Triton 3.6 to 3.9. With "
        f"{triton.__version__} plain kernels run, at half of the speed. To try the Hopper kernels: "
        "`python check.py -k hopper`, then flash_attention(..., config=configs.HOPPER)",
        stacklevel=2,
    )


def best(capability, head_dim, dtype, heads, M, N):
    """The Tuning of the forward.

    capability: (major, minor), or None on a CPU. head_dim: up to 256. dtype: of q, k and v.
    heads: B * H. M, N: numbers of queries and keys.
    """
    if dtype == torch.float32:
        return FLOAT32[padded(head_dim)]
    if capability == (9, 0):
        if not SPECIALISED:
            warn_of_plain_kernels()
        # Tiles for half, or all, of 132 SMs: with 64 rows and no fix-up 0.71 to 1.00 of the time.
        tiles = heads * -(-M // 128)
        if head_dim <= 128 and (tiles <= 66 and N <= 1024 or tiles <= 132 and N <= 512):
            return HOPPER_FEW
        if N <= 128 or not SPECIALISED:
            return hopper_general(head_dim)
        # 256-row tiles pay where little of the last tile is wasted and there are several waves.
        # fp16 is 2% (dense) to 7% (causal) slower with them.
        if head_dim <= 64 and dtype == torch.bfloat16 and M >= 1024 and heads * M >= 2**17:
            return HOPPER_64
        return HOPPER_256 if head_dim > 128 else HOPPER
    return GENERAL[padded(head_dim)]


def best_decode(head_dim, dtype, rows):
    """The Tuning of the forward for few queries. rows: H / Hk * M, at most 64."""
    if dtype == torch.float32:
        return FLOAT32[padded(head_dim)]
    return DECODE[min(m for m in (16, 32, 64) if m >= rows), padded(head_dim)]


def best_gradient(capability, head_dim, dtype, specialised=True, by_row=False):
    """The Tunings of dkdv_kernel, of the kernel for dq, and of dkdv_kernel for dk alone, or None.
    Arguments as for `best`. specialised: Hopper's specialised kernels may be taken. by_row: masked
    by `visible`."""
    block_d = padded(head_dim)
    if dtype == torch.float32:
        return GRADIENT_FLOAT32[block_d]
    if capability != (9, 0):
        return GRADIENT[block_d]
    if block_d == 256:
        return HOPPER_GRADIENT_256
    if block_d < 64 or not (specialised and SPECIALISED):
        return HOPPER_GRADIENT
    if block_d == 64:  # by_row: 128 queries a tile spill, and take 1.15 of the time
        return HOPPER_DKDV if by_row else HOPPER_DKDV_64, HOPPER_DQ_64, None
    return HOPPER_DKDV, HOPPER_DQ if by_row else HOPPER_GRADIENT[1], None

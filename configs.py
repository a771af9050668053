"""Every tuned constant of the kernels in flash_attn.py, and the functions that pick one.

First the published report's three configurations (NVIDIA B200, bf16, 2026-01-24), then ours.
"""
import dataclasses

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
# tcgen05 (128 rows): sm_90 and sm_100 run HMMA, Ampere's instruction. That is why it lost.
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
    """A kernel of flash_attn.py ("forward" for forward_kernel) and what it is compiled with."""
    kernel: str
    block_m: int  # queries a tile
    block_n: int  # keys a tile
    config: helion.Config
    head_dim: int = 256  # of hopper_forward_kernel: the largest that its tiles leave registers for


def _tuning(kernel, block_m, block_n, num_warps, num_stages, **options):
    config = helion.Config(num_warps=num_warps, num_stages=num_stages, **options)
    return Tuning(kernel, block_m, block_n, config)


def _general(*sizes):  # as TILE128: query tiles of one head run back to back
    return _tuning("forward", *sizes, loop_orders=[[1, 0]])


def _gradient(dkdv, dq, dk=None):
    """Of dkdv_kernel, of dq_kernel, and of dkdv_kernel for dk alone, or None."""
    return _tuning("dkdv", *dkdv), _tuning("dq", *dq), _tuning("dkdv", *dk) if dk else None


# Triton versions whose barriers inval_dead_mbarriers knows. With another one the plain kernels run.
SPECIALISED = triton.__version__.startswith(("3.6.", "3.7."))

# Hopper, bf16 and fp16, D up to 128. One program per SM: q, a last V and two stages of K and V fill
# shared memory. maxnreg is each of 12 warps' share; Triton moves registers from the loading warps.
HOPPER = Tuning("hopper_forward", 128, 128, helion.Config(
    host_tensor_descriptors=True, indexing="tensor_descriptor", maxnreg=168, num_stages=2,
    num_warps=4, pid_type="persistent_interleaved", range_num_stages=[1, 2],
    range_warp_specializes=[None, True]), head_dim=128)  # fmt: skip
HOPPER_64 = Tuning("hopper_forward", 256, 64, HOPPER.config, head_dim=64)  # reads K half as often
HOPPER_256 = Tuning("hopper_forward", 128, 64, HOPPER.config)  # 229,664 of 232,448 bytes shared
# forward_kernel on Hopper: the fix-up, and each call that hopper_forward_kernel does not take.
HOPPER_GENERAL, HOPPER_GENERAL_256 = _general(128, 128, 8, 2), _general(128, 64, 8, 2)
# The gradient keeps k and v of a tile in shared memory; TMA loads q, do and aug.
HOPPER_DKDV = Tuning("hopper_dkdv", 64, 128, helion.Config(
    host_tensor_descriptors=True, indexing=["tensor_descriptor"] * 3 + ["pointer"] * 3,
    num_stages=2, num_warps=4, pid_type="flat", range_num_stages=[0, 2],
    range_warp_specializes=[None, True]))  # fmt: skip
HOPPER_DKDV_64 = Tuning("hopper_dkdv", 128, 128, HOPPER_DKDV.config)
HOPPER_DQ_64 = Tuning("hopper_dq", 128, 128, helion.Config(
    **{**HOPPER_DKDV.config.config, "indexing": "tensor_descriptor"}))  # fmt: skip
# dk of D > 128 by a launch of its own (1.4x): with two sums in registers 64 x 128 tiles do not fit.
HOPPER_GRADIENT = _gradient((64, 128, 8, 2), (128, 64, 8, 3))
HOPPER_GRADIENT_256 = _gradient((64, 128, 8, 1), (128, 64, 8, 4), (64, 128, 8, 4))

# sm_100 by Helion's cute backend: compiled, never run, so `best` does not pick it. The backend
# needs these tiles and chooses everything else.
BLACKWELL_CUTE = Tuning("blackwell", 128, 128, helion.Config(block_sizes=[1, 128, 128]))

# Other GPUs, by padded head dim. Chosen by machine code, not measured: tiles that fit in 100 KiB of
# shared memory (sm_86, sm_89, sm_120) and spill no data (`check.py -k best_config`).
GENERAL = {d: _general(128, 64, 4, 3) for d in (16, 32)} | {
    64: _general(128, 64, 8, 3), 128: _general(128, 32, 8, 2), 256: _general(64, 32, 8, 2),
}  # fmt: skip
FLOAT32 = {d: _general(64, 32, 4, 2) for d in (16, 32, 64)} | {  # three tf32 products for each
    128: _general(32, 16, 4, 2), 256: _general(16, 16, 8, 1)}  # fmt: skip
DELTA = _tuning("delta", 64, 0, 8, 1)
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


def best(capability, head_dim, dtype, heads, M, N):
    """The Tuning of the forward.

    capability: (major, minor), or None on a CPU. head_dim: up to 256. dtype: of q, k and v.
    heads: B * H. M, N: numbers of queries and keys.
    """
    if dtype == torch.float32:
        return FLOAT32[padded(head_dim)]
    if capability == (9, 0):
        if N <= 128 or not SPECIALISED:
            return hopper_general(head_dim)
        # 256-row tiles pay where little of the last tile is wasted and there are several waves.
        # fp16 is 2% (dense) to 7% (causal) slower with them.
        if head_dim <= 64 and dtype == torch.bfloat16 and M >= 1024 and heads * M >= 2**17:
            return HOPPER_64
        return HOPPER_256 if head_dim > 128 else HOPPER
    return GENERAL[padded(head_dim)]


def best_gradient(capability, head_dim, dtype, specialised=SPECIALISED):
    """The Tunings of dkdv_kernel, of the kernel for dq, and of dkdv_kernel for dk alone, or None.
    Arguments as for `best`. specialised: Hopper's specialised kernels may be taken."""
    block_d = padded(head_dim)
    if dtype == torch.float32:
        return GRADIENT_FLOAT32[block_d]
    if capability != (9, 0):
        return GRADIENT[block_d]
    if block_d == 256:
        return HOPPER_GRADIENT_256
    if specialised and block_d == 64:
        return HOPPER_DKDV_64, HOPPER_DQ_64, None
    dkdv, dq, dk = HOPPER_GRADIENT
    return HOPPER_DKDV if specialised and block_d == 128 else dkdv, dq, dk

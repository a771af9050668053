"""Every tuned constant of the flash attention kernels, as helion.Config objects.

First the three configurations of the published report (NVIDIA B200, bf16, 2026-01-24), then what
this project chose itself. Nothing here needs a GPU.
"""
import dataclasses

import torch
import torch._inductor.runtime.triton_compat as triton_compat

if not hasattr(triton_compat, "IntelGPUError"):
    # helion 1.5.1 imports this name, and torch has it from 2.12 on. On older torch it may stay an
    # exception that nobody raises.
    triton_compat.IntelGPUError = type("IntelGPUError", (Exception,), {})

import helion
import triton

# ---- The published report -----------------------------------------------------------------------
# All three drive `attention_kernel`: block_sizes are [batch*head, query, key], the memory
# operations behind `indexing` are [load q, load k, load v, store out].

# What Helion's autotuner found on the B200 for [16, 64, 4096, 128]: word for word what the report
# prints. It ends its listing with "# ..."; fields it may have cut stay at Helion's defaults.
# Machine code (D = 128): tiles of 32 x 16 are too small for wgmma (64 rows) and tcgen05 (128 rows),
# so sm_90 and sm_100 alike run HMMA, the tensor-core instruction of Ampere. That is why it lost.
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

# The report prints no listing here, only the change: "tensor_descriptor (TMA) and
# persistent_blocked scheduling" on the config above. Taken at its word, all four operations go
# through TMA and every other field stays. Still HMMA, now with one CTA per SM.
TMA_PERSISTENT = helion.Config(
    **{**AUTOTUNED.config, "indexing": ["tensor_descriptor"] * 4, "pid_type": "persistent_blocked"}
)

# The report says: 128 x 128 tiles, 4 warps, flat, "standard pointer loads". It leaves open the
# stages, where we take two, and the order of programs. There we walk the query tiles of one head
# before the next head: in the other order, which is Helion's default, the programs of a moment
# work on as many heads, whose K and V are more than L2 holds.
# Machine code: wgmma on sm_90, tcgen05 on sm_100, and on both the accumulator and the scores are
# more than 4 warps have registers for: they spill.
TILE128 = helion.Config(
    block_sizes=[1, 128, 128],
    indexing=["pointer"] * 4,
    loop_orders=[[1, 0]],
    num_stages=2,
    num_warps=4,
    pid_type="flat",
)

CONFIGS = {"autotuned": AUTOTUNED, "tma_persistent": TMA_PERSISTENT, "tile128": TILE128}

# ---- Chosen here ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)  # told apart by identity: a Config is slow to hash
class Plan:
    """A kernel of flash_attn.py by name, as "hopper" for hopper_kernel, and what it is compiled with."""

    kernel: str
    block_m: int  # queries a tile
    block_n: int  # keys a tile
    config: helion.Config
    head_dim: int = 256  # of hopper_kernel: the largest that its tiles leave registers for


# The Triton versions for which `fresh` of flash_attn.py knows what is in the way of the first tile. With
# others `best` does not name HOPPER: run `check.py -k hopper` before you do.
SPECIALISED = triton.__version__.startswith(("3.6.", "3.7."))

# Hopper, bf16 and fp16, D up to 128. TMA loads K and V; stores have masks, and so go by pointers.
# Warp specialisation: one warpgroup loads, two compute 64 rows each. maxnreg is what each of 12 warps can
# have; Triton then moves registers from the loading ones to the others. One program per SM, which requests
# what the next tile needs while it computes this one. Two stages of K and V and one of q and of the last V
# fill shared memory. Descriptors for TMA of K and V are made on the host, where they cost the GPU nothing.
HOPPER = Plan("hopper", 128, 128, helion.Config(
    host_tensor_descriptors=True,
    indexing="tensor_descriptor",
    maxnreg=168,
    num_stages=2,  # Triton 3.7 does not specialise with fewer, `fresh` does not know the barriers of more
    num_warps=4,
    pid_type="persistent_interleaved",
    range_num_stages=[1, 2],
    range_warp_specializes=[None, True],
), head_dim=128)  # fmt: skip

# D up to 64, bf16: twice the queries a tile, so that a key is read half as often.
HOPPER_64 = Plan("hopper", 256, 64, HOPPER.config, head_dim=64)

# D up to 256: half the keys a tile, and beyond 192 no place for a last V. 229,664 of 232,448 bytes of shared memory.
HOPPER_256 = Plan("hopper", 128, 64, HOPPER.config)

# sm_100 through Helion's cute backend, compiled here, but never run: `best` does not name it. The tiles
# are those that the backend recognises; all else, the pipeline family among it, is left to its seeds,
# which differ with D, masking and length (S % 256 == 0: "fa4", two query tiles a CTA; else "ws_overlap").
BLACKWELL_CUTE = Plan("blackwell", 128, 128, helion.Config(block_sizes=[1, 128, 128]))


def _general(block_m, block_n, num_warps, num_stages):
    """The general kernel, any GPU. Programs walk the query tiles of one head before the next head."""
    return Plan("general", block_m, block_n, helion.Config(
        loop_orders=[[1, 0]], num_stages=num_stages, num_warps=num_warps))  # fmt: skip


# What hopper_kernel leaves to do and what it does not take: no more keys than one tile, scales that are
# not positive. D = 256: an accumulator that leaves registers for half the keys.
HOPPER_GENERAL = _general(128, 128, 8, 2)
HOPPER_GENERAL_256 = _general(128, 64, 8, 2)

# The rest is not measured but chosen by its machine code: for each head dim tiles that fit in shared
# memory and spill no data (`python check.py -k best_config` compiles them again). First sm_100.
BLACKWELL = {d: _general(128, 128, 8, 2) for d in (16, 32)}
BLACKWELL |= {64: _general(128, 64, 8, 3), 128: _general(128, 32, 8, 2), 256: _general(64, 32, 8, 2)}
# sm_80 and the consumer chips sm_86, sm_89, sm_120, which have 100 KiB of shared memory per SM.
AMPERE = {d: _general(128, 64, 4, 3) for d in (16, 32)}
AMPERE |= {64: _general(128, 64, 8, 3), 128: _general(128, 32, 8, 2), 256: _general(64, 32, 8, 2)}
# float32: three tf32 products for each and twice the bytes, so small tiles.
FLOAT32 = {d: _general(64, 32, 4, 2) for d in (16, 32, 64)}
FLOAT32 |= {128: _general(32, 16, 4, 2), 256: _general(16, 16, 8, 1)}


def hopper_general(head_dim):
    """general_kernel's Plan on Hopper, for what hopper_kernel leaves to do."""
    return HOPPER_GENERAL_256 if head_dim > 128 else HOPPER_GENERAL


def hopper(head_dim, dtype, heads, M):
    """hopper_kernel's Plan for a head dim up to 256, heads (B * H) of M queries."""
    if head_dim > 128:
        return HOPPER_256
    # Few rows of last tiles for nothing, and tiles for many rounds of SMs. fp16 is slower with it.
    many = dtype == torch.bfloat16 and M >= 1024 and heads * M >= 2**17
    return HOPPER_64 if head_dim <= 64 and many else HOPPER


def best(capability, head_dim, dtype, heads, M, N):
    """The Plan to run when the caller names none.

    capability: (major, minor) as torch.cuda.get_device_capability gives it, or None on a CPU.
    head_dim: up to 256. dtype: the torch.dtype of q, k and v. heads: B * H. M, N: how many queries and keys.
    """
    head_dim = max(16, 1 << (head_dim - 1).bit_length())  # the kernels fill it up with zeros
    if dtype == torch.float32:
        return FLOAT32[head_dim]
    if capability == (9, 0):
        return hopper(head_dim, dtype, heads, M) if N > 128 and SPECIALISED else hopper_general(head_dim)
    if capability is not None and capability[0] == 10:
        return BLACKWELL[head_dim]
    return AMPERE[head_dim]


def _gradient(dkdv, dq, dk=None):
    """The Plans of dkdv_kernel and dq_kernel, each from queries a tile, keys a tile, warps, stages; and of dkdv_kernel
    for dk alone, where the first one leaves that to it, or None."""
    plan = lambda name, m, n, warps, stages: Plan(name, m, n, helion.Config(num_stages=stages, num_warps=warps))
    return plan("dkdv", *dkdv), plan("dq", *dq), plan("dkdv", *dk) if dk else None


DELTA = Plan("delta", 64, 0, helion.Config(num_warps=8))  # it reads no keys

# By machine code, too. float32 with D = 256 spills, whatever its tiles.
GRADIENT = {d: _gradient((64, 64, 4, 2), (128, 64, 8, 2)) for d in (16, 32, 64)}
GRADIENT |= {128: _gradient((64, 64, 8, 2), (128, 64, 8, 2)), 256: _gradient((32, 32, 8, 2), (64, 64, 8, 2))}
GRADIENT_HOPPER = {d: _gradient((64, 128, 8, 2), (128, 64, 8, 3)) for d in (16, 32, 64, 128)}
GRADIENT_HOPPER |= {256: _gradient((64, 128, 8, 1), (128, 64, 8, 4), (64, 128, 8, 4))}
GRADIENT_FLOAT32 = {d: _gradient((32, 32, 4, 1), (32, 32, 4, 1)) for d in (16, 32, 64)}
GRADIENT_FLOAT32 |= {128: _gradient((32, 16, 8, 1), (32, 32, 8, 1)), 256: _gradient((16, 16, 8, 1), (32, 32, 8, 1))}

# Hopper, bf16 and fp16, D from 72 to 128: loads of q, do and aug by TMA, the rest by pointers; warps as in
# HOPPER, but one tile a program: k and v stay in shared memory until it ends, so nothing could be loaded ahead.
HOPPER_DKDV = Plan("hopper_dkdv", 64, 128, helion.Config(
    host_tensor_descriptors=True,
    indexing=["tensor_descriptor"] * 3 + ["pointer"] * 3,
    num_stages=2,
    num_warps=4,
    pid_type="flat",
    range_num_stages=[0, 2],
    range_warp_specializes=[None, True],
))  # fmt: skip
# D from 40 to 64: ds, which is as large as for D = 128, is not kept, but computed again for dq.
HOPPER_DKDV_64 = Plan("hopper_dkdv", 128, 128, HOPPER_DKDV.config)
HOPPER_DQ_64 = Plan("hopper_dq", 128, 128, helion.Config(
    **{**HOPPER_DKDV.config.config, "indexing": "tensor_descriptor"}))  # fmt: skip


def best_gradient(capability, head_dim, dtype, specialised=SPECIALISED):
    """The Plans of dkdv_kernel, of dq_kernel or hopper_dq_kernel, and of dkdv_kernel for dk alone or None: arguments
    as above. specialised: Hopper's warp specialisation may be taken."""
    head_dim = max(16, 1 << (head_dim - 1).bit_length())
    if dtype == torch.float32:
        return GRADIENT_FLOAT32[head_dim]
    if capability != (9, 0):
        return GRADIENT[head_dim]
    if specialised and head_dim == 64:
        return HOPPER_DKDV_64, HOPPER_DQ_64, None
    dkdv, dq, dk = GRADIENT_HOPPER[head_dim]
    return HOPPER_DKDV if specialised and head_dim == 128 else dkdv, dq, dk

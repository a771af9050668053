"""Every tuned constant of the flash attention kernels, as helion.Config objects.

First the three configurations of the published report (NVIDIA B200, bf16, 2026-01-24), then what
this project chose itself. Nothing here needs a GPU.
"""
import torch
import torch._inductor.runtime.triton_compat as triton_compat

if not hasattr(triton_compat, "IntelGPUError"):
    # helion 1.5.1 imports this name, and torch has it from 2.12 on. On older torch it may stay an
    # exception that nobody raises.
    triton_compat.IntelGPUError = type("IntelGPUError", (Exception,), {})

import helion

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
# stages, where we keep the two that fit beside q in the shared memory of an SM, and the order of
# programs. There we walk the query tiles of one head before the next head: the other order, which
# is Helion's default, reads every K and V tile from DRAM again instead of from L2.
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

"""Flash attention in Helion: softmax(q k^T * scale) v and its gradient, tile by tile.

    from flash_attn import flash_attention
    out = flash_attention(q, k, v, is_causal=True)      # q, k, v, out: [B, H, S, D]

Copy this file and configs.py side by side into your project: together they are complete.

A map, from top to bottom:
    forward_kernel          the textbook loop: any GPU, any strides. Read this one first.
    merge_kernel            joins results over parts of the keys, for few queries (`split`).
    hopper_forward_kernel   the same loop in the order that keeps an H100's tensor cores busy.
    delta, dkdv, dq         the gradient; hopper_dq_kernel for D 33 to 64, `visible` to 128.
    report_kernel           the loop of the published report, and of Helion's Blackwell backend.
    Launching               what is compiled, what is kept.
    _forward, _backward     allocate, choose, launch.
    flash_attention         the public function; above it the operators and autograd.
    packed, padded          make `visible` for packed and padded batches. The kernels call this mask
                            by_row; ranges_kernel and order_kernel prepare it.

The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691): a tile of queries walks over the keys and
keeps each row's maximum m_i, sum l_i and unnormalised output acc. The Hopper schedule is that of
FlashAttention-3 (Shah et al., arXiv:2407.08608). Exponentials are in base 2, the hardware's base.
"""
import contextvars
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import sys
import threading

import torch
from torch.autograd import forward_ad
from torch.nn.attention.bias import CausalVariant
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

# ---- Compatibility -------------------------------------------------------------------------------


def _import_configs():
    """configs.py beside this file, also where sys.path has another configs.py before it."""
    if __package__:
        return importlib.import_module(".configs", __package__)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs.py")
    spec = importlib.util.find_spec("configs")
    if spec is None or not spec.origin or os.path.realpath(spec.origin) != os.path.realpath(path):
        spec = importlib.util.spec_from_file_location(f"{__name__}_configs", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(spec.name)


configs = _import_configs()  # before helion, which configs.py makes importable on torch 2.11

import helion
import helion.language as hl
import triton
from helion.language import loops
from triton.tools.tensor_descriptor import TensorDescriptor

# helion 1.5.1 offers warp specialisation from sm_100 on. Triton has it for sm_90, too. Here Helion
# offers it while a kernel is bound whose Config asks for it (no upstream issue yet). Without this,
# Helion refuses `range_warp_specializes` on an H100.
_binding = threading.local()
loops._supports_warp_specialize = lambda offers=loops._supports_warp_specialize: (
    getattr(_binding, "hopper", False) or offers())  # fmt: skip

LOG2E = 1.4426950408889634  # exp(x) = 2^(x LOG2E)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# ---- Rules of Triton's warp specialisation on sm_90 (Triton 3.6 to 3.9) --------------------------
# The pass gives one warpgroup the loads and each of two others half of the rows of a tile. The
# kernels refer to these rules by number.
# 1. A tile of q is halved by shifting the row of its descriptor. Only a descriptor made in the
#    kernel can be halved (load_matrix, load_resident); a host's keeps its full box (triton issue
#    11587). Tiles of the loop, K and V, are not halved: descriptors of the host serve them.
# 2. The pass shifts every use of the row value, and the compiler joins equal values. If a
#    descriptor and a pointer both used m_block * block_m, the pointer would be shifted, too: rows
#    of another tile, or NaN. So the kernels write the pointer's row as (m_block + 1) * block_m -
#    block_m, and load_resident adds and subtracts a salt.
# 3. A load that is not TMA goes to the loading warpgroup, which cannot pass the result on (triton
#    pull 11283): load a number per row by inline PTX (load_row_vector), per column by TMA.
# 4. No reduction of the raw accumulator after the loop: scale it first.
# 5. A second loop, a product q k^T after the loop, or an `if` on a run-time value in the loop make
#    the pass fail or, silently, not specialise: 4 warps instead of 12, kilobytes of spills.
#    torch.where is fine.
# 6. At most two stages: inval_dead_mbarriers knows the barriers of two.


# ---- Helpers of the kernels ----------------------------------------------------------------------


def int32(expression, *args):
    """An int32 from a line of Triton: Helion's run-time integers are int64, 3% slower at D = 64."""
    like = hl.zeros([], dtype=torch.int32)
    return hl.inline_triton(f"tl.cast({expression}, tl.int32)", args=args, output_like=like)


def fast_div(x, y):
    """x // y for 0 <= x < 2^20, exact by float32's 24 bits. Integer division takes 150 cycles."""
    return int32("(({0} + 0.5) * (1.0 / {1})).to(tl.int32)", x, y)


# torch.exp2 and torch.log2 become library calls, which warp specialisation does not take.
def exp2(x):
    return hl.inline_triton("tl.exp2({0})", args=(x,), output_like=x)


def log2(x):
    return hl.inline_triton("tl.log2({0})", args=(x,), output_like=x)


def tanh(x):
    """tanh(y) for x = 2 log2(e) y: cap_scale has this factor. The error is 4e-7. Where exp2 is inf
    or 0, the result is 1 or -1. rcp is one instruction, a division five."""
    return 1 - 2 * hl.inline_triton(
        "tl.inline_asm_elementwise('rcp.approx.ftz.f32 $0, $1;', '=r,r', [1 + tl.exp2({0})],"
        " dtype=tl.float32, is_pure=True, pack=1)",
        args=(x,),
        output_like=x,
    )


def is_below(x, y):
    """0 <= x < y as one unsigned comparison. x and y fit in an int32, and y >= 0."""
    expression = "{0}.to(tl.uint32) < {1}.to(tl.uint32)"
    return hl.inline_triton(expression, args=(x, y), output_like=x < y)


def round_to_bf16(p):
    """float32 rounded to the nearest bfloat16, still float32. Two elements an instruction, where
    p.to(bfloat16) takes one conversion each."""
    return hl.inline_triton(
        "tl.inline_asm_elementwise('{{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16;"
        " and.b32 $1, t, 0xffff0000;}}', '=r,=r,r,r', [{0}], dtype=tl.float32, is_pure=True,"
        " pack=2)",
        args=(p,),
        output_like=p,
    )


def inval_dead_mbarriers(x, this_round):
    """Return x, an int32: use the result. In a program's round 0 thread 0 invalidates two barriers.

    Triton 3.6 and 3.7 place unused mbarriers in the first 16 bytes of shared memory and then load
    the first tile over them without the mbarrier.inval that PTX asks for. Once in thousands of
    launches a barrier is then written over the tile: NaN. From 3.8 on no tile takes the place of a
    barrier (triton pull 9592), and nothing is done here.
    """
    if not configs.DEAD_MBARRIERS:
        return x
    asm = (
        "{{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; or.b32 t, t, $2; setp.eq.u32 p, t, 0;"
        " @p mbarrier.inval.shared::cta.b64 [global_smem];"
        " @p mbarrier.inval.shared::cta.b64 [global_smem+8];"
        " @p fence.proxy.async.shared::cta; mov.b32 $0, $1;}}"
    )
    return hl.inline_triton(
        f"tl.inline_asm_elementwise('{asm}', '=r,r,r', [{{0}}, {{1}}], dtype=tl.int32,"
        " is_pure=True, pack=1)",
        args=(x, this_round),
        output_like=hl.zeros([], dtype=torch.int32),
    )


def load_matrix(x, num_rows, num_columns, stride, row, column, block, block_d):
    """[block, block_d] at (row, column) of x's memory seen as one matrix, by TMA (rule 1)."""
    return hl.inline_triton(
        "tl.make_tensor_descriptor({0}, [{1}, {2}], [{3}, 1], [{4}, {5}]).load([{6}, {7}])",
        args=(x, num_rows, num_columns, stride, block, block_d, row, column),
        output_like=hl.zeros([block, block_d], dtype=x.dtype),
    )


def load_resident(x, strides, b, h, block_index, salt, head_dim, block, block_d):
    """Tile `block_index` of x[b, h], which stays in shared memory while the program runs (rule 1).

    salt: an expression that no other descriptor of the kernel has; it cancels out (rule 2).
    """
    return hl.inline_triton(
        "tl.make_tensor_descriptor("
        "{0} + tl.cast({1}, tl.int64) * {2} + tl.cast({3}, tl.int64) * {4},"
        " [{5}, {6}], [{7}, 1], [{8}, {9}]).load([({10} + {11}) * {8} - {11} * {8}, 0])",
        args=(x, inval_dead_mbarriers(b, 0), strides[0], h, strides[1], x.size(2), head_dim,
              strides[2], block, block_d, block_index, salt),  # fmt: skip
        output_like=hl.zeros([block, block_d], dtype=x.dtype),
    )


def load_numbers(x, strides, b, h, index, like):
    """x[b, h, index], 32 bits each, by a load that is not TMA (rule 3). like: of index's shape."""
    return hl.inline_triton(
        "tl.inline_asm_elementwise('ld.global.b32 $0, [$1];', '=r,l', [({0}"
        " + tl.cast({1}, tl.int64) * {2} + tl.cast({3}, tl.int64) * {4} + {5}).to(tl.int64)],"
        " dtype=tl.int32, is_pure=True, pack=1).to({0}.dtype.element_ty, bitcast=True)",
        args=(x, b, strides[0], h, strides[1], index),
        output_like=like,
    )


def load_row_vector(x, strides, b, h, rows):
    """x[b, h, rows] of a tile; rows past the end give the last row's number."""
    rows = torch.clamp(rows, max=x.size(2) - 1)
    return load_numbers(x, strides, b, h, rows, hl.zeros([rows.size(0)], dtype=x.dtype))


def load_range(ranges, strides, b, block_index, block=1):
    """Start and end of the loop of block `block_index`: ranges[:2, b, block_index], widened to
    whole tiles of `block`."""
    like = hl.zeros([], dtype=torch.int32)
    begin = load_numbers(ranges, strides, 0, b, block_index, like)
    end = load_numbers(ranges, strides, 1, b, block_index, like)
    return int32("{0} // {1} * {1}", begin, block), int32("tl.cdiv({0}, {1}) * {1}", end, block)


def load_work(ranges, strides, i, num_heads, num_blocks):
    """b, h and block of program i. ranges[2, 0, i // num_heads] is b * num_blocks + block."""
    rank = int32("{0} // {1}", i, num_heads)
    block = load_numbers(ranges, strides, 2, 0, rank, hl.zeros([], dtype=torch.int32))
    h, b = int32("{0} - {1} * {2}", i, rank, num_heads), int32("{0} // {1}", block, num_blocks)
    return b, h, int32("{0} - {1} * {2}", block, b, num_blocks)


def valid_columns(d, head_dim):
    """True for the columns d that a head has. `// 8 * 8` shows Triton a multiple of 8: it loads
    whole vectors."""
    return d < int32("{0} // 8 * 8", head_dim)


def load_tile(x, b, h, rows, d, head_dim, tma):
    """x[b, h, rows, d], zeros beyond x."""
    if tma:
        return hl.load(x, [b, h, rows, slice(None)])
    b, h = b.to(rows.dtype), h.to(rows.dtype)  # int64 for tensors of 2^31 elements
    rows, d = rows.unsqueeze(1), d.unsqueeze(0)
    return hl.load(x, [b, h, rows, d], extra_mask=(rows < x.size(2)) & valid_columns(d, head_dim))


def load_row(x, b, h, rows, tma):
    """x[b, h, rows], one number for each column of a transposed tile (for its rows:
    load_row_vector). Rows beyond x give 0; TMA does that itself."""
    b, h = (b, h) if tma else (b.to(rows.dtype), h)
    return hl.load(x, [b, h, rows], extra_mask=None if tma else rows < x.size(2))


def store_tile(x, b, h, rows, d, head_dim, value):
    """x[b, h, rows, d] = value, inside x."""
    b, h, rows, d = b.to(torch.int64), h.to(torch.int64), rows.unsqueeze(1), d.unsqueeze(0)
    inside = (rows < x.size(2)) & valid_columns(d, head_dim)
    hl.store(x, [b, h, rows, d], value.to(x.dtype), extra_mask=inside)


def keys_end(m_end, N, diagonal, block_n=1):
    """The end of a loop over keys: no row before m_end sees this key or a later one. A multiple of
    block_n."""
    expression = "tl.cdiv(tl.minimum({0}, tl.maximum(0, {1} + {2})), {3}) * {3}"
    return int32(expression, N, m_end, diagonal, block_n)


def keys_start(m, low, block_n, least=0):
    """The start of a loop over keys: no row from m on sees an earlier one. At least `least`, and a
    multiple of block_n."""
    return int32("tl.maximum({0}, {1} + {2}) // {3} * {3}", least, m, low, block_n)


# ---- The forward ---------------------------------------------------------------------------------
# Row i sees the keys i + low to i + diagonal, inclusive; low is read if windowed. With by_row
# (windowed is then True, too) row i sees the keys visible[b, 0, i] to visible[b, 1, i], inclusive,
# and the loop of block j goes from ranges[0, b, j] to ranges[1, b, j], exclusive: over keys for 128
# queries, over queries for 128 keys (dkdv_kernel). ranges[2] lists all blocks, b * blocks + j, from
# the longest loop to the shortest. Only Hopper's kernels fill and read it: their programs then end
# together (packed, forward: 0.83 of the time).
# To add a mask: if each row sees one interval of keys, make `visible` as `packed` does: no kernel
# changes. Otherwise add a constexpr beside `windowed` and change, in this order:
#     the bounds of the loops over keys     keys_start, keys_end
#     the bounds of the loop over queries   m_start, m_end of dkdv_kernel
#     the comparisons                       first_key, last_key, distance
#     the number of keys that a row sees    in_range, l_inverse, sees_none
#     where a loop needs no mask            `masked` in _forward and _backward
# Then compare with SDPA's attn_mask at lengths around a tile's size, as check.py does, and each
# kernel by itself: the fix-up repairs what hopper_forward_kernel leaves as NaN.


def _ranges_kernel(
    intervals: torch.Tensor,  # [B, 2, M], int32: `visible` as the caller gives it
    visible: torch.Tensor,  # result: intervals, clamped to the keys
    ranges: torch.Tensor,  # result: [3, B, number of blocks of 128 queries], see above
    num_keys: int,
) -> torch.Tensor:  # fmt: skip
    """ranges[:2]: the first key that a row of the block sees, and the last one plus 1."""
    B, _, M = intervals.size()
    for tile_b, tile_m in hl.tile([B, M], block_size=[1, 128]):
        b, block = tile_b.begin, tile_m.begin // 128
        first = torch.clamp(intervals[b, 0, tile_m], min=0, max=num_keys)
        last = torch.clamp(intervals[b, 1, tile_m], max=num_keys - 1)
        last = torch.maximum(last, first - 1)  # is_below: no number of keys is negative
        visible[b, 0, tile_m], visible[b, 1, tile_m] = first, last
        sees = (first <= last) & (tile_m.index < M)
        end = torch.amax(torch.where(sees, last + 1, 0))
        ranges[0, b, block] = torch.minimum(torch.amin(torch.where(sees, first, num_keys)), end)
        ranges[1, b, block] = end
    return ranges


def _order_kernel(ranges: torch.Tensor) -> torch.Tensor:
    """Sort the block numbers of ranges, [3, 1, all blocks], into ranges[2], the longest loop first.
    A block's rank is the number of blocks before it. torch.argsort: 5 launches, 4% (padded)."""
    n = ranges.size(2)
    for tile_i in hl.tile(n, block_size=32):
        length = ranges[1, 0, tile_i] - ranges[0, 0, tile_i]
        rank = hl.zeros([tile_i], dtype=torch.float32)
        for tile_j in hl.tile(n, block_size=64):
            i, j = tile_i.index[:, None], tile_j.index[None, :]
            other = (ranges[1, 0, tile_j] - ranges[0, 0, tile_j])[None, :]
            is_before = (other > length[:, None]) | (other == length[:, None]) & (j < i)
            rank = rank + torch.sum(torch.where(is_before & (j < n), 1.0, 0.0), -1)
        hl.store(ranges, [2, 0, rank.to(torch.int32)], tile_i.index.to(torch.int32),
                 extra_mask=tile_i.index < n)  # fmt: skip
    return ranges


def _forward_kernel(
    q: torch.Tensor,  # [B, H, M, head_dim]
    k: torch.Tensor, v: torch.Tensor,  # [B, Hk, N, head_dim]
    out: torch.Tensor,  # [B, H, M, head_dim]
    lse: torch.Tensor,  # [B, H, M], float32, natural logarithm
    visible: torch.Tensor,  # [B, 2, M], int32
    ranges: torch.Tensor,  # [3, B, number of blocks of 128 queries], int32
    qk_scale: float,  # of a score: scale * log2(e); after the tanh, if capped: softcap * log2(e)
    cap_scale: float,  # if capped: q k^T * cap_scale goes into tanh; 2 log2(e) * scale / softcap
    head_dim: int, low: int, diagonal: int,
    num_queries: int,  # if split: M of the call
    keys_per_part: int,  # if split: a multiple of block_n
    block_m: hl.constexpr, block_n: hl.constexpr, windowed: hl.constexpr, by_row: hl.constexpr,
    capped: hl.constexpr,
    rows_per_program: hl.constexpr,  # block_m; FIXUP_ROWS for the fix-up
    split: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """Flash attention as in the paper, on any GPU, for any strides.

    Fix-up (rows_per_program > block_m): a program reads the lse of its 512 rows, and computes them
    again only if hopper_forward_kernel left NaN in one of them.
    split (few queries): the rows of a tile are the queries of all heads that share keys; row i is
    query i % num_queries. out and lse have B batches for each part of the keys: batch out_b is
    batch out_b % B and part out_b // B. merge_kernel joins the parts.
    """
    B, H, M, BLOCK_D = q.size()
    Hk, N = k.size(1), k.size(2)
    # BLOCK_D: head_dim, padded to a power of two (Launch). d_valid masks the other columns.
    BLOCK_D = hl.specialize(BLOCK_D)
    ln2 = 0.6931471805599453  # local: Helion makes a run-time argument of a module's constant
    lowest = -3e38  # below every score, and finite: -inf - -inf would be NaN
    hl.pdl_wait()  # for the kernel before, where launches overlap (PDL: sm_90 and later)
    for tile_bh, tile_rows in hl.tile([out.size(0) * H, M], block_size=[1, rows_per_program]):
        out_b, h = tile_bh.begin // H, tile_bh.begin % H
        b = out_b % B if split else out_b
        hk = h // (H // Hk)
        # This program's keys.
        part_begin = out_b // B * keys_per_part if split else 0
        part_end = int32("tl.minimum({0} + {1}, {2})", part_begin, keys_per_part, N) if split else N
        d = hl.arange(BLOCK_D)[None, :]
        d_valid = valid_columns(d, head_dim)
        if rows_per_program > block_m:
            lse_tile = lse[out_b, h, tile_rows]
            is_missing = torch.amax(torch.where(lse_tile == lse_tile, 0, 1))
            rows_end = tile_rows.begin + is_missing * (tile_rows.end - tile_rows.begin)
        else:
            rows_end = tile_rows.end

        for tile_m in hl.tile(tile_rows.begin, rows_end, block_size=block_m):
            rows = tile_m.index % num_queries if split else tile_m.index
            m_start = 0 if split else tile_m.begin
            m_end = num_queries if split else tile_m.begin + block_m
            last_key = torch.clamp(rows + diagonal, max=part_end - 1)  # the last one a row sees
            first_key = torch.clamp(rows + low, min=part_begin) if windowed else part_begin
            n_start = keys_start(m_start, low, block_n, part_begin) if windowed else part_begin
            n_end = keys_end(m_end, part_end, diagonal)
            if by_row:
                first_key, last_key = hl.load(visible, [b, 0, rows]), hl.load(visible, [b, 1, rows])
                first_key = torch.clamp(first_key, min=part_begin).to(rows.dtype)
                last_key = torch.clamp(last_key, max=part_end - 1).to(rows.dtype)
                n_start = int32("tl.maximum({0}, {1} // {2} * {2})", part_begin,
                                ranges[0, b, m_start // 128], block_n)  # fmt: skip
                n_end = int32("tl.minimum({0}, {1})", part_end, ranges[1, b, m_start // 128])
            m_i = hl.full([tile_m], lowest, dtype=torch.float32)
            l_i = hl.zeros([tile_m], dtype=torch.float32)
            acc = hl.zeros([tile_m, BLOCK_D], dtype=torch.float32)
            q_tile = hl.load(q, [b, h, tile_m.index[:, None], d], extra_mask=d_valid)
            for n in hl.grid(n_start, n_end, block_n):
                keys = n + hl.arange(block_n)
                kv_valid = (keys < N)[:, None] & d_valid
                # Scores. The scale is applied in float32: on q in bf16 it would round once more.
                k_tile = hl.load(k, [b, hk, keys[:, None], d], extra_mask=kv_valid)
                qk = hl.dot(q_tile, k_tile.T, out_dtype=torch.float32)
                qk = (tanh(qk * cap_scale) if capped else qk) * qk_scale
                qk = torch.where(keys[None, :] <= last_key[:, None], qk, float("-inf"))
                if windowed:
                    qk = torch.where(keys[None, :] >= first_key[:, None], qk, float("-inf"))
                # Online softmax.
                m_ij = torch.maximum(m_i, torch.amax(qk, -1))
                p = exp2(qk - m_ij[:, None])
                alpha = exp2(m_i - m_ij)
                l_i = l_i * alpha + torch.sum(p, -1)
                m_i = m_ij
                # Accumulate.
                v_tile = hl.load(v, [b, hk, keys[:, None], d], extra_mask=kv_valid)
                acc = hl.dot(p.to(v.dtype), v_tile, acc=acc * alpha[:, None])
            l_inverse = torch.where(last_key < first_key, 0.0, 1 / l_i)  # 0 if a row sees no key
            lse[out_b, h, tile_m] = (m_i + log2(l_i)) * ln2
            out_tile = (acc * l_inverse[:, None]).to(out.dtype)
            hl.store(out, [out_b, h, tile_m.index[:, None], d], out_tile, extra_mask=d_valid)
    return out


def _merge_kernel(
    parts: torch.Tensor,  # [B * H * M, parts, head_dim], float32
    lse_parts: torch.Tensor,  # [B * H * M, parts, 1]
    out: torch.Tensor, lse: torch.Tensor,  # [B, H, M, head_dim] and [B, H, M]
    head_dim: int, block_p: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """out is the sum over the parts of exp(lse of the part - lse) * out of the part, in one order:
    the same bits at each run."""
    B, H, M, BLOCK_D = out.size()
    BLOCK_D = hl.specialize(BLOCK_D)
    log2e, lowest = 1.4426950408889634, -3e38
    hl.pdl_wait()
    for tile_bh, tile_m in hl.tile([B * H, M], block_size=[1, 1]):
        b, h, m = tile_bh.begin // H, tile_bh.begin % H, tile_m.begin
        row, d = tile_bh.begin * M + m, hl.arange(BLOCK_D)
        d_valid = valid_columns(d, head_dim)
        m_i = hl.full([1], lowest, dtype=torch.float32)
        l_i = hl.zeros([1], dtype=torch.float32)
        acc = hl.zeros([1, BLOCK_D], dtype=torch.float32)
        unweighted = hl.zeros([1, BLOCK_D], dtype=torch.float32)
        for p in hl.grid(0, parts.size(1), block_p):
            part = p + hl.arange(block_p)
            valid = part < parts.size(1)
            lse_part = hl.load(lse_parts, [row, part, 0], extra_mask=valid)
            lse_part = torch.where(valid, lse_part, float("-inf"))
            m_ij = torch.maximum(m_i, torch.amax(lse_part, -1))
            weight, alpha = exp2((lse_part - m_ij) * log2e), exp2((m_i - m_ij) * log2e)
            x = hl.load(parts, [row, part[:, None], d[None, :]],
                        extra_mask=valid[:, None] & d_valid[None, :])  # fmt: skip
            weighted = torch.where(weight[:, None] > 0, x * weight[:, None], 0.0)  # 0 * NaN is NaN
            acc = acc * alpha[:, None] + torch.sum(weighted, 0)[None, :]
            unweighted = unweighted + torch.sum(x, 0)[None, :]
            l_i = l_i * alpha + torch.sum(weight, -1)
            m_i = m_ij
        # All weights are 0: the row sees no key (each part is 0), or its scores are -inf (NaN).
        no_weight = l_i == 0
        acc = torch.where(no_weight[:, None], unweighted, acc * (1 / l_i)[:, None])
        lse_row = torch.where(no_weight, float("-inf"), m_i + log2(l_i) / log2e)
        rows = m + hl.arange(1)
        hl.store(lse, [b, h, rows], lse_row)
        hl.store(out, [b, h, rows[:, None], d[None, :]], acc.to(out.dtype),
                 extra_mask=d_valid[None, :])  # fmt: skip
    return out


def _hopper_forward_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,  # as above
    lse: torch.Tensor,  # NaN in a row asks for the fix-up
    visible: torch.Tensor, ranges: torch.Tensor,  # as above
    qk_scale: float, cap_scale: float, head_dim: int, low: int, diagonal: int,  # qk_scale > 0
    num_programs: int,  # one per SM
    paired: int,  # 1: a program takes query tiles in pairs, a long one and a short one
    block_m: hl.constexpr, block_n: hl.constexpr, windowed: hl.constexpr, by_row: hl.constexpr,
    capped: hl.constexpr,
    masked: hl.constexpr,  # mask every tile; else only the last one, after the loop
    running_max: hl.constexpr,
    exact_lse: hl.constexpr,  # lse of p, not of the rounded p: for the gradient and return_lse
) -> torch.Tensor:  # fmt: skip
    """The same loop in the order that keeps Hopper's tensor cores busy (FlashAttention-3).

    Order (section 3.2): p v of the previous tile is issued after q k^T of this tile, and the
    exponentials of this tile run while the tensor cores work on both. The first p is 0; the last
    p v comes after the loop.
    Warps (section 3.1): Triton gives one warpgroup the loads, and each of two others half of the
    rows. Neither waits for the other.
    Schedule: a persistent program per SM. Program w % num_programs runs index w of the grid. With a
    causal mask the last query tile of a head costs most and the first one least, so a program takes
    pairs that cost the same: tile i from the end, then tile i from the start.

    Softmax without a maximum (bf16). Softmax does not change when one number is subtracted from all
    scores of a row. The usual number is the row's maximum. Here it is -offset: the loop finds no
    maximum and rescales nothing (7% of the time dense, 19% causal). The result is as exact, unless
    a number leaves float32's range:
    1. Too small: a p below 2^-126 becomes 0. A row passes if l_i >= n, its number of visible keys:
       then its largest p is at least 1, the largest p that a subtracted maximum gives.
    2. Too large: a p, a sum or a product beyond 2^128 leaves inf or NaN in l_i or acc.
    A row that fails a test stores lse = NaN, and the fix-up computes 512 rows around it again.
    The exponent range of fp16 is too small for this: fp16 takes running_max.
    """
    B, H, M, BLOCK_D = q.size()
    Hk, N = k.size(1), k.size(2)
    BLOCK_D = hl.specialize(BLOCK_D)  # TMA pads with zeros
    group = H // Hk
    visible_strides, ranges_strides = visible.stride(), ranges.stride()
    ln2, lowest = 0.6931471805599453, -3e38
    offset = 40.0  # a score of 0 gives p = 2^40: 40 bits above limit 1, 88 below limit 2
    # q as one matrix with q's row stride: head (b, h) starts at row b * row_b + h * row_h, column
    # b * column_b + h * column_h. One descriptor (rule 1) for all heads, made once per program. The
    # divisions stand here: Triton does not move them out of the loop.
    stride_b, stride_h, stride_m = q.stride(0), q.stride(1), q.stride(2)
    row_b, row_h = stride_b // stride_m, stride_h // stride_m
    column_b, column_h = stride_b % stride_m, stride_h % stride_m
    q_rows = (B - 1) * row_b + (H - 1) * row_h + M
    q_columns = (B - 1) * column_b + (H - 1) * column_h + head_dim
    num_m_blocks = (M + block_m - 1) // block_m
    works_per_head = (num_m_blocks + paired) // (1 + paired)  # a work is a query tile or a pair
    num_works = B * H * works_per_head
    num_rounds = (num_works + num_programs - 1) // num_programs * (1 + paired)
    hl.pdl_wait()
    hl.pdl_launch_dependents()  # the fix-up may start; it waits for this kernel's results
    for w in hl.grid(num_rounds * num_programs):
        this_round = fast_div(w, num_programs)
        is_second = int32("{0} & {1}", this_round, paired)
        work = int32("({0} >> {1}) * {2} + {3} - {0} * {2}", this_round, paired, num_programs, w)
        bh = fast_div(work, works_per_head)
        i = int32("{0} - {1} * {2}", work, bh, works_per_head)
        m_block = int32("tl.where({1} > 0, {0}, {2} - 1 - {0})", i, is_second, num_m_blocks)
        # Not valid: no work is left, or the pair in the middle has one tile only.
        is_valid = int32("({0} < {1}) & ({2} * (2 * {3} + 1) != {4})",
                         work, num_works, is_second, i, num_m_blocks)  # fmt: skip
        b = fast_div(bh, H)
        h = int32("{0} - {1} * {2}", bh, b, H)
        if by_row:  # the longest first; odd rounds go backwards over the programs
            work = int32("tl.where({0} % 2 > 0, (2 * {0} + 1) * {1} - 1 - {2}, {2})",
                         this_round, num_programs, w)  # fmt: skip
            is_valid = int32("{0} < {1}", work, num_works)
            work = int32("tl.minimum({0}, {1} - 1)", work, num_works)
            b, h, m_block = load_work(ranges, ranges_strides, work, H, num_m_blocks)
        hk = fast_div(h, group)
        rows = (m_block + 1) * block_m + (hl.arange(block_m) - block_m)  # rule 2
        last_key = torch.clamp(rows + diagonal, max=N - 1)
        n_end = keys_end(int32("({0} + 1) * {1}", m_block, block_m), N, diagonal, block_n)
        n_start = keys_start(int32("{0} * {1}", m_block, block_m), low, block_n) if windowed else 0
        first_key = torch.clamp(rows + low, min=0) if windowed else 0
        if by_row:
            first_key = load_row_vector(visible, visible_strides, b, 0, rows)
            last_key = load_row_vector(visible, visible_strides, b, 1, rows)
            n_start, n_end = load_range(ranges, ranges_strides, b, m_block, block_n)
        n_end = int32("{0} * {1}", n_end, is_valid)

        m_i = hl.full([block_m], lowest, dtype=torch.float32)
        l_i = hl.zeros([block_m], dtype=torch.float32)  # sum of the rounded p
        l_exact = hl.zeros([block_m], dtype=torch.float32)  # sum of p, if exact_lse
        l_before = hl.zeros([block_m], dtype=torch.float32)  # l_i and l_exact without the last tile
        l_exact_before = hl.zeros([block_m], dtype=torch.float32)
        acc = hl.zeros([block_m, BLOCK_D], dtype=torch.float32)
        p = hl.zeros([block_m, block_n], dtype=torch.float32)
        row = int32("{0} * {1} + {2} * {3} + {4} * {5}", b, row_b, h, row_h, m_block, block_m)
        column = int32("{0} * {1} + {2} * {3}", b, column_b, h, column_h)
        column = inval_dead_mbarriers(column, this_round)
        q_tile = load_matrix(q, q_rows, q_columns, stride_m, row, column, block_m, BLOCK_D)
        # BLOCK_D = 256: shared memory has no room for V after the loop. One extra iteration does
        # the last p v.
        n_stop = n_end if BLOCK_D < 256 else int32("{0} + tl.minimum({0}, {1})", n_end, block_n)
        for n in hl.grid(n_start, n_stop, block_n):
            p_tile = p.to(v.dtype)  # before q k^T, which then reuses the registers of p
            n_before = int32("tl.maximum({0} - {1}, {2})", n, block_n, n_start)  # at first p is 0
            v_tile = v[b, hk, n_before + hl.arange(block_n), :]
            # Scores. The extra iteration (BLOCK_D = 256) loads the last tile again: zeros beyond N
            # could raise the running maximum.
            n_load = int32("tl.minimum({0}, {1} - {2})", n, n_end, block_n)
            k_tile = k[b, hk, n_load + hl.arange(block_n), :]
            qk = hl.dot(q_tile, k_tile.T, out_dtype=torch.float32)
            if capped:
                qk = tanh(qk * cap_scale)
            sees = hl.arange(block_n)[None, :] <= (last_key - n)[:, None]
            if windowed:
                sees = sees & (hl.arange(block_n)[None, :] >= (first_key - n)[:, None])
            if running_max:
                if masked:
                    qk = torch.where(sees, qk, float("-inf"))
                m_ij = torch.maximum(m_i, torch.amax(qk, -1) * qk_scale)
                alpha = exp2(m_i - m_ij)
                m_i = m_ij
                x = qk * qk_scale - m_ij[:, None]
            else:
                x = qk * qk_scale + offset
                if masked:
                    x = torch.where(sees, x, float("-inf"))
            # Order matters: mask, issue p v of the previous tile, then exp2, which overlaps it.
            acc = hl.dot(p_tile, v_tile, acc=acc)
            p = exp2(x)
            if running_max:
                acc = acc * alpha[:, None]
                l_before = l_i * alpha
                l_i = l_before + torch.sum(p, -1)
            else:
                # l_i sums the rounded p, which is what the tensor cores multiply: a row of one key
                # is exactly its v. To nearest: truncation would bias sums that cancel.
                p_rounded = round_to_bf16(p)
                l_before, l_exact_before = l_i, l_exact
                l_i = l_i + torch.sum(p_rounded, -1)
                if exact_lse:
                    l_exact = l_exact + torch.sum(p, -1)
                # The mask after the loop needs p itself for an exact lse.
                if masked or not exact_lse or BLOCK_D == 256:
                    p = p_rounded
        # The last tile: mask it, then multiply it.
        n_last = n_end - block_n
        if not masked and BLOCK_D == 256:  # the extra iteration added the last tile once more
            l_i, l_exact = l_before, l_exact_before
        elif not masked:
            keys = n_last + hl.arange(block_n)
            p = torch.where(keys[None, :] <= last_key[:, None], p, 0.0)
            p_rounded = round_to_bf16(p) if exact_lse else p
            l_i = l_before + torch.sum(p_rounded, -1)
            if exact_lse:
                l_exact = l_exact_before + torch.sum(p, -1)
        if BLOCK_D < 256:
            acc = hl.dot(p.to(v.dtype), v[b, hk, n_last + hl.arange(block_n), :], acc=acc)
        sees_none = last_key < first_key
        acc = acc * torch.where(sees_none, 0.0, 1 / l_i)[:, None]  # a row that sees no key is 0
        if running_max:
            lse_tile = (m_i + log2(l_i)) * ln2
        else:
            largest = torch.amax(torch.abs(acc), -1)  # of the scaled acc: rule 4
            in_range = (l_i >= last_key + 1 - first_key) & (l_i < float("inf"))
            in_range = in_range & (largest < float("inf"))
            lse_tile = (log2(l_exact if exact_lse else l_i) - offset) * ln2
            lse_tile = torch.where(in_range, lse_tile, float("nan"))
        lse_tile = torch.where(sees_none, float("-inf"), lse_tile)
        row_valid = (rows < M) & (is_valid > 0)
        d = hl.arange(BLOCK_D)[None, :]
        hl.store(lse, [b, h, rows], lse_tile, extra_mask=row_valid)
        b, h = b.to(torch.int64), h.to(torch.int64)
        out_valid = row_valid[:, None] & valid_columns(d, head_dim)
        hl.store(out, [b, h, rows[:, None], d], acc.to(out.dtype), extra_mask=out_valid)
    return out


# ---- The gradient --------------------------------------------------------------------------------
#     p     = exp(scale q k^T - lse)                 [M, N]
#     delta = sum(out * do) - dlse                   [M]
#     dv    = p^T do
#     ds    = p (do v^T - delta)                     [M, N]
#     dk    = scale ds^T q
#     dq    = scale ds k
# Softcap: t = tanh(scale q k^T / softcap), p = exp(softcap t - lse); ds has a factor 1 - t^2.
# (FlashAttention-2, algorithm 2.) dkdv_kernel computes ds and writes it; dq_kernel reads it.
# To compute ds again for dq takes 9 to 18% longer at D = 128. At D = 64 ds is as large, and the
# products are half as large: on Hopper hopper_dq_kernel computes ds again (H100: 11% less time
# dense, 14% causal; and no memory for ds). With `visible` it does so at D = 128, too: ds for N * M
# would take many launches (packed: 0.56 of the time). With a window only a band of ds is not zero.
# ds holds the band alone, if that fits: column 0 is query m_start of the tile of keys (one launch,
# not eight: 0.93 of the time).
# One program sums each gradient, in one order: the same bits at every run.


def _delta_kernel(
    out: torch.Tensor, do: torch.Tensor,  # [B, H, M, head_dim]
    lse: torch.Tensor, dlse: torch.Tensor,  # [B, H, M], float32
    lse_log2: torch.Tensor, minus_delta: torch.Tensor,  # [B, H, M], float32
    head_dim: int, block_m: hl.constexpr, with_dlse: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """minus_delta: dkdv_kernel adds it to dp. lse_log2: lse * log2(e), so that p is
    exp2(s - lse_log2); 0 where lse is -inf: no key is seen, and p is masked."""
    B, H, M, BLOCK_D = out.size()
    BLOCK_D = hl.specialize(BLOCK_D)
    log2e = 1.4426950408889634
    for tile_bh, tile_m in hl.tile([B * H, M], block_size=[1, block_m]):
        b, h = tile_bh.begin // H, tile_bh.begin % H
        d = hl.arange(BLOCK_D)[None, :]
        d_valid = valid_columns(d, head_dim)
        out_tile = hl.load(out, [b, h, tile_m.index[:, None], d], extra_mask=d_valid)
        do_tile = hl.load(do, [b, h, tile_m.index[:, None], d], extra_mask=d_valid)
        delta_tile = torch.sum(out_tile.to(torch.float32) * do_tile.to(torch.float32), -1)
        if with_dlse:
            delta_tile = delta_tile - dlse[b, h, tile_m]
        minus_delta[b, h, tile_m] = -delta_tile
        lse_tile = lse[b, h, tile_m]
        lse_log2[b, h, tile_m] = torch.where(lse_tile == float("-inf"), 0.0, lse_tile * log2e)
    return minus_delta


def head_and_block(w, num_heads, num_blocks):
    """The head and the block of program w: block 0 of eight heads, their block 1, and so on.

    The callers make block 0 the longest of a causal head: long programs first save 11% of the
    causal gradient. Eight heads at a time share L2: 5% at D = 64.
    """
    first_head = int32("{0} // ({1} * 8) * 8", w, num_blocks)
    heads = int32("tl.minimum(8, {0} - {1})", num_heads, first_head)
    i = int32("{0} - {1} * {2}", w, first_head, num_blocks)
    block = int32("{0} // {1}", i, heads)
    return int32("{0} + {1} - {2} * {3}", first_head, i, block, heads), block


def _dkdv_kernel(
    q: torch.Tensor, do: torch.Tensor,  # [B, H, M, head_dim]
    lse_log2: torch.Tensor, minus_delta: torch.Tensor,  # [B, H, M], of delta_kernel
    k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,  # [B, Hk, N, head_dim]
    ds: torch.Tensor,  # ds^T, [B, H, N, M], N and M padded to multiples of 128; is_band: not all M
    visible: torch.Tensor,  # [B, 2, M], int32
    ranges: torch.Tensor,  # [3, B, number of blocks of 128 keys], int32
    scale: float, qk_scale: float, cap_scale: float, head_dim: int, low: int, diagonal: int,
    block_m: hl.constexpr, block_n: hl.constexpr, windowed: hl.constexpr, by_row: hl.constexpr,
    capped: hl.constexpr,
    masked: hl.constexpr,  # some key is hidden
    write_ds: hl.constexpr, with_dk: hl.constexpr, with_dv: hl.constexpr,
    is_band: hl.constexpr,  # column 0 of a tile's ds is its m_start, as in dq_kernel
    tma: hl.constexpr,  # read by TMA, and specialise as hopper_forward_kernel does
) -> torch.Tensor:  # fmt: skip
    """dk and dv of a tile of keys, which walks over the queries of all heads that share the keys.

    wgmma can take only its first operand from registers. Scores are transposed, s^T = k q^T, so
    that p^T and ds^T are the first operands of dv and dk.
    With neither write_ds nor with_dv: dk alone, from the ds of the launch before. D > 128 on Hopper
    needs that launch: dk and dv together leave registers for small tiles only.
    """
    B, H, M, _ = q.size()
    Hk, N = k.size(1), k.size(2)
    BLOCK_D = hl.specialize(k.size(3))
    k_strides, v_strides, ranges_strides = k.stride(), v.stride(), ranges.stride()
    group = H // Hk
    num_n_blocks = (N + block_n - 1) // block_n
    num_m_blocks = (M + 127) // 128 * (128 // block_m)
    for w in hl.grid(B * Hk * num_n_blocks):
        bh, n_block = head_and_block(w, B * Hk, num_n_blocks)  # block 0: the most queries see it
        b = int32("{0} // {1}", bh, Hk)
        hk = int32("{0} - {1} * {2}", bh, b, Hk)
        if by_row and tma:
            b, hk, n_block = load_work(ranges, ranges_strides, w, Hk, num_n_blocks)
        keys = (n_block + 1) * block_n + (hl.arange(block_n) - block_n)  # rule 2
        d = hl.arange(BLOCK_D)
        if write_ds or with_dv:
            if tma:
                k_tile = load_resident(k, k_strides, b, hk, n_block, w, head_dim, block_n, BLOCK_D)
                v_tile = load_resident(v, v_strides, b, hk, n_block, 2 * w, head_dim, block_n,
                                       BLOCK_D)  # fmt: skip
            else:
                k_tile = load_tile(k, b, hk, keys, d, head_dim, False)
                v_tile = load_tile(v, b, hk, keys, d, head_dim, False)
        dk_acc = hl.zeros([block_n, BLOCK_D], dtype=torch.float32)
        dv_acc = hl.zeros([block_n, BLOCK_D], dtype=torch.float32)
        # From the first query that sees a key of this tile, rounded down to 128: dq_kernel reads ds
        # by up to 128 queries.
        m_start = int32("tl.maximum(0, ({0} * {1} - {2}) // 128) * 128", n_block, block_n, diagonal)
        steps = int32("tl.maximum(0, {0} - {1} // {2})", num_m_blocks, m_start, block_m)
        if windowed:  # up to the last query that sees a key of this tile, rounded up
            m_end = int32("(({0} + 1) * {1} - {2} + 127) // 128 * 128", n_block, block_n, low)
            steps = int32("tl.minimum({0}, tl.maximum(0, {1} - {2}) // {3})",
                          steps, m_end, m_start, block_m)  # fmt: skip
        if by_row:
            m_start, m_end = load_range(ranges, ranges_strides, b,
                                        int32("{0} * {1} // 128", n_block, block_n))  # fmt: skip
            steps = int32("({0} - {1}) // {2}", m_end, m_start, block_m)
        for i in hl.grid(0, int32("{0} * {1}", steps, group), 1):
            g = fast_div(i, steps)
            h = int32("{0} * {1} + {2}", hk, group, g)
            m = int32("{0} + ({1} - {2} * {3}) * {4}", m_start, i, g, steps, block_m)
            rows = m + hl.arange(block_m)
            q_tile = load_tile(q, b, h, rows, d, head_dim, tma)
            columns = rows - m_start if is_band else rows
            ds_index = [b.to(rows.dtype), h.to(rows.dtype), keys[:, None], columns[None, :]]
            if write_ds or with_dv:
                do_tile = load_tile(do, b, h, rows, d, head_dim, tma)
                if not capped:
                    lse_tile = load_row(lse_log2, b, h, rows, tma)
                minus_delta_tile = load_row(minus_delta, b, h, rows, tma)
                s = hl.dot(k_tile, q_tile.T, out_dtype=torch.float32)
                # dp starts as -delta: 143 of the loop's 377 instructions run while no product of
                # the warpgroup does. With -delta added after the product: 189 (D = 128).
                dp = minus_delta_tile[None, :] + hl.zeros([block_n, block_m], dtype=torch.float32)
                dp = hl.dot(v_tile, do_tile.T, acc=dp)
                if capped:
                    s = tanh(s * cap_scale)
                    dp = dp * (1 - s * s)
                    lse_tile = load_row(lse_log2, b, h, rows, tma)  # before tanh: 200 bytes spill
                # A query beyond M has p = 1, but do = 0 and dp = 0.
                p = exp2(s * qk_scale - lse_tile[None, :])
                if by_row:  # packed: two comparisons take 4% longer, loads before s and dp 2%
                    first_key = load_row(visible, b, 0, rows, tma)
                    num_keys = load_row(visible, b, 1, rows, tma) - first_key + 1
                    sees = is_below(keys[:, None] - first_key[None, :], num_keys[None, :])
                    p = torch.where(sees, p, 0.0)
                elif masked:
                    # One addition an element: `row >= column` makes ptxas compute the column's
                    # index again for each row (3 to 10% of the time).
                    from_diagonal = int32("{0} + {1} - {2} * {3}", m, diagonal, n_block, block_n)
                    distance = (from_diagonal - hl.arange(block_n))[:, None]
                    distance = distance + hl.arange(block_m)[None, :]
                    sees = distance >= 0
                    if windowed:  # a second torch.where: 430 instructions idle, not 232
                        sees = sees & (distance <= diagonal - low)
                    p = torch.where(sees, p, 0.0)
                if with_dv:
                    dv_acc = hl.dot(p.to(v.dtype), do_tile, acc=dv_acc)
                ds_tile = (p * dp).to(k.dtype)
            else:
                ds_tile = hl.load(ds, ds_index)
            if write_ds:
                hl.store(ds, ds_index, ds_tile)
            if with_dk:
                dk_acc = hl.dot(ds_tile, q_tile, acc=dk_acc)
        if with_dk:
            store_tile(dk, b, hk, keys, d, head_dim, dk_acc * scale)
        if with_dv:
            store_tile(dv, b, hk, keys, d, head_dim, dv_acc)
    return dk


def _dq_kernel(
    dq: torch.Tensor, k: torch.Tensor, ds: torch.Tensor,
    ranges: torch.Tensor,  # as forward_kernel's
    scale: float, head_dim: int, low: int, diagonal: int,
    block_m: hl.constexpr, block_n: hl.constexpr, windowed: hl.constexpr, by_row: hl.constexpr,
    band_n: hl.constexpr,  # block_n of dkdv_kernel, if ds is a band; else 0
) -> torch.Tensor:  # fmt: skip
    """dq of a tile of queries, from the ds that dkdv_kernel wrote."""
    B, H, M, BLOCK_D = dq.size()
    Hk, N = k.size(1), k.size(2)
    BLOCK_D = hl.specialize(BLOCK_D)
    ranges_strides, group = ranges.stride(), H // Hk
    num_m_blocks = (M + block_m - 1) // block_m
    for w in hl.grid(B * H * num_m_blocks):
        # From the end: the ds that was written last may still be in L2, and the last queries see
        # most keys.
        bh, m_block = head_and_block(w, B * H, num_m_blocks)
        bh = int32("{0} * {1} - 1 - {2}", B, H, bh)
        m_block = int32("{0} - 1 - {1}", num_m_blocks, m_block)
        b = int32("{0} // {1}", bh, H)
        h = int32("{0} - {1} * {2}", bh, b, H)
        hk = int32("{0} // {1}", h, group)
        rows, d = m_block * block_m + hl.arange(block_m), hl.arange(BLOCK_D)
        n_end = keys_end(int32("({0} + 1) * {1}", m_block, block_m), N, diagonal)
        # Not rounded: ds of keys that no row of the tile sees may not have been written.
        n_start = keys_start(int32("{0} * {1}", m_block, block_m), low, 1) if windowed else 0
        if by_row:
            n_start, n_end = load_range(ranges, ranges_strides, b,
                                        int32("{0} * {1} // 128", m_block, block_m))  # fmt: skip
        acc = hl.zeros([block_m, BLOCK_D], dtype=torch.float32)
        for n in hl.grid(n_start, n_end, block_n):
            keys = n + hl.arange(block_n)
            column_0 = keys * 0
            if band_n:  # m_start of dkdv_kernel
                column_0 = torch.clamp((keys // band_n * band_n - diagonal) // 128 * 128, min=0)
            ds_index = [b.to(keys.dtype), h.to(keys.dtype), keys[:, None],
                        rows[None, :] - column_0[:, None]]  # fmt: skip
            # ds of keys from n_end on was never written.
            ds_tile = hl.load(ds, ds_index, extra_mask=(keys < n_end)[:, None])
            k_tile = load_tile(k, b, hk, keys, d, head_dim, False)
            acc = hl.dot(ds_tile.T, k_tile, acc=acc)
        store_tile(dq, b, h, rows, d, head_dim, acc * scale)
    return dq


def _hopper_dq_kernel(
    dq: torch.Tensor, q: torch.Tensor, do: torch.Tensor,  # [B, H, M, head_dim]
    lse_log2: torch.Tensor, minus_delta: torch.Tensor,  # [B, H, M], of delta_kernel
    k: torch.Tensor, v: torch.Tensor,  # [B, Hk, N, head_dim]
    visible: torch.Tensor, ranges: torch.Tensor,  # as forward_kernel's
    scale: float, qk_scale: float, cap_scale: float, head_dim: int, low: int, diagonal: int,
    block_m: hl.constexpr, block_n: hl.constexpr, windowed: hl.constexpr, by_row: hl.constexpr,
    capped: hl.constexpr,
    masked: hl.constexpr,  # mask every tile: windowed, or diagonal % block_n > 0
) -> torch.Tensor:  # fmt: skip
    """dq where ds is not in memory, in hopper_forward_kernel's order: ds k of the previous tile is
    issued after s and dp of this one, and the last tile is masked after the loop."""
    B, H, M, BLOCK_D = dq.size()
    Hk, N = k.size(1), k.size(2)
    BLOCK_D = hl.specialize(BLOCK_D)
    q_strides, do_strides, lse_strides = q.stride(), do.stride(), lse_log2.stride()
    visible_strides, ranges_strides = visible.stride(), ranges.stride()
    group = H // Hk
    num_m_blocks = (M + block_m - 1) // block_m
    for w in hl.grid(B * H * num_m_blocks):
        bh, m_block = head_and_block(w, B * H, num_m_blocks)
        m_block = int32("{0} - 1 - {1}", num_m_blocks, m_block)  # the last see most keys
        b = int32("{0} // {1}", bh, H)
        h = int32("{0} - {1} * {2}", bh, b, H)
        if by_row:
            b, h, m_block = load_work(ranges, ranges_strides, w, H, num_m_blocks)
        hk = int32("{0} // {1}", h, group)
        rows = (m_block + 1) * block_m + (hl.arange(block_m) - block_m)  # rule 2
        d = hl.arange(BLOCK_D)
        last_key = torch.clamp(rows + diagonal, max=N - 1)
        n_end = keys_end(int32("({0} + 1) * {1}", m_block, block_m), N, diagonal, block_n)
        first_key = torch.clamp(rows + low, min=0) if windowed else 0
        n_start = keys_start(int32("{0} * {1}", m_block, block_m), low, block_n) if windowed else 0
        if by_row:
            first_key = load_row_vector(visible, visible_strides, b, 0, rows)
            last_key = load_row_vector(visible, visible_strides, b, 1, rows)
            n_start, n_end = load_range(ranges, ranges_strides, b, m_block, block_n)
        q_tile = load_resident(q, q_strides, b, h, m_block, w, head_dim, block_m, BLOCK_D)
        do_tile = load_resident(do, do_strides, b, h, m_block, 2 * w, head_dim, block_m, BLOCK_D)
        q_rows = m_block * block_m + hl.arange(block_m)
        lse_tile = load_row_vector(lse_log2, lse_strides, b, h, q_rows)
        minus_delta_tile = load_row_vector(minus_delta, lse_strides, b, h, q_rows)
        acc = hl.zeros([block_m, BLOCK_D], dtype=torch.float32)
        ds = hl.zeros([block_m, block_n], dtype=torch.float32)
        for n in hl.grid(n_start, n_end, block_n):
            ds_tile = ds.to(k.dtype)
            n_before = int32("tl.maximum({0} - {1}, {2})", n, block_n, n_start)
            k_before = k[b, hk, n_before + hl.arange(block_n), :]
            s = hl.dot(q_tile, k[b, hk, n + hl.arange(block_n), :].T, out_dtype=torch.float32)
            dp = hl.dot(do_tile, v[b, hk, n + hl.arange(block_n), :].T, out_dtype=torch.float32)
            if capped:
                s = tanh(s * cap_scale)
                dp = (dp + minus_delta_tile[:, None]) * (1 - s * s)
            x = s * qk_scale - lse_tile[:, None]
            if masked:
                sees = hl.arange(block_n)[None, :] <= (last_key - n)[:, None]
                if windowed:
                    sees = sees & (hl.arange(block_n)[None, :] >= (first_key - n)[:, None])
                x = torch.where(sees, x, float("-inf"))
            acc = hl.dot(ds_tile, k_before, acc=acc)
            ds = exp2(x) * (dp if capped else dp + minus_delta_tile[:, None])
        keys = n_end - block_n + hl.arange(block_n)
        ds = torch.where(keys[None, :] <= last_key[:, None], ds, 0.0)
        acc = hl.dot(ds.to(k.dtype), k[b, hk, keys, :], acc=acc)
        store_tile(dq, b, h, rows, d, head_dim, acc * scale)
    return dq


# ---- The report's kernel, and Blackwell's -------------------------------------------------------


def _report_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None,
    qk_scale: hl.constexpr, causal: hl.constexpr, cute: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """The report's loop on 3-D tiles, compiled for each shape.

    q, out: [B * H, M, D]; k, v: [B * Hk, N, D]; lse: [B * H, M], in base 2, or None.
    qk_scale: scale * log2(e). causal: row i sees keys up to i, and M = N.
    cute: the form that Helion's cute backend recognises and replaces by a FlashAttention-4 kernel.
    That kernel scales in float32, rescales only where m_i grows by 8, and takes 1/4 of the
    exponentials from a polynomial (relative error 9e-5).
    """
    BH, M, D = q.size()
    D = hl.specialize(D)
    group = BH // k.size(0)
    for tile_b, tile_m in hl.tile([BH, M]):
        m_i = hl.full([tile_b, tile_m], float("-inf"), dtype=torch.float32)
        l_i = hl.zeros([tile_b, tile_m], dtype=torch.float32)
        acc = hl.zeros([tile_b, tile_m, D], dtype=torch.float32)
        q_tile = q[tile_b, tile_m, :]
        for tile_n in hl.tile(k.size(1)):
            kv = tile_b if group == 1 else tile_b.index // group  # TMA needs the tile itself
            k_tile = k[kv, tile_n, :].transpose(1, 2)
            qk = torch.bmm(q_tile * qk_scale if cute else q_tile, k_tile, torch.float32)
            if not cute:  # q * qk_scale is rounded to q's dtype, the scores are float32
                qk = qk * qk_scale
            if causal:
                is_valid = tile_m.index[None, :, None] >= tile_n.index[None, None, :]
                qk = torch.where(is_valid, qk, float("-inf"))
            m_ij = torch.maximum(m_i, torch.amax(qk, -1))
            p = torch.exp2(qk - m_ij[:, :, None])
            alpha = torch.exp2(m_i - m_ij)
            l_i = l_i * alpha + torch.sum(p, -1)
            m_i = m_ij
            acc = acc * alpha[:, :, None]
            v_tile = v[kv, tile_n, :]
            acc = torch.baddbmm(acc, p.to(v_tile.dtype), v_tile)
        if lse is not None:
            lse[tile_b, tile_m] = m_i + torch.log2(l_i)
        # Divide once a row: a division for each element spills 16 bytes more (TILE128, sm_100).
        acc = acc / l_i[:, :, None] if cute else acc * (1 / l_i)[:, :, None]
        out[tile_b, tile_m, :] = acc.to(out.dtype)
    return out


report_kernel = helion.kernel(_report_kernel, static_shapes=True, dot_precision="tf32x3")
blackwell_kernel = helion.kernel(_report_kernel, static_shapes=True, backend="cute")


def _launch_recognised(generated, grid, *args, **options):
    """Launch blackwell_kernel if the cute backend recognised the loop: its other code is slow."""
    plans = [plan["kind"] for plan in getattr(generated, "_helion_cute_wrapper_plans", ())]
    if plans != ["helion_flash"]:
        raise RuntimeError("Helion's cute backend did not recognise blackwell_kernel")
    return helion.runtime.default_cute_launcher(generated, grid, *args, **options)


def _run_report(q, k, v, config, scale, causal, with_lse):
    """(out, lse), lse None without with_lse; None alone if Blackwell's kernel does not take q, k, v
    and scale. config: the report's, or BLACKWELL_CUTE. The host takes 0.2 ms: Helion's bind."""
    (B, H, M, D), cute = q.shape, isinstance(config, configs.Tuning)  # BLACKWELL_CUTE
    kernel, options = report_kernel, {}
    if cute:
        square = M == k.size(2) and M % 128 == 0 and D in (64, 128)
        plain = all(x.is_contiguous() and x.numel() <= 2**31 for x in (q, k, v))
        if not square or not plain or q.dtype == torch.float32 or not math.isclose(scale, D**-0.5):
            return None
        config = config.helion_config
        if q.is_cuda:  # the interpreter executes report_kernel
            kernel, options = blackwell_kernel, {"_launcher": _launch_recognised}
    out = torch.empty_like(q)
    lse = q.new_empty((B * H, M), dtype=torch.float32) if with_lse else None
    tensors = q, k, v, out
    if all(x.size(0) == 1 or x.stride(0) == x.size(1) * x.stride(1) for x in tensors):
        parts = [[x.flatten(0, 1) for x in tensors]]
    else:  # B and H do not fold into one dimension: one b after the other
        parts = zip(*tensors)
    for part in parts:
        arguments = *part, lse, scale * LOG2E, causal, cute
        kernel.bind(arguments).compile_config(config)(*arguments, **options)
    return out, None if lse is None else lse.div_(LOG2E).view(q.shape[:3])


# ---- Launching -----------------------------------------------------------------------------------
# A kernel is compiled once for each key of LAUNCHES: kernel, Tuning, constants, layout. layout is
# dtype, padded head dim, device, whether strides and addresses are multiples of 16, and whether dk
# and dv are float32 sums. Batch, heads, lengths, strides and scale are run-time arguments, which
# Helion's host function reads from the tensors at each call. A new length compiles nothing, unless
# it chooses another kernel, Tuning or `masked`. No tensor of a caller is kept.
LAUNCHES = {}  # {(kernel, tuning, constants, layout): Launch}
_compiling = threading.RLock()

# "tf32x3" multiplies float32 inputs as three tf32 products each, which keeps float32's precision on
# tensor cores. It does not touch bf16 and fp16.
_kernel = functools.partial(helion.kernel, static_shapes=False, dot_precision="tf32x3")
ranges_kernel = _kernel(_ranges_kernel, index_dtype=torch.int64)
order_kernel = _kernel(_order_kernel)
forward_kernel, hopper_forward_kernel = _kernel(_forward_kernel), _kernel(_hopper_forward_kernel)
merge_kernel, delta_kernel = _kernel(_merge_kernel), _kernel(_delta_kernel)
dkdv_kernel, dq_kernel = _kernel(_dkdv_kernel), _kernel(_dq_kernel)
hopper_dq_kernel = _kernel(_hopper_dq_kernel)
# The same with 64-bit offsets, for tensors that reach over 2^31 elements.
WIDE = {x: _kernel(x.fn, index_dtype=torch.int64)
        for x in (forward_kernel, delta_kernel, dkdv_kernel, dq_kernel)}  # fmt: skip


def launch(kernel, tuning, tensors, numbers, constants, layout):
    """Run a kernel; at the first call for its key, compile it. layout: the last part of the key."""
    key = kernel, tuning, constants, layout
    run = LAUNCHES.get(key)
    if run is not None:
        return run(*tensors, *numbers)
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("flash_attention is not compiled for this dtype, head dim and mask yet: "
                           "call it once before capturing a CUDA graph")  # fmt: skip
    with _compiling:
        run = LAUNCHES.get(key) or Launch(kernel, tuning, tensors, constants, layout)
        run(*tensors, *numbers)
        LAUNCHES[key] = run  # after its first call: no other thread sees it half made


class Launch:
    """One compiled kernel. Helion's host function makes grid, integers and TMA descriptors from
    tensors and numbers, and hands them to `compile`, later to `repeat`."""

    def __init__(self, kernel, tuning, tensors, constants, layout):
        # Helion compiles for the tensors that it sees. So it sees stand-ins: the last size is
        # padded, no stride is a product of sizes, and no number is 0 or 1. Then every size, stride
        # and number stays an argument.
        padded = lambda n: configs.padded(min(n, 256))  # the last size of ds is M
        strides = 5 * 512 * 512, 512 * 512, 512
        stand_ins = [
            torch.empty_strided((2, 4, 384, *map(padded, x.shape[3:])),
                                (*strides[: x.dim() - 1], 1), dtype=x.dtype, device=x.device)
            for x in tensors
        ]  # fmt: skip
        parameters = inspect.signature(kernel.fn).parameters.values()
        numbers = [0.5 if p.annotation is float else 3 + 2 * i
                   for i, p in enumerate(parameters) if p.annotation in (int, float)]  # fmt: skip
        _binding.hopper = "range_warp_specializes" in tuning.helion_config.config
        try:  # Helion looks at the arguments again when it compiles
            bound = kernel.bind((*stand_ins, *numbers, *constants))
            host = bound.compile_config(tuning.helion_config)
        finally:
            _binding.hopper = False
        self.host, self.launcher, self.jit, self.scratch = host, self.compile, None, True
        self.constants, self.is_wide = constants, kernel in WIDE.values()
        _, _, self.device, self.aligned, _ = layout

    def __call__(self, *arguments):
        if self.scratch:
            context = contextvars.copy_context()  # the caller's allocator stays as it is
            context.run(triton.set_allocator, self.allocate)
            context.run(self.host, *arguments, *self.constants, _launcher=self.launcher)
        else:
            self.host(*arguments, *self.constants, _launcher=self.launcher)

    def allocate(self, size, alignment, stream):
        """Memory for the TMA descriptors that a kernel makes."""
        return torch.empty(size, dtype=torch.int8, device=self.device)

    def compile(self, jit, grid, *arguments, **options):
        """Compile and launch. In Triton's interpreter: execute."""
        if isinstance(jit, triton.JITFunction) and self.jit is None:
            # Triton compiles anew where an integer is 1 or a multiple of 16. Here only strides may
            # be multiples of 16, if all are; those of lse, dlse, delta, visible, ranges vary.
            is_aligned = lambda name: self.aligned and re.match(
                r"(?!lse|dlse|delta|visible|ranges)\w+_stride_", name)  # fmt: skip
            self.jit = triton.jit(jit.fn, do_not_specialize=[
                p.name for p, x in zip(jit.params, arguments)
                if isinstance(x, int) and not p.is_constexpr and not is_aligned(p.name)
            ])  # fmt: skip
        # Triton 3.10 would take two instructions for x * scale + offset (triton pull 11270).
        options["enable_fp_fusion"] = True
        jit = self.jit or jit
        self.compiled = helion.runtime.default_launcher(jit, grid, *arguments, **options)
        # Wide kernels keep Triton's look-up: a stride may have 64 bits in one call, 32 in the next.
        if self.compiled is not None and not self.is_wide:
            self.launcher, self.host = self.repeat, read_once(self.host, jit, arguments)
            self.scratch = self.compiled.metadata.global_scratch_size > 0

    def repeat(self, jit, grid, *arguments, **options):
        """Triton's launch without its look-up of what is compiled and without hooks."""
        kernel = self.compiled
        stream = triton.runtime.driver.active.get_current_stream(self.device.index)
        kernel.run(*grid, 1, 1, stream, kernel.function, kernel.packed_metadata,
                   None, None, None, *arguments)  # fmt: skip


class Descriptor(TensorDescriptor):
    """A TMA descriptor without Triton's checks: `_forward` and `_backward` check first."""
    __post_init__ = lambda self: None


def read_once(host, jit, arguments):
    """Helion's host function, rewritten to be 4 us faster: it reads sizes and strides once, makes
    descriptors without checks, and has constants as numbers. A line that no pattern matches stays
    as it is: correct, only slower."""
    source = inspect.getsource(host)
    source = re.sub(r"_helion_tensor_descriptor\((\w+), \[[^]]*\], \[[^]]*\], ",
                    r"Descriptor(\1, \1_size, \1_stride, ", source)  # fmt: skip
    source = re.sub(r"\b(\w+)\.(size|stride)\((\d)\)", r"\1_\2[\3]", source)
    for p, x in zip(jit.params, arguments):
        if p.is_constexpr:
            source = re.sub(rf"\b{p.name} = .*", f"{p.name} = {x}", source)
    tensors = [x for x in inspect.signature(host).parameters
               if re.search(rf"\b{x}_(size|stride)\b", source)]  # fmt: skip
    reads = "".join(f"    {x}_size, {x}_stride = {x}.shape, {x}.stride()\n" for x in tensors)
    namespace = {**host.__globals__, "Descriptor": Descriptor}
    exec(source.replace(":\n", ":\n" + reads, 1), namespace)
    return namespace[host.__name__]


# ---- Allocate, choose, launch --------------------------------------------------------------------
# One ds covers the heads that fit in DS_BYTES. If these have fewer than DS_KEYS keys in all (two
# tiles of 128 for each SM), ds covers more heads, up to 2 * DS_BYTES. Half or twice DS_BYTES
# changes the time by less than 2%.
DS_BYTES, DS_KEYS = 2**29, 2**15
FIXUP_ROWS = 512  # that one program of the fix-up checks


def _cdiv(x, y):  # triton.cdiv takes 2 us
    return (x + y - 1) // y


@functools.lru_cache
def _gpu(device):
    """Compute capability, or None on a CPU, and the number of SMs."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return capability, helion.runtime.get_num_sm(device)


def _facts(x):
    """is_wide: a 4-D tensor needs 64-bit offsets. for_tma: TMA can read it. aligned: its rows are
    contiguous, its strides and its address multiples of 16."""
    (B, H, S, D), (b, h, s, d) = x.shape, x.stride()
    any_bit, is_row = b | h | s, d == 1 and x.data_ptr() % 16 == 0
    last = (B - 1) * b + (H - 1) * h + (S - 1) * s + (D - 1) * d
    for_tma = is_row and b * h * s > 0 and any_bit * x.element_size() % 16 == 0
    return any_bit >= 2**31 or last >= 2**31, for_tma, is_row and any_bit % 16 == 0


def _out_like(x):
    """Memory in x's layout where its rows are contiguous."""
    keep = torch.preserve_format if x.stride(3) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=keep)


def _for_tma(x, is_padded=False):
    """x, or a copy that TMA reads. For padded columns load_matrix reads past the head, into another
    head if heads interleave in a row of x, and that head may be NaN: then copy, too."""
    if not _facts(x)[1] or is_padded and any(s % x.stride(2) for s in x.stride()[:2]):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _bounds(mask, M, N):
    """low and diagonal: row i sees the keys from i + low to i + diagonal; -M and N: no limit.

    mask: (is_causal, left, right). is_causal: 0 no, 1 upper left, 2 lower right. left, right: of
    the window; below 0: no limit.
    """
    is_causal, left, right = mask
    aligned = 0 if is_causal == 1 else N - M
    right = 0 if is_causal else right
    low = aligned - left if left >= 0 else -M
    diagonal = aligned + right if right >= 0 else N
    return low if low > 1 - M else -M, diagonal if diagonal < N - 1 else N


def _scales(scale, softcap):
    """qk_scale and cap_scale of the kernels."""
    if softcap:
        return softcap * LOG2E, 2 * LOG2E * scale / softcap
    return scale * LOG2E, 0.0  # not read


def _query_ranges(intervals, N):
    """`visible` and ranges of blocks of 128 queries, as the kernels take them, without order."""
    B, _, M = intervals.shape
    padded_m = (M + 3) // 4 * 4  # TMA needs strides of multiples of 16 bytes
    visible = intervals.new_empty_strided((B, 2, M), (2 * padded_m, padded_m, 1))
    ranges = intervals.new_empty((3, B, _cdiv(M, 128)))
    layout = torch.int32, 0, intervals.device, False, False
    launch(ranges_kernel, configs.RANGES, (intervals, visible, ranges), (N,), (), layout)
    return visible, ranges


def _add_order(ranges):
    layout = torch.int32, 0, ranges.device, False, False
    launch(order_kernel, configs.RANGES, (ranges.view(3, 1, -1),), (), (), layout)


def _key_ranges(query_ranges, N):
    """ranges of blocks of 128 keys: all queries that see a key of the block are in
    range(begin, end). Both are multiples of 128."""
    begin, end, _ = query_ranges.unsqueeze(2).unbind(0)
    key = torch.arange(0, N, 128, dtype=torch.int32, device=begin.device).unsqueeze(1)
    query = torch.arange(0, 128 * begin.size(2), 128, dtype=torch.int32, device=begin.device)
    meets = (begin < key + 128) & (key < end)
    end = (query + 128).where(meets, 0).amax(-1)
    return torch.stack((query.where(meets, 2**30).amin(-1).minimum(end), end, end))  # [2]: any


def _forward(q, k, v, visible, mask, scale, softcap, config, exact_lse):
    """out and lse. visible: [B, 2, M], int32, or None. mask: as `_bounds` takes it."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():  # where Triton launches
        with torch.cuda.device(q.device):
            return _forward(q, k, v, visible, mask, scale, softcap, config, exact_lse)
    q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()  # a view may say -x by a bit only
    (B, H, M, D), N = q.shape, k.size(2)
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"q must be on a CUDA device, got {q.device}: to execute the kernel on the CPU, "
            "start Python with TRITON_INTERPRET=1 (check.py shows what else that takes)"
        )
    out, lse = _out_like(q), q.new_empty((B, H, M), dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    scale = D**-0.5 if scale is None else scale
    if isinstance(config, helion.Config) or config is not None and config.kernel == "blackwell":
        found = _run_report(q, k, v, config, scale, mask[0] > 0, exact_lse)
        if found is not None:
            return found
        config = None
    # Few queries: the heads that share keys are rows of one tile, which reads each key once, and
    # programs share the keys where there are fewer tiles than SMs (below).
    rows = H // k.size(1) * M
    split = config is None and rows <= 64 and N > 256 and q.numel() < 2**31
    q = q.reshape(B, k.size(1), rows, D) if split else q
    low, diagonal = _bounds(mask, M, N)
    by_row = visible is not None
    windowed = by_row or low > -M
    is_dense = diagonal == N and not windowed
    numbers, block_d = (*_scales(scale, softcap), D, low, diagonal), configs.padded(D)
    capability, num_programs = _gpu(q.device)  # one program per SM
    tuning = configs.best_decode(D, q.dtype, rows) if split else config or configs.best(
        capability, D, q.dtype, B * H, M, N)  # fmt: skip
    plain_tuning = configs.hopper_general(D)
    if tuning.kernel == "hopper_forward" and (
        B * H * _cdiv(M, 128) >= 2**19  # fast_div is exact below 2^20
        or max(*q.stride(), *out.stride()) >= 2**31 or M * out.stride(2) >= 2**31  # int32 offsets
        or B * q.stride(0) >= 2**31 * max(1, q.stride(2))
        or D < 16  # never tried
        or scale < 2.0**-100 and not softcap  # -inf * qk_scale must be -inf
    ):  # fmt: skip
        tuning = plain_tuning
    if by_row and tuning is configs.HOPPER_64:  # ranges are of 128 rows
        tuning = configs.HOPPER
    is_hopper = tuning.kernel == "hopper_forward"
    is_wide, for_tma, aligned = zip(*map(_facts, (q, k, v, out)))
    if is_hopper and (D < block_d or not all(for_tma[:3])):
        if k.stride(1) == v.stride(1) == 0:  # one head, expanded: TMA takes no stride of 0
            k, v = k[:, 0].unsqueeze(1), v[:, 0].unsqueeze(1)
        q, k, v = _for_tma(q, D < block_d), _for_tma(k), _for_tma(v)
        is_wide, for_tma, aligned = zip(*map(_facts, (q, k, v, out)))
    plain_kernel = WIDE[forward_kernel] if any(is_wide) else forward_kernel
    layout = q.dtype, block_d, q.device, D % 16 == 0 and all(aligned), False  # no float32 sums
    block_m, block_n = tuning.block_m, tuning.block_n
    masking = _query_ranges(visible, N) if by_row else (lse, lse)  # not read
    if by_row and is_hopper:
        _add_order(masking[1])
    tensors, capped = (q, k, v, out, lse, *masking), bool(softcap)
    keys_per_part, rows_per_program = N, block_m
    if split:
        tiles = B * q.size(1) * _cdiv(rows, block_m)
        parts = max(1, min(configs.DECODE_WAVES * num_programs // tiles, _cdiv(N, 128)))
        keys_per_part = _cdiv(N, 128 * parts) * 128
        parts = _cdiv(N, keys_per_part)
        out_parts = q.new_empty((parts * B, *q.shape[1:]), dtype=torch.float32)
        tensors = q, k, v, out_parts, lse.new_empty(out_parts.shape[:3]), *masking
    if is_hopper:
        running_max = q.dtype == torch.float16
        # The mask waits until after the loop if only the last tile has hidden keys: dense, or
        # square tiles whose block_n divides the diagonal. It cannot wait for a running maximum, and
        # not with BLOCK_D = 256, which has no product after the loop.
        masked = windowed or not is_dense and (diagonal % block_n > 0 or block_n < block_m)
        if running_max or block_d == 256:
            masked = not is_dense or N % block_n > 0
        paired = int(not is_dense and not by_row and B * H * _cdiv(M, block_m) > num_programs)
        constants = block_m, block_n, windowed, by_row, capped, masked, running_max, (
            exact_lse and not running_max)
        hopper_numbers = *numbers, num_programs, paired
        launch(hopper_forward_kernel, tuning, tensors, hopper_numbers, constants, layout)
        if running_max:
            return out, lse
        tuning, rows_per_program = plain_tuning, FIXUP_ROWS
    constants = tuning.block_m, tuning.block_n, windowed, by_row, capped, rows_per_program, split
    launch(plain_kernel, tuning, tensors, (*numbers, M, keys_per_part), constants, layout)
    if split:
        of_parts = (x.view(parts, B * H * M, -1).transpose(0, 1) for x in tensors[3:5])
        launch(merge_kernel, configs.MERGE, (*of_parts, out, lse), (D,), (configs.MERGE.block_n,),
               layout)  # fmt: skip
    return out, lse


def _chunks(B, Hk, group, M, N, itemsize):
    """(batches, heads of keys, queries) that one ds covers. M, N: multiples of 128."""
    bytes_per_row = group * N * itemsize
    heads_that_fit = max(DS_BYTES // (bytes_per_row * M), _cdiv(DS_KEYS, N))
    heads_that_fit = max(1, min(heads_that_fit, 2 * DS_BYTES // (bytes_per_row * 128)))
    equal_parts = lambda whole, most: _cdiv(whole, _cdiv(whole, most))
    batches = equal_parts(B, max(1, heads_that_fit // Hk))
    heads = equal_parts(Hk, heads_that_fit)
    rows = 2 * DS_BYTES // (batches * heads * bytes_per_row)
    rows = min(rows, 2**24 // group)  # fast_div of dkdv_kernel
    return batches, heads, min(M, max(128, rows // 128 * 128))


def _backward(q, k, v, out, lse, visible, do, dlse, mask, scale, softcap, needs_q, needs_kv):
    """dq, dk, dv; None for a gradient that is not needed. visible, mask: as for `_forward`."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return _backward(
                q, k, v, out, lse, visible, do, dlse, mask, scale, softcap, needs_q, needs_kv)
    if q.numel() == 0 or k.numel() == 0:
        return _out_like(q).zero_(), _out_like(k).zero_(), _out_like(v).zero_()
    do, lse = torch.zeros_like(out) if do is None else do, lse.contiguous()
    dlse = dlse if dlse is None else dlse.resolve_neg().contiguous()
    q, k, v, do = q.resolve_neg(), k.resolve_neg(), v.resolve_neg(), do.resolve_neg()
    if do.stride(3) != 1:  # the gradient of a sum is one number, expanded
        do = do.contiguous()
    (B, H, M, D), (Hk, N) = q.shape, k.shape[1:3]
    dq = _out_like(q) if needs_q else q  # q, k and v: not written
    dk, dv = (_out_like(k), _out_like(v)) if needs_kv else (k, v)
    group, padded_m, padded_n = H // Hk, (M + 127) // 128 * 128, (N + 127) // 128 * 128
    scale = D**-0.5 if scale is None else float(scale)
    scales, capped = (scale, *_scales(scale, softcap)), bool(softcap)
    low, diagonal = _bounds(mask, M, N)
    by_row = visible is not None
    windowed = by_row or low > -M
    query_ranges = key_ranges = lse  # not read
    if by_row:
        visible, query_ranges = _query_ranges(visible, N)
        key_ranges = _key_ranges(query_ranges, N)

    # dq_kernel needs ds in memory, hopper_dq_kernel does not. Wide tensors take the plain kernels,
    # and so does a launch that writes only ds: Triton does not specialise its warps.
    tunings = configs.best_gradient(_gpu(q.device)[0], D, q.dtype, by_row=by_row)
    is_wide, for_tma, aligned = zip(*map(_facts, (q, k, v, do, out, dq, dk, dv)))
    is_wide = any(is_wide) or max(q.numel(), k.numel(), B * H * padded_m) >= 2**31
    keep_ds, is_band = tunings[1].kernel == "dq" or is_wide, False
    batches, heads, rows, ds_m = B, Hk, padded_m, padded_m
    if keep_ds:
        if windowed and not by_row:  # so many queries see 128 keys; both ends are rounded to 128
            ds_m = min(padded_m, (diagonal - low + 382) // 128 * 128)
        batches, heads, rows = _chunks(B, Hk, group, ds_m, padded_n, q.element_size())
        if rows < ds_m < padded_m:  # the band does not fit
            ds_m = padded_m
            batches, heads, rows = _chunks(B, Hk, group, ds_m, padded_n, q.element_size())
        is_band = ds_m < padded_m
        ds_m, rows = (ds_m, padded_m) if is_band else (rows, rows)
        is_wide |= batches * heads * group * padded_n * ds_m >= 2**31
    if is_wide or keep_ds and not needs_kv:
        tunings = configs.best_gradient(_gpu(q.device)[0], D, q.dtype, specialised=False)
    of_dkdv, of_dq, of_dk = tunings
    if (tma := of_dkdv.kernel == "hopper_dkdv") and not all(for_tma[:4]):
        q, k, v, do = map(_for_tma, (q, k, v, do))
        aligned = [_facts(x)[2] for x in (q, k, v, do, out, dq, dk, dv)]
    if by_row and of_dq.kernel == "hopper_dq":  # only Hopper's kernels read it
        _add_order(query_ranges)
        _add_order(key_ranges)
    dk_apart = needs_kv and of_dk is not None
    write_ds = keep_ds and needs_q or dk_apart
    # Launches of dkdv_kernel: (Tuning, write_ds, with_dk, with_dv).
    modes = [(of_dkdv, write_ds, needs_kv and not dk_apart, needs_kv)] * (write_ds or needs_kv)
    modes += [(of_dk, False, True, False)] * dk_apart

    lse_log2, minus_delta = (  # TMA reads them: strides are multiples of 16 bytes
        lse.new_empty_strided((B, H, M), (H * padded_m, padded_m, 1)) for _ in range(2))
    ds = q.new_empty((batches, heads * group, padded_n, ds_m) if write_ds else (1, 1, 128, 128))
    is_whole, is_summed = (batches, heads) == (B, Hk) and rows >= M, needs_kv and rows < M
    if is_summed:  # over chunks of queries, in float32
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (dk, dv))
    layout = q.dtype, configs.padded(D), q.device, D % 16 == 0 and all(aligned), False
    of_delta, of_keys, of_queries = (
        WIDE[x] if is_wide else x for x in (delta_kernel, dkdv_kernel, dq_kernel))
    tensors = out, do, lse, lse if dlse is None else dlse, lse_log2, minus_delta
    constants = configs.DELTA.block_m, dlse is not None
    launch(of_delta, configs.DELTA, tensors, (D,), constants, layout)
    for b, h, m in itertools.product(
        range(0, B, batches), range(0, Hk, heads), range(0, M, rows)
    ):
        numbers = D, low + m, diagonal if diagonal == N else diagonal + m
        bs, hs, ms = slice(b, b + batches), slice(h, h + heads), slice(m, m + rows)
        part = lambda xs, *at: xs if is_whole else [x[at] for x in xs]
        k_, v_, dk_, dv_ = part((k, v, dk, dv), bs, hs)
        hs = slice(h * group, (h + heads) * group)
        q_, do_, lse_, delta_, dq_ = part((q, do, lse_log2, minus_delta, dq), bs, hs, ms)
        visible_, query_ranges_, key_ranges_ = visible if by_row else lse, query_ranges, key_ranges
        if by_row and not is_whole:
            visible_ = visible[bs, :, ms]
            query_ranges_ = query_ranges[:, bs, m // 128 : (m + rows) // 128]
            key_ranges_ = (key_ranges[:, bs] - m).clamp(0, 128 * query_ranges_.size(2))
        if is_summed:
            dk_sum, dv_sum, dk_, dv_ = dk_, dv_, torch.empty_like(dk_), torch.empty_like(dv_)
        tensors = q_, do_, lse_, delta_, k_, v_, dk_, dv_, ds, visible_, key_ranges_
        for tuning, *mode in modes:
            constants = (tuning.block_m, tuning.block_n, windowed, by_row, capped,
                         windowed or diagonal < N, *mode, is_band, tma)  # fmt: skip
            launch(of_keys, tuning, tensors, (*scales, *numbers), constants,
                   (*layout[:4], is_summed))  # fmt: skip
        if is_summed:
            dk_sum += dk_
            dv_sum += dv_
        if needs_q and keep_ds:
            constants = of_dq.block_m, of_dq.block_n, windowed, by_row, of_dkdv.block_n * is_band
            tensors = dq_, k_, ds, query_ranges_
            launch(of_queries, of_dq, tensors, (scale, *numbers), constants, layout)
        elif needs_q:
            masked = windowed or diagonal < N and diagonal % of_dq.block_n > 0
            constants = of_dq.block_m, of_dq.block_n, windowed, by_row, capped, masked
            tensors = dq_, q_, do_, lse_, delta_, k_, v_, visible_, query_ranges_
            launch(hopper_dq_kernel, of_dq, tensors, (*scales, *numbers), constants, layout)
    dk, dv = (dk.to(k.dtype), dv.to(v.dtype)) if needs_kv else (None, None)
    return dq if needs_q else None, dk, dv


# ---- Operators and autograd ----------------------------------------------------------------------
# Under torch.compile, torch.export, dispatch modes and for subclasses of Tensor, a call is one
# operator. Its name contains the module's: two copies of this file can be imported.
_NAME = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAME}::forward", mutates_args=())
def _forward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None,
    is_causal: int, left: int, right: int, scale: float | None, softcap: float | None,
    exact_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _forward(q, k, v, visible, (is_causal, left, right), scale, softcap, None, exact_lse)


@_forward_operator.register_fake
def _(q, k, v, visible, is_causal, left, right, scale, softcap, exact_lse):
    return _out_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(f"{_NAME}::backward", mutates_args=())
def _backward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    visible: torch.Tensor | None, do: torch.Tensor | None, dlse: torch.Tensor | None,
    is_causal: int, left: int, right: int, scale: float | None, softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    mask = is_causal, left, right
    return _backward(q, k, v, out, lse, visible, do, dlse, mask, scale, softcap, True, True)


@_backward_operator.register_fake
def _(q, k, v, out, lse, visible, do, dlse, is_causal, left, right, scale, softcap):
    return _out_like(q), _out_like(k), _out_like(v)


# As torch counts SDPA: two products forward, five backward, causal or not.
for _flops, _operator in ((4, "forward"), (10, "backward")):
    register_flop_formula(getattr(getattr(torch.ops, _NAME), _operator))(
        lambda q_shape, k_shape, *_, flops=_flops, **__: flops * math.prod(q_shape) * k_shape[2])


def _is_traced(q, k, v):
    return (
        torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        or not {type(q), type(k), type(v)} <= {torch.Tensor, torch.nn.Parameter}
    )  # fmt: skip


def _dispatch(q, k, v, visible, mask, scale, softcap, config, exact_lse):
    """out and lse, by the operator where torch traces the call."""
    if _is_traced(q, k, v):
        return _forward_operator(q, k, v, visible, *mask, scale, softcap, exact_lse)
    return _forward(q, k, v, visible, mask, scale, softcap, config, exact_lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, visible, mask, scale, softcap, config):
        out, lse = _dispatch(q, k, v, visible, mask, scale, softcap, config, True)
        ctx.save_for_backward(q, k, v, out, lse, visible)
        ctx.mask, ctx.scales = mask, (scale, softcap)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlse):
        tensors = *ctx.saved_tensors, do, dlse  # read once: checkpointing forbids a second
        if _is_traced(*tensors[:3]):
            grads = _backward_operator(*tensors, *ctx.mask, *ctx.scales)
        else:
            needs_q, *needs_kv = ctx.needs_input_grad[:3]
            grads = _backward(*tensors, ctx.mask, *ctx.scales, needs_q, any(needs_kv))
        return *grads, None, None, None, None, None


def _sdpa_forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if dropout_p or return_debug_mask:
        raise RuntimeError("flash_attn.py has no dropout: call "
                           "torch.nn.attention.restore_flash_attention_impl()")  # fmt: skip
    _check(q, k, v, is_causal, None, None, None, scale, None, True)
    if q.size(3) % 8 or v.size(3) != q.size(3):  # torch pads before it calls this
        raise ValueError("q, k and v must have one head dim, a multiple of 8")
    # is_causal of SDPA's flash backend is lower right: torch.nn.attention.bias relies on that.
    out, lse = _forward(q, k, v, None, (2 * is_causal, -1, -1), scale, None, None, True)
    seed, offset = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))
    return out, lse, None, None, q.size(2), k.size(2), seed, offset, q.new_empty(0)


def _sdpa_backward(do, q, k, v, out, lse, _q, _k, M, N, dropout_p, is_causal, _seed, _offset, *,
                   scale=None):  # fmt: skip
    mask = 2 * is_causal, -1, -1
    return _backward(q, k, v, out, lse, None, do, None, mask, scale, None, True, True)


class _Registered(torch.library.Library):
    """Until remove(), SDPA's flash backend calls this file. key: CUDA, or CPU."""
    remove = torch.library.Library._destroy

    def __init__(self, key="CUDA"):
        super().__init__("aten", "IMPL")
        self.impl("_scaled_dot_product_flash_attention", _sdpa_forward, key)
        self.impl("_scaled_dot_product_flash_attention_backward", _sdpa_backward, key)


if hasattr(torch.nn.attention, "register_flash_attention_impl"):  # torch 2.13
    torch.nn.attention.register_flash_attention_impl("helion", register_fn=_Registered)


# ---- The public function -------------------------------------------------------------------------


def _check(q, k, v, is_causal, window, visible, sinks, scale, softcap, enable_gqa):
    if torch.jit.is_tracing():
        raise RuntimeError("flash_attention does not run under torch.jit.trace: "
                           "use torch.export.export or torch.compile")  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise ValueError(f"{name} must not be nested: pad it, or call once for each of "
                             f"{name}.unbind()")  # fmt: skip
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-D [B, H, S, D], got shape {tuple(x.shape)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError("q, k and v must have one dtype, bfloat16, float16 or float32, got "
                        f"{q.dtype}, {k.dtype}, {v.dtype}")  # fmt: skip
    if not q.device == k.device == v.device:
        raise ValueError("q, k and v must be on one device, got "
                         f"{q.device}, {k.device}, {v.device}")  # fmt: skip
    (B, H, M, D), Hk = q.shape, k.shape[1]
    if not (1 <= D <= 256 and 1 <= v.size(3) <= 256):
        raise ValueError("q's and v's head dims (size(3)) must be from 1 to 256, got "
                         f"{D} and {v.size(3)}")  # fmt: skip
    if k.shape[0] != B or k.shape[3] != D or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v must be [{B}, Hk, N, ...] and k's head dim {D}, as q is "
                         f"{tuple(q.shape)}, got {tuple(k.shape)}, {tuple(v.shape)}")  # fmt: skip
    if not (H == Hk or enable_gqa and Hk > 0 and H % Hk == 0):
        divides = "divide" if enable_gqa else "(without enable_gqa) be"
        raise ValueError(f"k's number of heads (size(1)) must {divides} q's {H}, got {Hk}")
    if not isinstance(is_causal, (bool, CausalVariant)):
        raise TypeError(f"is_causal must be a bool or a CausalVariant, got {is_causal!r}")
    if window is not None and not (
        isinstance(window, (tuple, list)) and len(window) == 2
        and all(x is None or type(x) is int for x in window)
    ):  # fmt: skip
        raise TypeError(f"window must be (left, right), integers or None, got {window!r}")
    if visible is not None and not (
        isinstance(visible, (tuple, list)) and len(visible) == 2 and all(
            isinstance(x, torch.Tensor) and x.dtype == torch.int32 and x.device == q.device
            and x.shape in ((M,), (B, M)) for x in visible)
    ):  # fmt: skip
        raise ValueError(f"visible must be (first, last), int32 of shape ({M},) or ({B}, {M}) on "
                         f"{q.device}, got {visible!r:.99}")  # fmt: skip
    if visible is not None and not (window is None and is_causal is False):
        raise ValueError("visible replaces is_causal and window: leave these out")
    if sinks is not None and not (
        isinstance(sinks, torch.Tensor) and sinks.shape == (H,) and sinks.device == q.device
        and sinks.is_floating_point()
    ):  # fmt: skip
        raise ValueError(f"sinks must be floats of shape ({H},) on {q.device}, got {sinks!r:.99}")
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"enable_gqa must be a bool, got {enable_gqa!r}")
    for name, x in (("scale", scale), ("softcap", softcap)):
        if not isinstance(x, (float, int, type(None))):
            raise TypeError(f"{name} must be a float or None, got {type(x).__name__}")
    if softcap and not 1e-4 <= softcap <= 1e4:  # larger: an error larger than bfloat16's
        raise ValueError(f"softcap must be from 1e-4 to 1e4, or 0 or None, got {softcap}")
    largest = min(2e38, 1e38 * softcap) if softcap else 2e38  # qk_scale, cap_scale: float32
    if scale is not None and not abs(scale) < largest:
        raise ValueError(f"scale must be finite and below {largest:.0e}, got {scale}")


def _check_config(q, k, is_causal, window, visible, sinks, softcap, config):
    D, is_report = q.size(3), isinstance(config, helion.Config)
    if not is_report and not isinstance(config, configs.Tuning):
        raise TypeError(f"config must be one of configs.py, got {type(config).__name__}")
    kernel = "report" if is_report else config.kernel
    if kernel not in ("report", "forward", "hopper_forward", "blackwell"):
        raise ValueError(f"config must be a Tuning of a forward kernel, got {kernel!r}")
    options = window, visible, sinks, softcap or None
    if kernel in ("report", "blackwell") and any(x is not None for x in options):
        raise ValueError(f"config ({kernel}) takes no window, visible, sinks and softcap")
    if is_report:
        if (is_causal is not False or q.size(1) != k.size(1) or D.bit_count() > 1
                or min(q.size(2), k.size(2)) < 2):  # fmt: skip  # helion 1.5.1: no bmm of size 1
            raise ValueError("config is the report's: dense, without GQA, head dims that are "
                             "powers of two, lengths of at least 2")  # fmt: skip
        return
    if visible is not None and config is not configs.HOPPER_64 and (  # which _forward replaces
        config.block_m > 128 or kernel == "hopper_forward" and config.block_m < 128
    ):  # fmt: skip
        raise ValueError(f"config must have tiles of 128 rows for visible, got {config.block_m}")
    if kernel == "hopper_forward":
        if q.dtype == torch.float32 or D > config.head_dim:
            raise ValueError(f"config takes 16-bit floats and head dims up to {config.head_dim}, "
                             f"got {q.dtype} and {D}")  # fmt: skip
        stages = config.helion_config.config.get("range_num_stages")
        if not isinstance(stages, list) or max(stages) > 2:  # rule 6
            raise ValueError(f"config must have range_num_stages of at most 2, got {stages}")
    major = {"hopper_forward": 9, "blackwell": 10}.get(kernel)
    if major and q.is_cuda and (found := torch.cuda.get_device_capability(q.device))[0] != major:
        raise ValueError(f"config takes GPUs of compute capability {major}.x, got {found}")


def flash_attention(
    q, k, v, *, is_causal=False, window=None, visible=None, sinks=None, scale=None, softcap=None,
    enable_gqa=False, return_lse=False, config=None,
):
    """softmax(q k^T * scale) v and its gradient, called like torch's scaled_dot_product_attention.

    q: [B, H, M, D]; k: [B, Hk, N, D]; v: [B, Hk, N, Dv]. One dtype: bfloat16, float16 or float32.
        D, Dv: up to 256. If they differ, or are no multiple of 8, all three are copied and padded
        with zeros to the larger one, and out is a view of a padded tensor. Any lengths, any
        strides. float32 products keep float32's precision (tf32x3). Sums are float32: N * max|v|
        has to stay below 3.4e38.
    is_causal: True: row i sees keys up to i (CausalVariant.UPPER_LEFT of torch.nn.attention.bias).
        CausalVariant.LOWER_RIGHT: up to i + N - M, so that the last row sees all keys. A row that
        sees no key is 0. NaN or inf in v may reach rows that do not see it, as in SDPA's math
        backend.
    window: (left, right), as flash-attn's window_size: row i sees only the keys from i + N - M -
        left to i + N - M + right; from i - left to i with is_causal=True. None or below 0: no limit
        on this side. If causal, right counts as 0. No other tile is loaded.
    visible: (first, last), int32, [B, M] or [M]: row i sees the keys from first[i] to last[i], none
        if first[i] > last[i]. Any intervals work. A block of 128 rows loads all tiles between its
        lowest first and its highest last: fast if both grow with i. See `packed`, `padded`.
    sinks: [H], floats: one more score in each row's softmax, without a value (gpt-oss). lse has it.
    scale: a float below 2e38; 1 / sqrt(D) if None. Scores, q k^T * scale, have to stay below 2e38,
        too (float16 on Hopper: below 1e8).
    softcap: from 1e-4 to 1e4: a score s becomes softcap * tanh(s / softcap), as in Gemma 2, with an
        error of 4e-7 * softcap. None or 0: no cap.
    enable_gqa: Hk may divide H: each H / Hk consecutive heads of q share a head of k and v.
    config: None takes the best that configs.py knows for this GPU. A Tuning of a forward kernel
        takes that kernel, or forward_kernel for what that kernel cannot take. A helion.Config is
        the report's: dense, compiled for each shape, no gradient.

    Returns out: [B, H, M, Dv], in q's dtype and layout. With return_lse (out, lse), lse: [B, H, M],
    float32, the natural logarithm of each row's sum of exp(q k^T * scale); -inf for a row that sees
    no key. out is the same, bit for bit.
    Differentiable once, with respect to q, k, v and sinks, through out and lse; the same bits at
    each run.
    The gradient takes up to 1 GB for a while; on Hopper, 16-bit, nothing for head dims from 33 to
    64, and with visible from 33 to 128.
    The Hopper kernels read copies of tensors that TMA cannot read: rows that are not contiguous or
    do not start at multiples of 16 bytes, expanded batches, and a q whose head dim is padded and
    whose heads interleave in memory.
    The first call of a kind compiles for seconds. Kinds differ in dtype, padded head dim, mask,
    softcap or none, alignment, config, return_lse, and the gradients that are needed. So do tensors
    of 2^31 elements. On Hopper these lengths are kinds of their own: N <= 128; up to D = 128,
    B * H * ceil(M / 128) <= 66 with N <= 1024, or <= 132 with N <= 512; bf16 up to D = 64, M < 1024
    or B * H * M < 2^17; dense float16 up to D = 128, N % 128 > 0; dense D > 128, N % 64 > 0;
    LOWER_RIGHT, (N - M) % 128 > 0. So are, on each GPU, few queries with more than 256 keys:
    H / Hk * M up to 16, 32 and 64. A CUDA graph cannot capture a first call.
    Under torch.compile, torch.export and dispatch modes (make_fx, FlopCounterMode, selective
    checkpointing), and for subclasses of Tensor, it is one operator, and config has to be None.
    Under autocast q, k and v are cast as SDPA's are.
    Raises TypeError or ValueError before anything is compiled; the message names the argument.
    RuntimeError under torch.func, torch.vmap, torch.jit.trace and forward-mode differentiation.
    """
    if torch._C._is_any_autocast_enabled() and isinstance(q, torch.Tensor) and (
        q.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(q.device.type)
    ):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if getattr(x, "dtype", None) in DTYPES else x for x in (q, k, v))
    _check(q, k, v, is_causal, window, visible, sinks, scale, softcap, enable_gqa)
    D, Dv = q.size(3), v.size(3)
    if D % 8 or Dv != D:  # zeros in q and k add nothing to the scores
        scale, padded_d = D**-0.5 if scale is None else scale, (max(D, Dv) + 7) // 8 * 8
        q, k, v = (torch.nn.functional.pad(x, (0, padded_d - x.size(3))) for x in (q, k, v))
    if visible is not None:
        visible = torch.stack([x.expand(q.size(0), -1) for x in visible], 1)
    mask = int(is_causal), *_limits(window)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if config is not None:
        _check_config(q, k, is_causal, window, visible, sinks, softcap, config)
        if isinstance(config, helion.Config) and (return_lse or needs_grad):
            raise ValueError("config is the report's: its kernel has no lse and no gradient")
        if _is_traced(q, k, v):
            raise ValueError("config must be None under torch.compile, under dispatch modes and "
                             "for subclasses of Tensor")  # fmt: skip
    if not torch.compiler.is_compiling():
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError("flash_attention does not run under torch.func and torch.vmap: fold "
                               "the mapped dimension into B, and take torch.autograd.grad outside")
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)
        ):
            raise RuntimeError("flash_attention has no forward-mode derivative")
    if needs_grad:
        out, lse = _Attention.apply(q, k, v, visible, mask, scale, softcap, config)
    else:
        with_lse = return_lse or sinks is not None
        out, lse = _dispatch(q, k, v, visible, mask, scale, softcap, config, with_lse)
    if sinks is not None:
        sinks = sinks.float().clamp(min=-1e38)[:, None]  # -inf - -inf would be NaN
        out = (out * (lse - sinks).sigmoid()[..., None]).to(out.dtype)
        lse = torch.logaddexp(lse, sinks)
        lse = lse.where(lse > -9e37, float("-inf"))
    out = out if out.size(3) == Dv else out[..., :Dv]
    return (out, lse) if return_lse else out


def packed(cu_seqlens_q, cu_seqlens_k, total_q, *, is_causal=False, window=None):
    """`visible` for sequences that are packed one after the other, as flash-attn's varlen functions
    have them: q [1, H, total_q, D], k and v [1, Hk, total_k, D].

        flash_attention(q, k, v, visible=packed(cu_seqlens, cu_seqlens, q.size(2), is_causal=True))

    cu_seqlens_q, cu_seqlens_k: [sequences + 1], int32: where each sequence begins, and the last one
    ends. Rows after that see nothing. is_causal: lower right in each sequence. window: (left,
    right), as flash_attention's. Nothing is copied to the host.
    """
    if not cu_seqlens_q.shape == cu_seqlens_k.shape or cu_seqlens_q.numel() < 2:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must have one length, of at least 2, got "
                         f"{tuple(cu_seqlens_q.shape)}, {tuple(cu_seqlens_k.shape)}")  # fmt: skip
    row = torch.arange(total_q, dtype=torch.int32, device=cu_seqlens_q.device)
    end_q, end_k = cu_seqlens_q[1:], cu_seqlens_k[1:]
    i = torch.searchsorted(end_q, row, right=True)
    inside, i = i < end_q.numel(), i.clamp(max=end_q.numel() - 1)
    return _interval(cu_seqlens_k[i].where(inside, 2**30), end_k[i], row + end_k[i] - end_q[i],
                     is_causal, window)  # fmt: skip


def padded(mask, M=None, *, is_causal=False, window=None):
    """`visible` for a padding mask [B, N] of 0 and 1, whose ones are contiguous: a hole counts as
    ones.

    M: the number of queries. None or N: query i stands at key i. With None a row of padding sees
    nothing: its out is 0, and it takes no time. Another M: the queries stand at the last M keys up
    to the last 1 in mask; later keys are the empty room of a static cache. is_causal: lower right.
    window: (left, right), as flash_attention's. Nothing is copied to the host.
    """
    if mask.dim() != 2 or mask.size(1) == 0 or M == 0:
        raise ValueError(f"mask must be [B, N] and M at least 1, got {tuple(mask.shape)} and {M}")
    row = key = torch.arange(mask.size(1), dtype=torch.int32, device=mask.device)
    first = key.where(mask != 0, 2**30).amin(1, keepdim=True)
    end = (key + 1).where(mask != 0, 0).amax(1, keepdim=True)
    if M not in (None, mask.size(1)):
        row = torch.arange(M, dtype=torch.int32, device=mask.device) + (end.amax() - M)
    first = first.expand(-1, row.numel())
    if M is None:
        first = first.where((row >= first) & (row < end), 2**30)
    return _interval(first, end, row, is_causal, window)


def _limits(window):
    """left and right; -1: no limit. At most 2^30: with a position added they are an int32."""
    return (-1 if x is None or x < 0 else min(x, 2**30) for x in window or (-1, -1))


def _interval(first, end, diagonal, is_causal, window):
    """(first, last) of rows that see the keys from first to end - 1, or fewer around diagonal."""
    left, right = _limits(window)
    right = 0 if is_causal else right
    last = (end - 1).expand_as(first)
    if left >= 0:
        first = first.maximum(diagonal - left)
    if right >= 0:
        last = last.minimum(diagonal + right)
    return first.contiguous(), last.contiguous()

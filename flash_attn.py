"""Flash attention, forward and backward, in Helion: softmax(q k^T * scale) v without the score matrix.

    from flash_attn import flash_attention
    out = flash_attention(q, k, v)          # [B, H, S, D] in, [B, H, S, D] out

Copy this file and configs.py into your project: together they are the whole kernel.

The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691): one tile of queries walks over the keys
and keeps the running maximum m_i, the running sum l_i and the unnormalised output acc of its rows.
The exponentials are in base 2, which is the one that the hardware has.
"""
import contextlib
import functools
import importlib.util
import math
import os
import sys
import threading

import torch
from torch.autograd import forward_ad
from torch.nn.attention.bias import CausalVariant
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

# configs.py beside this file, whatever else is called configs where the two are copied to. It comes
# before helion, which it makes importable on older torch.
_spec = importlib.util.spec_from_file_location(
    f"{__name__}_configs", os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs.py")
)
configs = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(configs)

import helion
import helion.language as hl
import triton
from helion.language import loops
from triton.runtime import _allocation

LOG2E = 1.4426950408889634  # log2(e): exp(x) = 2^(x log2(e))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REDO_ROWS = 512  # how many rows of hopper_kernel one program of general_kernel looks after


# ---- The kernels ---------------------------------------------------------------------------------
# torch.exp2 and torch.log2 are library calls to Triton, which its warp specialisation does not take.


def scalar(expression, *args):
    """An int32 by a line of Triton: run-time integers of Helion's own grow into long expressions."""
    int32 = hl.zeros([], dtype=torch.int32)
    return hl.inline_triton(f"tl.cast({expression}, tl.int32)", args=args, output_like=int32)


def quotient(x, y):
    """x // y for 0 <= x < 2^20, by float32: an integer division takes some 150 cycles."""
    return scalar("(({0} + 0.5) * (1.0 / {1})).to(tl.int32)", x, y)


def exp2(x):
    return hl.inline_triton("tl.exp2({0})", args=(x,), output_like=x)


def log2(x):
    return hl.inline_triton("tl.log2({0})", args=(x,), output_like=x)


def round_to_bf16(p):
    """p: float32, rounded to the nearest bfloat16 and still float32. Two elements an instruction:
    `p.to(torch.bfloat16)` would become one conversion each where its result is widened again."""
    return hl.inline_triton(
        "tl.inline_asm_elementwise('{{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16;"
        " and.b32 $1, t, 0xffff0000;}}', '=r,=r,r,r', [{0}], dtype=tl.float32, is_pure=True, pack=2)",
        args=(p,),
        output_like=p,
    )


def fresh(x, turn):
    """x, an int32. In turn 0 of a program: shared memory from where x is used on, by the warps that load.
    Triton 3.6 and 3.7 initialise mbarriers that nobody uses in the first 16 bytes of shared memory and give
    the same bytes to the first tile that is loaded, without the mbarrier.inval that PTX asks for in between:
    once in thousands of launches the barriers come back over the tile, as NaN."""
    asm = (
        "{{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; or.b32 t, t, $2; setp.eq.u32 p, t, 0;"
        " @p mbarrier.inval.shared::cta.b64 [global_smem]; @p mbarrier.inval.shared::cta.b64 [global_smem+8];"
        " @p fence.proxy.async.shared::cta; mov.b32 $0, $1;}}"
    )
    return hl.inline_triton(
        f"tl.inline_asm_elementwise('{asm}', '=r,r,r', [{{0}}, {{1}}], dtype=tl.int32, is_pure=True, pack=1)",
        args=(x, turn),
        output_like=hl.zeros([], dtype=torch.int32),
    )


@helion.kernel(static_shapes=True, dot_precision="tf32x3")
def attention_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, qk_scale: hl.constexpr
) -> torch.Tensor:
    """The report's kernel: the canonical loop on 3-D tiles, dense, compiled for each shape as there.

    q, out: [B * H, M, D]; k, v: [B * H, N, D]; qk_scale: scale * log2(e).
    """
    BH, M, D = q.size()
    N = k.size(1)
    D = hl.specialize(D)
    for tile_b, tile_m in hl.tile([BH, M]):
        m_i = hl.full([tile_b, tile_m], float("-inf"), dtype=torch.float32)
        l_i = hl.zeros([tile_b, tile_m], dtype=torch.float32)
        acc = hl.zeros([tile_b, tile_m, D], dtype=torch.float32)
        q_tile = q[tile_b, tile_m, :]
        for tile_n in hl.tile(N):
            k_tile = k[tile_b, tile_n, :]
            qk = torch.bmm(q_tile, k_tile.transpose(1, 2), torch.float32) * qk_scale
            m_ij = torch.maximum(m_i, torch.amax(qk, -1))
            p = torch.exp2(qk - m_ij[:, :, None])
            alpha = torch.exp2(m_i - m_ij)
            l_i = l_i * alpha + torch.sum(p, -1)
            m_i = m_ij
            acc = acc * alpha[:, :, None]
            v_tile = v[tile_b, tile_n, :]
            acc = torch.baddbmm(acc, p.to(v_tile.dtype), v_tile)
        acc = acc * (1 / l_i)[:, :, None]  # one division a row instead of one an element
        out[tile_b, tile_m, :] = acc.to(out.dtype)
    return out


def load_matrix(x, rows, columns, stride, row, column, block, block_d):
    """[block, block_d] from row and column on, by TMA, of a matrix [rows, columns] that begins where x does. The
    descriptor is made in the kernel: only such a one is halved with its tile."""
    return hl.inline_triton(
        "tl.make_tensor_descriptor({0}, [{1}, {2}], [{3}, 1], [{4}, {5}]).load([{6}, {7}])",
        args=(x, rows, columns, stride, block, block_d, row, column),
        output_like=hl.zeros([block, block_d], dtype=x.dtype),
    )


def _hopper_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    qk_scale: float, width: int, diagonal: int, programs: int, paired: int, block_m: hl.constexpr,
    block_n: hl.constexpr, masked: hl.constexpr, online: hl.constexpr, exact_lse: hl.constexpr,
    E: hl.constexpr, D: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """Flash attention in the order that keeps Hopper's tensor cores busy, for tensors that TMA reads.

    The order: an iteration issues the product of the *previous* tile's p and v behind q k^T of this
    tile, and the exponentials of this tile run while the tensor cores work on it (FlashAttention-3,
    section 3.2, arXiv:2407.08608). So the first p is 0, and the last p v comes after the loop.
    The warps (section 3.1): `range_warp_specializes` in the Config makes Triton give one warpgroup
    the loads, and each of two others half of the rows. Neither waits for the other, so q k^T of one
    runs under the exponentials of the other.
    The tiles: program p takes every programs-th of them. paired, where rows see different numbers of
    keys: it takes tile i from a head's end, then tile i from its start, which cost the same together.

    online: with the running maximum, as FlashAttention does. float16 needs it, whose exponents are few.
    Otherwise, bfloat16, the maximum is left out, and lse is that of the rounded p, or, where exact_lse asks for
    a second sum, of p itself. Softmax is the same whatever number is subtracted from a row's scores; here it is
    -offset, so that the loop has no maximum to find and nothing to rescale. A row whose numbers leave their range
    gets lse NaN, and general_kernel computes it again.
    That test is sufficient: with the maximum subtracted, the largest p of a row is 1, and what is
    below 2^-126 is lost. Here l_i >= visible keys, so the largest p is at least 1, too, and what is
    lost is no larger beside it, for any v. A p, sum or product beyond 2^128 leaves an inf or NaN in
    l_i or in acc. In between all is relative: p, exp2's argument and the sums round as they do there.

    q, out: [B, H, M, width]; k, v: [B, Hk, N, width]; lse: [B, H, M], float32, natural logarithm.
    E, D: a head is read as its first E columns, if any, and the D behind them, powers of two, which TMA fills up
    with zeros: 192 = 64 + 128.
    qk_scale: scale * log2(e) > 0. diagonal: row i sees keys up to i + diagonal.
    masked: more than the last tile of keys has some that a row must not see, or, where D = 256, any, or, where
    online, any beyond the diagonal. Otherwise they are masked after the loop, where the p of the last tile is
    multiplied.
    """
    ln2, lowest = 0.6931471805599453, -3e38  # lowest is finite: -inf - -inf would be NaN
    offset = 40.0
    B, H, M, _ = q.size()
    Hk, N = k.size(1), k.size(2)
    # q as one matrix with q's row stride: where b and h begin. TMA takes no more where halves of a tile
    # go to two warpgroups. Divided here, since Triton does not move a division out of a loop.
    stride_b, stride_h, stride_m = q.stride(0), q.stride(1), q.stride(2)
    row_b, row_h = stride_b // stride_m, stride_h // stride_m
    column_b, column_h = stride_b % stride_m, stride_h % stride_m
    q_rows = (B - 1) * row_b + (H - 1) * row_h + M
    q_columns = (B - 1) * column_b + (H - 1) * column_h + width
    blocks = (M + block_m - 1) // block_m
    places = (blocks + paired) // (1 + paired)
    items = B * H * places
    rounds = (items + programs - 1) // programs * (1 + paired)
    group = H // Hk
    hl.pdl_wait()
    hl.pdl_launch_dependents()  # general_kernel, which waits
    for w in hl.grid(rounds * programs):
        turn = quotient(w, programs)
        second = scalar("{0} & {1}", turn, paired)
        item = scalar("({0} >> {1}) * {2} + {3} - {0} * {2}", turn, paired, programs, w)
        bh = quotient(item, places)
        place = scalar("{0} - {1} * {2}", item, bh, places)
        live = scalar("(({0} < {1}) & ({2} * (2 * {3} + 1) != {4})).to(tl.int32)",
                      item, items, second, place, blocks)  # fmt: skip
        tile = scalar("{0} + (1 - {1}) * ({2} - 1 - 2 * {0})", place, second, blocks)
        b = quotient(bh, H)
        h = scalar("{0} - {1} * {2}", bh, b, H)
        hk = quotient(h, group)
        # Triton shifts the row of q's descriptor for the second half of a tile, and with it all that
        # uses this very value: so the rows of out are counted from the tile's end.
        rows = (tile + 1) * block_m + (hl.arange(block_m) - block_m)
        last = torch.clamp(rows + diagonal, max=N - 1)  # the last key that a row sees
        end = scalar("tl.cdiv(tl.minimum({0}, tl.maximum(0, ({1} + 1) * {2} + {3})), {4}) * {4} * {5}",
                     N, tile, block_m, diagonal, block_n, live)  # fmt: skip
        m_i = hl.full([block_m], lowest, dtype=torch.float32)
        l_i = hl.zeros([block_m], dtype=torch.float32)
        l_exact = hl.zeros([block_m], dtype=torch.float32)
        l_tile, exact_tile = hl.zeros([block_m], dtype=torch.float32), hl.zeros([block_m], dtype=torch.float32)
        acc = hl.zeros([block_m, D], dtype=torch.float32)
        if E:
            acc_e = hl.zeros([block_m, E], dtype=torch.float32)
        p = hl.zeros([block_m, block_n], dtype=torch.float32)
        # Rows beyond M are not stored.
        row = scalar("{0} * {1} + {2} * {3} + {4} * {5}", b, row_b, h, row_h, tile, block_m)
        column = scalar("{0} * {1} + {2} * {3}", b, column_b, h, column_h)
        column = fresh(column, turn)
        q_tile = load_matrix(q, q_rows, q_columns, stride_m, row, column + E, block_m, D)
        if E:  # by a row of its own: one value that two descriptors use would be shifted twice
            row = scalar("{0} * {1} + {2} * {3} + ({4} + {6}) * {5} - {6} * {5}", b, row_b, h, row_h, tile, block_m, w)
            q_tile_e = load_matrix(q, q_rows, q_columns, stride_m, row, column, block_m, E)
        # D = 256: shared memory has no place for a last tile of v behind the loop. An iteration more, of keys
        # that no row sees, has that p v.
        stop = end if D < 256 else scalar("{0} + tl.minimum({0}, {1})", end, block_n)
        for n in hl.grid(0, stop, block_n):
            # The previous tile; for the first one, which has none, itself, times the p of 0.
            back = scalar("tl.maximum({0} - {1}, 0)", n, block_n)
            p_tile = p.to(v.dtype)  # in front of q k^T, which then has its registers
            v_tile = v[b, hk, back + hl.arange(block_n), E : E + D]
            if E:
                v_tile_e = v[b, hk, back + hl.arange(block_n), :E]
            # The last tile ends where the keys end: some of them are there twice, but nothing else is.
            at = n if masked else scalar("tl.minimum({0}, {1} - {2})", n, N, block_n)
            qk = hl.dot(q_tile, k[b, hk, at + hl.arange(block_n), E : E + D].T, out_dtype=torch.float32)
            if E:
                qk = hl.dot(q_tile_e, k[b, hk, at + hl.arange(block_n), :E].T, acc=qk)
            visible = hl.arange(block_n)[None, :] <= (last - n)[:, None]
            if online:
                if masked:
                    qk = torch.where(visible, qk, float("-inf"))
                m_ij = torch.maximum(m_i, torch.amax(qk, -1) * qk_scale)
                alpha = exp2(m_i - m_ij)
                m_i = m_ij
                x = qk * qk_scale - m_ij[:, None]
            else:
                x = qk * qk_scale + offset
                if masked:
                    x = torch.where(visible, x, float("-inf"))
            # The mask before this product and the exponentials behind it: else they do not overlap.
            acc = hl.dot(p_tile, v_tile, acc=acc)
            if E:
                acc_e = hl.dot(p_tile, v_tile_e, acc=acc_e)
            p = exp2(x)
            if online:
                l_tile = torch.sum(p, -1)
                l_i = l_i * alpha + l_tile
                acc = acc * alpha[:, None]
                if E:
                    acc_e = acc_e * alpha[:, None]
            else:
                # l_i has to sum what the tensor cores multiply: else a row of one key would not get
                # exactly its v. To nearest: a cut would move all that cancels to one side.
                if exact_lse:
                    exact_tile = torch.sum(p, -1)
                    l_exact = l_exact + exact_tile
                rounded = round_to_bf16(p)
                if not exact_lse or D == 256:  # otherwise the exact p of the last tile is for behind the loop
                    p = rounded
                l_tile = torch.sum(rounded, -1)
                l_i = l_i + l_tile
        at = end - block_n
        if not masked and D == 256:  # the iteration more had the last tile again
            l_i, l_exact = l_i - l_tile, l_exact - exact_tile
        elif not masked:
            at = scalar("tl.minimum({0} - {1}, {2} - {1})", end, block_n, N)
            keys = at + hl.arange(block_n)
            visible = (keys >= end - block_n)[None, :] & (keys[None, :] <= last[:, None])
            if online:
                l_i = l_i - torch.sum(torch.where(visible, 0.0, p), -1)  # at most half of it
            else:
                rounded = round_to_bf16(p) if exact_lse else p
                others = torch.where(end > block_n, l_i - torch.sum(rounded, -1), 0.0)
                l_all, l_i = l_i, others + torch.sum(torch.where(visible, rounded, 0.0), -1)
                if exact_lse:
                    others = torch.where(end > block_n, l_exact - torch.sum(p, -1), 0.0)
                    l_exact = others + torch.sum(torch.where(visible, p, 0.0), -1)
                # What was masked here was in l_all, whose rounding is in `others`, unless there are none.
                exact = (end <= block_n) | (l_i * 2**12 >= l_all)
            p = torch.where(visible, p, 0.0)
        if D < 256:
            p_tile = p.to(v.dtype)
            acc = hl.dot(p_tile, v[b, hk, at + hl.arange(block_n), E : E + D], acc=acc)
            if E:
                acc_e = hl.dot(p_tile, v[b, hk, at + hl.arange(block_n), :E], acc=acc_e)
        inverse = torch.where(last < 0, 0.0, 1 / l_i)  # rows that see nothing are 0
        acc = acc * inverse[:, None]
        if E:
            acc_e = acc_e * inverse[:, None]
        if online:
            lse_tile = (m_i + log2(l_i)) * ln2
        else:
            # NaN if one is NaN. Of what depends on q k^T: of acc as the loop leaves it Triton takes no maximum.
            top = torch.amax(torch.abs(acc), -1)
            if E:
                top = torch.maximum(top, torch.amax(torch.abs(acc_e), -1))
            fits = (l_i >= last + 1) & (l_i < float("inf")) & (top < float("inf"))
            if not masked and D < 256:
                fits = fits & exact
            lse_tile = torch.where(fits, (log2(l_exact if exact_lse else l_i) - offset) * ln2, float("nan"))
        lse_tile = torch.where(last < 0, float("-inf"), lse_tile)
        stored = (rows < M) & (live > 0)
        hl.store(lse, [b, h, rows], lse_tile, extra_mask=stored)
        columns = E + hl.arange(D)[None, :]
        inside = columns < scalar("{0} // 8 * 8", width)  # so Triton sees whole vectors
        b, h = b.to(torch.int64), h.to(torch.int64)
        hl.store(out, [b, h, rows[:, None], columns], acc.to(out.dtype), extra_mask=stored[:, None] & inside)
        if E:
            hl.store(out, [b, h, rows[:, None], hl.arange(E)[None, :]], acc_e.to(out.dtype), extra_mask=stored[:, None])
    return out


def _general_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    qk_scale: float, width: int, diagonal: int, block_m: hl.constexpr, block_n: hl.constexpr,
    span: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """The canonical loop on 2-D tiles, for any GPU, any strides and any case. Arguments as above.

    span: how many rows a program looks after. If they are more than block_m, it computes them only
    where one of them has lse NaN.
    """
    ln2, lowest = 0.6931471805599453, -3e38
    B, H, M, D = q.size()
    Hk, N = k.size(1), k.size(2)
    D = hl.specialize(D)
    hl.pdl_wait()  # from sm_90 on it is launched while the kernel before it ends
    for tile_b, tile_s in hl.tile([B * H, M], block_size=[1, span]):
        b, h = tile_b.begin // H, tile_b.begin % H
        hk = h // (H // Hk)
        if span > block_m:
            marks = lse[b, h, tile_s]
            missing = torch.amax(torch.where(marks == marks, 0, 1))
            stop = tile_s.begin + missing * (tile_s.end - tile_s.begin)
        else:
            stop = tile_s.end
        columns = hl.arange(D)[None, :]
        inside = columns < scalar("{0} // 8 * 8", width)
        for tile_m in hl.tile(tile_s.begin, stop, block_size=block_m):
            last = torch.clamp(tile_m.index + diagonal, max=N - 1)  # the last key that a row sees
            end = scalar("tl.minimum({0}, tl.maximum(0, {1} + {2}))", N, tile_m.begin + block_m, diagonal)
            m_i = hl.full([tile_m], lowest, dtype=torch.float32)
            l_i = hl.zeros([tile_m], dtype=torch.float32)
            acc = hl.zeros([tile_m, D], dtype=torch.float32)
            q_tile = hl.load(q, [b, h, tile_m.index[:, None], columns], extra_mask=inside)
            for n in hl.grid(0, end, block_n):
                keys = n + hl.arange(block_n)
                k_tile = hl.load(k, [b, hk, keys[:, None], columns], extra_mask=(keys < N)[:, None] & inside)
                qk = hl.dot(q_tile, k_tile.T, out_dtype=torch.float32)
                qk = torch.where(keys[None, :] <= last[:, None], qk * qk_scale, float("-inf"))
                # The scale is applied here, in float32: on q in bf16 it would round every logit's
                # input once more than SDPA does.
                m_ij = torch.maximum(m_i, torch.amax(qk, -1))
                p = exp2(qk - m_ij[:, None])
                alpha = exp2(m_i - m_ij)
                l_i = l_i * alpha + torch.sum(p, -1)
                m_i = m_ij
                v_tile = hl.load(v, [b, hk, keys[:, None], columns], extra_mask=(keys < N)[:, None] & inside)
                acc = hl.dot(p.to(v.dtype), v_tile, acc=acc * alpha[:, None])
            inverse = torch.where(last < 0, 0.0, 1 / l_i)  # rows that see nothing are 0
            lse[b, h, tile_m] = (m_i + log2(l_i)) * ln2
            out_tile = (acc * inverse[:, None]).to(out.dtype)
            hl.store(out, [b, h, tile_m.index[:, None], columns], out_tile, extra_mask=inside)
    return out


# ---- The gradient --------------------------------------------------------------------------------
# p = exp(scale q k^T - lse), dv = p^T do, ds = p (do v^T - delta), dk = scale ds^T q, dq = scale ds k
# (FlashAttention-2, algorithm 2). Five products: dkdv_kernel keeps ds, and dq_kernel multiplies it. Seven for small D
# on Hopper, where s and dp are sooner computed twice than ds is written and read. Each gradient is summed by one
# program in one order: the same bits each run.


def _delta_kernel(
    out: torch.Tensor, do: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor, aug: torch.Tensor, delta: torch.Tensor,
    inverse: float, width: int, block_m: hl.constexpr, with_dlse: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """aug: [B, H, M, 16], bfloat16: what a product with ones adds to a query's scores, -lse / scale, and to its
    row of do v^T, -delta, the sum of out * do over the row less the gradient of lse. Each as three bfloat16,
    which have float32's 24 bits. delta: the same as float32, [B, H, M]. inverse: 1 / scale."""
    B, H, M, D = out.size()
    D = hl.specialize(D)
    for tile_b, tile_m in hl.tile([B * H, M], block_size=[1, block_m]):
        b, h = tile_b.begin // H, tile_b.begin % H
        columns = hl.arange(D)[None, :]
        inside = columns < scalar("{0} // 8 * 8", width)
        o_tile = hl.load(out, [b, h, tile_m.index[:, None], columns], extra_mask=inside).to(torch.float32)
        do_tile = hl.load(do, [b, h, tile_m.index[:, None], columns], extra_mask=inside).to(torch.float32)
        delta_tile = torch.sum(o_tile * do_tile, -1)
        if with_dlse:
            delta_tile = delta_tile - dlse[b, h, tile_m]
        delta[b, h, tile_m] = delta_tile
        lse_tile = lse[b, h, tile_m]
        lse_tile = torch.where(lse_tile == float("-inf"), 0.0, lse_tile)  # sees nothing: all is masked
        c = hl.arange(16)[None, :]
        x = -torch.where(c < 3, (lse_tile * inverse)[:, None], delta_tile[:, None])
        high = x.to(torch.bfloat16).to(torch.float32)
        middle = (x - high).to(torch.bfloat16).to(torch.float32)
        x = torch.where(c % 3 == 0, high, torch.where(c % 3 == 1, middle, x - high - middle))
        hl.store(aug, [b, h, tile_m.index[:, None], c], torch.where(c < 6, x, 0.0).to(torch.bfloat16))
    return aug


def load(x, b, h, rows, columns, width, tma):
    """x[b, h, rows, columns], and 0 beyond x."""
    if tma:
        return hl.load(x, [b, h, rows, slice(None)])
    b, h = b.to(rows.dtype), h.to(rows.dtype)  # `scalar` is 32 bits, hl.arange what the tensors need
    rows, columns = rows.unsqueeze(1), columns.unsqueeze(0)
    inside = columns < scalar("{0} // 8 * 8", width)
    return hl.load(x, [b, h, rows, columns], extra_mask=(rows < x.size(2)) & inside)


def store(x, b, h, rows, columns, width, length, value):
    """x[b, h, rows, columns] = value, for rows below length."""
    rows, columns = rows.unsqueeze(1), columns.unsqueeze(0)
    inside = (rows < length) & (columns < scalar("{0} // 8 * 8", width))
    hl.store(x, [b.to(torch.int64), h.to(torch.int64), rows, columns], value.to(x.dtype), extra_mask=inside)


def load_kept(x, strides, b, h, rows, columns, width, tma, tile, other):
    """The same for a tile that a program keeps. For TMA by a descriptor made in the kernel: only such a one
    is halved for two warpgroups, by a shift of its row, and with it of all else that uses this very value.
    So the row is a value of its own, by another `other` for each descriptor."""
    if not tma:
        return load(x, b, h, rows, columns, width, False)
    block, block_d = rows.size(0), columns.size(0)
    return hl.inline_triton(
        "tl.make_tensor_descriptor({0} + tl.cast({1}, tl.int64) * {2} + tl.cast({3}, tl.int64) * {4},"
        " [{5}, {6}], [{7}, 1], [{8}, {9}]).load([({10} + {11}) * {8} - {11} * {8}, 0])",
        args=(x, fresh(b, 0), strides[0], h, strides[1], x.size(2), width, strides[2], block, block_d, tile, other),
        output_like=hl.zeros([block, block_d], dtype=x.dtype),
    )


def load_rows(x, strides, b, h, tile, block):
    """x[b, h, rows] of a tile, float32, and beyond x its last row. By an instruction: a load of Triton's would go
    to the warps that load, which cannot pass on what has one dimension."""
    rows = torch.clamp(tile * block + hl.arange(block), max=x.size(2) - 1)
    return hl.inline_triton(
        "tl.inline_asm_elementwise('ld.global.f32 $0, [$1];', '=f,l', [({0} + tl.cast({1}, tl.int64) * {2}"
        " + tl.cast({3}, tl.int64) * {4} + {5}).to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1)",
        args=(x, b, strides[0], h, strides[1], rows),
        output_like=hl.zeros([block], dtype=torch.float32),
    )


def order(w, heads, blocks, together):
    """Head and tile of program w: the first tile of each of `together` heads, their second and so on, then more heads."""
    before = scalar("{0} // ({1} * {2}) * {2}", w, blocks, together)
    some = scalar("tl.minimum({0}, {1} - {2})", together, heads, before)
    rest = scalar("{0} - {1} * {2}", w, before, blocks)
    tile = scalar("{0} // {1}", rest, some)
    return scalar("{0} + {1} - {2} * {3}", before, rest, tile, some), tile


def _dkdv_kernel(
    q: torch.Tensor, do: torch.Tensor, aug: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, ds: torch.Tensor, scale: float, scale2: float, width: int,
    diagonal: int, begin: int, heads: int, together: int, m_begin: int, m_end: int, block_m: hl.constexpr,
    block_n: hl.constexpr, masked: hl.constexpr, keeps: hl.constexpr, of_k: hl.constexpr, of_v: hl.constexpr,
    summed: hl.constexpr, tma: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """dk and dv of a tile of keys, which walks over the queries of all heads that share it. Scores are
    transposed, s^T = k q^T, so that p^T and ds^T are operands as they are.

    ds: [heads * H / Hk, N, M] for `heads` of the B * Hk heads of keys, from `begin` on, and for the queries
    from 128 m_begin to 128 m_end, N and M as multiples of 128. scale2: scale * log2(e). together: see `order`.
    keeps: ds is written. of_k, of_v: dk and dv are computed; dk alone from what the launch before has kept, where two
    sums would leave no registers for large tiles. summed: they are float32, to be summed over the queries. tma:
    everything is read by TMA, as hopper_kernel does.
    """
    B, H, M, _ = q.size()
    Hk, N = k.size(1), k.size(2)
    D = hl.specialize(k.size(3))
    k_strides, v_strides = k.stride(), v.stride()
    group = H // Hk
    blocks = (N + block_n - 1) // block_n
    for w in hl.grid(heads * blocks):
        local, tile = order(w, heads, blocks, together)  # if masked, most queries see the first keys
        b = scalar("({0} + {1}) // {2}", begin, local, Hk)
        hk = scalar("{0} + {1} - {2} * {3}", begin, local, b, Hk)
        keys, columns = (tile + 1) * block_n + (hl.arange(block_n) - block_n), hl.arange(D)
        if of_v or keeps:
            k_tile = load_kept(k, k_strides, b, hk, keys, columns, width, tma, tile, w)
            v_tile = load_kept(v, v_strides, b, hk, keys, columns, width, tma, tile, 2 * w)
            c = hl.arange(16)[None, :] + hl.zeros([block_n, 1], dtype=torch.int32)
            of_lse = torch.where(c < 3, 1.0, 0.0).to(torch.bfloat16)
            of_delta = torch.where((c >= 3) & (c < 6), 1.0, 0.0).to(torch.bfloat16)
            add = "tl.dot({0}, {1}.T, acc={2})"
        dk_acc = hl.zeros([block_n, D], dtype=torch.float32)
        dv_acc = hl.zeros([block_n, D], dtype=torch.float32)
        # From the 128 queries on of which one sees a key of this tile: dq_kernel reads as many at once.
        first = scalar("tl.maximum({0}, ({1} * {2} - {3}) // 128)", m_begin, tile, block_n, diagonal)
        count = scalar("tl.maximum({0} - {1}, 0) * (128 // {2})", m_end, first, block_m)
        start = scalar("{0} * {1} - {2} - {3} * 128", tile, block_n, diagonal, first)
        for i in hl.grid(0, scalar("{0} * {1}", count, group), 1):
            g = quotient(i, count)
            h = scalar("{0} * {1} + {2}", hk, group, g)
            step = scalar("({0} - {1} * {2}) * {3}", i, g, count, block_m)
            m = scalar("{0} * 128 + {1}", first, step)
            q_tile = load(q, b, h, m + hl.arange(block_m), columns, width, tma)
            at = scalar("{0} * {1} + {2}", local, group, g).to(keys.dtype)
            kept_m = scalar("({0} - {1}) * 128 + {2}", first, m_begin, step)
            kept = [at, keys[:, None], (kept_m + hl.arange(block_m))[None, :]]
            if of_v or keeps:
                do_tile = load(do, b, h, m + hl.arange(block_m), columns, width, tma)
                aug_tile = load(aug, b, h, m + hl.arange(block_m), hl.arange(16), 16, tma)
                s = hl.dot(k_tile, q_tile.T, out_dtype=torch.float32)
                s = hl.inline_triton(add, args=(of_lse, aug_tile, s), output_like=s)
                dp = hl.dot(v_tile, do_tile.T, out_dtype=torch.float32)
                dp = hl.inline_triton(add, args=(of_delta, aug_tile, dp), output_like=dp)
                p = exp2(s * scale2)  # rows beyond M: 1, and then times 0
                if masked:
                    # As a sum: in a comparison of rows with columns each column would be computed again.
                    seen = (step - start - hl.arange(block_n))[:, None] + hl.arange(block_m)[None, :] >= 0
                    p = torch.where(seen, p, 0.0)
                if of_v:
                    dv_acc = hl.dot(p.to(v.dtype), do_tile, acc=dv_acc)
                ds_tile = (p * dp).to(k.dtype)
            else:
                ds_tile = hl.load(ds, kept)
            if of_k:
                dk_acc = hl.dot(ds_tile, q_tile, acc=dk_acc)
            if keeps:
                hl.store(ds, kept, ds_tile)
        if of_k:
            store(dk, b, hk, keys, columns, width, N, dk_acc * scale)
        if of_v:
            store(dv, b, hk, keys, columns, width, N, dv_acc)
    return dk


def _dq_kernel(
    dq: torch.Tensor, k: torch.Tensor, ds: torch.Tensor, scale: float, width: int, diagonal: int,
    begin: int, heads: int, together: int, m_begin: int, m_end: int, block_m: hl.constexpr, block_n: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """dq of a tile of queries, from what dkdv_kernel kept. Arguments as there; its heads are heads of q."""
    B, H, M, D = dq.size()
    Hk, N = k.size(1), k.size(2)
    D = hl.specialize(D)
    group = H // Hk
    blocks = ((m_end - m_begin) * 128 + block_m - 1) // block_m
    for w in hl.grid(heads * blocks):
        # First the heads whose ds was written last, and may still be in L2, and the queries that see most keys.
        turn, back = order(w, heads, blocks, together)
        local = scalar("{0} - 1 - {1}", heads, turn)
        b = scalar("({0} + {1}) // {2}", begin, local, H)
        h = scalar("{0} + {1} - {2} * {3}", begin, local, b, H)
        hk = scalar("{0} // {1}", h, group)
        at = scalar("({0} - 1 - {1}) * {2}", blocks, back, block_m)
        rows, columns = at + hl.arange(block_m), hl.arange(D)
        end = scalar("tl.minimum({0}, tl.maximum(0, {1} * 128 + {2} + {3} + {4}))", N, m_begin, at, block_m, diagonal)
        acc = hl.zeros([block_m, D], dtype=torch.float32)
        for n in hl.grid(0, end, block_n):
            keys = n + hl.arange(block_n)
            ds_tile = hl.load(ds, [local.to(keys.dtype), keys[:, None], rows[None, :]], extra_mask=(keys < end)[:, None])
            k_tile = load(k, b, hk, keys, columns, width, False)
            acc = hl.dot(ds_tile.T, k_tile, acc=acc)
        rows = m_begin * 128 + rows
        store(dq, b, h, rows, columns, width, M, acc * scale)
    return dq


def _hopper_dq_kernel(
    dq: torch.Tensor, q: torch.Tensor, do: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, scale: float, scale2: float, width: int, diagonal: int, together: int, block_m: hl.constexpr,
    block_n: hl.constexpr, masked: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """dq where ds is not kept. In hopper_kernel's order: the product of the previous tile's ds and k is issued behind
    s and dp of this one, and the last tile is masked behind the loop. lse and delta: as contiguous as each other.
    masked: other tiles have to be masked, too, because the diagonal is no multiple of block_n."""
    B, H, M, D = dq.size()
    Hk, N = k.size(1), k.size(2)
    D = hl.specialize(D)
    q_strides, do_strides, lse_strides = q.stride(), do.stride(), lse.stride()
    group = H // Hk
    blocks = (M + block_m - 1) // block_m
    for w in hl.grid(B * H * blocks):
        bh, back = order(w, B * H, blocks, together)
        b = scalar("{0} // {1}", bh, H)
        h = scalar("{0} - {1} * {2}", bh, b, H)
        hk = scalar("{0} // {1}", h, group)
        tile = scalar("{0} - 1 - {1}", blocks, back)  # first those that see most keys
        rows, columns = (tile + 1) * block_m + (hl.arange(block_m) - block_m), hl.arange(D)
        last = torch.clamp(rows + diagonal, max=N - 1)
        end = scalar("tl.cdiv(tl.minimum({0}, tl.maximum(0, ({1} + 1) * {2} + {3})), {4}) * {4}",
                     N, tile, block_m, diagonal, block_n)  # fmt: skip
        q_tile = load_kept(q, q_strides, b, h, rows, columns, width, True, tile, w)
        do_tile = load_kept(do, do_strides, b, h, rows, columns, width, True, tile, 2 * w)
        lse_tile = load_rows(lse, lse_strides, b, h, tile, block_m) * LOG2E
        delta_tile = load_rows(delta, lse_strides, b, h, tile, block_m)
        acc = hl.zeros([block_m, D], dtype=torch.float32)
        ds = hl.zeros([block_m, block_n], dtype=torch.float32)
        for n in hl.grid(0, end, block_n):
            before = scalar("tl.maximum({0} - {1}, 0)", n, block_n)
            ds_tile = ds.to(k.dtype)
            k_before = k[b, hk, before + hl.arange(block_n), :]
            s = hl.dot(q_tile, k[b, hk, n + hl.arange(block_n), :].T, out_dtype=torch.float32)
            dp = hl.dot(do_tile, v[b, hk, n + hl.arange(block_n), :].T, out_dtype=torch.float32)
            x = s * scale2 - lse_tile[:, None]
            if masked:
                x = torch.where(hl.arange(block_n)[None, :] <= (last - n)[:, None], x, float("-inf"))
            acc = hl.dot(ds_tile, k_before, acc=acc)
            ds = exp2(x) * (dp - delta_tile[:, None])
        at = end - block_n
        ds = torch.where((at + hl.arange(block_n))[None, :] <= last[:, None], ds, 0.0)
        acc = hl.dot(ds.to(k.dtype), k[b, hk, at + hl.arange(block_n), :], acc=acc)
        store(dq, b, h, rows, columns, width, M, acc * scale)
    return dq


# ---- The launch ----------------------------------------------------------------------------------
# helion 1.5.1 offers warp specialisation on sm_100 and up only, though Triton does it for sm_90, too:
# here it is offered where a Config asks for it, and to others as before.
_binding = threading.local()
_offered = loops._supports_warp_specialize
loops._supports_warp_specialize = lambda: getattr(_binding, "hopper", False) or _offered()

# "tf32x3": float32 inputs are multiplied as three tf32 products each, which keeps float32's precision
# on tensor cores. It does not touch bf16 and fp16. index_dtype: what tensors of 2^31 elements need.
_kernel = functools.partial(helion.kernel, static_shapes=False, dot_precision="tf32x3")
hopper_kernel, hopper_dq_kernel = _kernel(_hopper_kernel), _kernel(_hopper_dq_kernel)
general_kernel, delta_kernel, dkdv_kernel, dq_kernel = map(
    _kernel, (_general_kernel, _delta_kernel, _dkdv_kernel, _dq_kernel)
)
_wide = {x: _kernel(x.fn, index_dtype=torch.int64) for x in (general_kernel, delta_kernel, dkdv_kernel, dq_kernel)}
# What they take: tensors like q, k, lse, aug, ds or, in float32 where it is summed, dk; and numbers for the
# first call.
_TAKES = {
    _general_kernel: ("qkkql", (0.5, 5, 3)),
    _hopper_kernel: ("qkkql", (0.5, 5, 3, 7, 9)),
    _delta_kernel: ("qqllal", (0.5, 5)),
    _dkdv_kernel: ("qqakkdds", (0.5, 0.5, 5, 3, 7, 9, 11, 13, 15)),
    _dq_kernel: ("qks", (0.5, 5, 3, 7, 9, 11, 13, 15)),
    _hopper_dq_kernel: ("qqqllkk", (0.5, 0.5, 5, 3, 7)),
}

CALLS = 1024  # how many prepared calls are kept
KEPT = 2**30  # bytes of ds that the gradient keeps at a time
BUSY = 2**15  # keys of it at a time, of all heads: 256 tiles, two for each SM
L2 = 2**25  # bytes of it that may hold what is read again; an H100 has 50 MB
_lock = threading.RLock()
_compiled = {}  # {(kernel, plan, constants, dtype, head dim, device, aligned): Triton's kernel}
_calls = {}  # {all that a call depends on but its data: function of q, k, v}


@functools.lru_cache(CALLS)
def _bind(kernel, plan, constants, dtype, D, device):
    """Helion's host function for a kernel. What it is bound with has sizes and strides that follow
    from nothing else, so that the code depends on none of them. D: a power of two."""
    empty = functools.partial(torch.empty_strided, device=device)
    like = lambda h, n: empty((2, h, n, D), ((h + 1) * (n + 8) * 2 * D, (n + 8) * 2 * D, 2 * D, 1), dtype=dtype)
    summed = kernel.fn is _dkdv_kernel and constants[-2]
    stand_in = {
        "q": lambda: like(4, 384),
        "k": lambda: like(2, 512),
        "d": lambda: like(2, 512).to(torch.float32 if summed else dtype),
        "l": lambda: empty((2, 4, 384), (5 * 392, 392, 1), dtype=torch.float32),
        "a": lambda: empty((2, 4, 384, 16), (5 * 392 * 16, 392 * 16, 16, 1), dtype=torch.bfloat16),
        "s": lambda: empty((6, 640, 448), (648 * 456, 456, 1), dtype=dtype),
    }
    letters, numbers = _TAKES[kernel.fn]
    arguments = *(stand_in[letter]() for letter in letters), *numbers, *constants
    _binding.hopper = "range_warp_specializes" in plan.config.config
    try:  # Helion looks at the arguments again when it compiles
        return kernel.bind(arguments).compile_config(plan.config)
    finally:
        _binding.hopper = False


def _not_captured(q):
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("this has to be compiled: call flash_attention so once before the capture")


def _prepare(kernel, plan, numbers, constants):
    """The launch of a kernel as a function of its tensors, always with the same strides.

    Its first call goes through Helion's host function and remembers what that launches. Later ones
    put their tensors in place of the first ones among the launch's arguments.
    """
    compiled = grid = args = places = device = None

    def first(kind, triton_kernel, all_programs, *arguments, **options):
        nonlocal compiled, grid, args
        aligned = kind[-1]
        compiled = _compiled.get(kind)
        if compiled is not None:
            compiled[(*all_programs, 1, 1)[:3]](*arguments)
        elif not isinstance(triton_kernel, triton.JITFunction):  # the interpreter
            compiled = functools.partial(helion.runtime.default_launcher, triton_kernel, **options)
            compiled(all_programs, *arguments)
        else:
            # No integer is compiled in, as 1 or as a multiple of 16, but the strides that `aligned` is about.
            strides = lambda name: "_stride_" in name and name.split("_")[0] not in ("lse", "dlse", "delta")
            plain = [
                p.name for p, x in zip(triton_kernel.params, arguments)
                if isinstance(x, int) and not p.is_constexpr and not (aligned and strides(p.name))
            ]  # fmt: skip
            own = triton.jit(triton_kernel.fn, do_not_specialize=plain)
            compiled = helion.runtime.default_launcher(own, all_programs, *arguments, **options)
            if kernel not in _wide.values():  # whose strides may need 32 or 64 bits
                _compiled[kind] = compiled
        grid, args = (*all_programs, 1, 1)[:3], list(arguments)

    def launch(*tensors):
        nonlocal compiled, args, places, device
        if places is None:
            q = tensors[0]
            device = q.device.index
            aligned = all(
                x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(s % 16 for s in x.stride()[:3])
                for x in tensors if x.dim() == 4
            )
            kind = kernel, plan, constants, q.dtype, triton.next_power_of_2(max(q.size(3), 16)), q.device
            if (*kind, aligned) not in _compiled:
                _not_captured(q)
            run = _bind(*kind)
            # To be told apart, where q, k and v are one tensor. A view would have other strides where a size is 1.
            tensors = [x.detach() for x in tensors]
            run(*tensors, *numbers, *constants, _launcher=functools.partial(first, (*kind, aligned)))
            if compiled is None or kernel in _wide.values():
                args = None  # the caller's tensors are not kept
                return
            places = []
            for i, x in enumerate(args):
                base = getattr(x, "base", x)  # of a TMA descriptor
                for j, tensor in enumerate(tensors):
                    if base is tensor:
                        fields = None if x is base else {**vars(x), "base": None}
                        places.append((i, j, type(x), fields))
                        args[i] = None
            return
        arguments = args.copy()
        for i, j, kind, fields in places:
            if fields is None:
                arguments[i] = tensors[j]
            else:
                arguments[i] = descriptor = kind.__new__(kind)
                descriptor.__dict__ = {**fields, "base": tensors[j]}
        if isinstance(compiled, functools.partial):
            return compiled(grid, *arguments)
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)

    return launch


def _check(q, k, v, is_causal, scale, enable_gqa, config):
    """Raise the TypeError or ValueError that flash_attention documents, or return nothing."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace does not see flash_attention: use torch.export")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise ValueError(f"{name} must not be nested: pad it, or call once for each of {name}.unbind()")
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-D [B, H, S, D], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}.dtype must be bfloat16, float16 or float32, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}.dtype must be q's {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        for dim, what in ((0, "batch size"), (3, "head dim")):
            if x.size(dim) != q.size(dim):
                raise ValueError(
                    f"{name}'s {what} (size({dim})) must be q's {q.size(dim)}, got {x.size(dim)}"
                )
    D, H, Hk = q.size(3), q.size(1), k.size(1)
    if D % 8 or not 8 <= D <= 256:
        raise ValueError(f"q's head dim (size(3)) must be a multiple of 8 up to 256, got {D}")
    if not (H == Hk or enable_gqa and Hk > 0 and H % Hk == 0):
        divides = "divide" if enable_gqa else "(without enable_gqa) be"
        raise ValueError(f"k's number of heads (size(1)) must {divides} q's {H}, got {Hk}")
    for dim, what in ((1, "number of heads"), (2, "length")):
        if v.size(dim) != k.size(dim):
            raise ValueError(f"v's {what} (size({dim})) must be k's {k.size(dim)}, got {v.size(dim)}")
    if not isinstance(is_causal, (bool, CausalVariant)):
        raise TypeError(f"is_causal must be a bool or a CausalVariant, got {is_causal!r}")
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"enable_gqa must be a bool, got {enable_gqa!r}")
    if not isinstance(scale, (float, int, type(None))):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if scale is not None and not abs(scale) < 2e38:  # times log2(e) it has to be a float32
        raise ValueError(f"scale must be finite and below 2e38, got {scale}")
    if not isinstance(config, (helion.Config, configs.Plan, type(None))):
        raise TypeError(f"config must be a Config or Plan of configs.py, got {type(config).__name__}")
    if isinstance(config, helion.Config) and (is_causal is not False or H != Hk or D.bit_count() > 1):
        raise ValueError(
            "config is the report's, and its kernel is dense, with as many k as q heads and head dims of 2^n"
        )
    if isinstance(config, configs.Plan) and config.kernel == "hopper":
        if q.dtype == torch.float32 or D > config.head_dim:
            raise ValueError(f"config takes 16-bit floats and head dims up to {config.head_dim}, got {q.dtype} and {D}")
        stages = config.config.config.get("range_num_stages")
        if not isinstance(stages, list) or max(stages) > 2:  # more barriers than `fresh` knows
            raise ValueError(f"config must have range_num_stages of at most 2, for hopper_kernel, got {stages}")
    if isinstance(config, configs.Plan) and config.kernel in ("hopper", "blackwell") and q.is_cuda:
        capability, major = torch.cuda.get_device_capability(q.device), 9 if config.kernel == "hopper" else 10
        if capability[0] != major:
            raise ValueError(f"config takes GPUs of compute capability {major}.x, got {capability}")


def _readable_by_tma(x):
    """Whether rows are contiguous and begin at multiples of 16 bytes."""
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
    return x.stride(3) == 1 and min(starts) > 0 and not any(start % 16 for start in starts)


def _out_like(q):
    """q's layout where its rows are contiguous."""
    kept = torch.preserve_format if q.stride(3) == 1 else torch.contiguous_format
    return torch.empty_like(q, memory_format=kept)


def _lse_like(q):
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _report(scale, config):
    """A call of attention_kernel as a function of q, k, v. Where [B, H] does not fold into one
    dimension of the tensors as they are, it is launched for one b after the other."""
    # helion 1.5.1 fails on batched products with a dimension of size 1. Two equal queries give two
    # equal rows, two equal keys the same mean: repeat them, without a copy, and drop one.
    twice = lambda x: x.expand(-1, -1, 2, -1) if x.size(2) == 1 else x

    def call(q, k, v):
        out = torch.empty_like(q)
        whole = q.new_empty(twice(q).shape) if q.size(2) == 1 else out
        tensors = twice(q), twice(k), twice(v), whole
        if all(x.size(0) == 1 or x.stride(0) == x.size(1) * x.stride(1) for x in tensors):
            parts = [[x.flatten(0, 1) for x in tensors]]
        else:
            parts = zip(*(x.unbind() for x in tensors))
        for part in parts:
            run = attention_kernel.bind((*part, scale * LOG2E)).compile_config(config)
            run(*part, scale * LOG2E)
        return (out if whole is out else out.copy_(whole[:, :, :1])), None

    return call


# ---- Blackwell -----------------------------------------------------------------------------------


def _blackwell_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None, causal: hl.constexpr,
) -> torch.Tensor:  # fmt: skip
    """The canonical loop, word for word as Helion's cute backend recognises it: a FlashAttention-4 kernel
    takes its place. Where a line reads otherwise, q scaled before the loop, acc * (1 / l_i), the mask the
    other way round, it does not, and would compile the loop as it stands, for hardly any speed.

    q, out: [B * H, S, D]; k, v: [B * Hk, S, D]; lse: [B * H, S], or None.
    What replaces it computes otherwise (helion 1.5.1): it scales the scores in float32 instead of q in its
    own dtype; rescales acc only where the maximum grows by more than a factor of 2^8; takes a quarter of
    the exponentials from a polynomial of degree 3 (relative error 9e-5, below a 16-bit float's rounding);
    and multiplies by an approximate 1 / l_i (rcp.approx, 1 ulp).
    """
    BH, S, D = q.size()
    D = hl.specialize(D)
    scale = D**-0.5
    group = BH // k.size(0)
    for tile_b, tile_m in hl.tile([BH, S]):
        m_i = hl.full([tile_b, tile_m], float("-inf"), dtype=torch.float32)
        l_i = hl.zeros([tile_b, tile_m], dtype=torch.float32)
        acc = hl.zeros([tile_b, tile_m, D], dtype=torch.float32)
        q_tile = q[tile_b, tile_m, :]
        for tile_n in hl.tile(S):
            kv = tile_b.index // group
            qk = torch.bmm(q_tile * scale, k[kv, tile_n, :].transpose(1, 2), torch.float32)
            if causal:
                qk = torch.where(tile_m.index[None, :, None] >= tile_n.index[None, None, :], qk, float("-inf"))
            m_ij = torch.maximum(m_i, torch.amax(qk, -1))
            p = torch.exp(qk - m_ij[:, :, None])
            alpha = torch.exp(m_i - m_ij)
            l_i = l_i * alpha + torch.sum(p, -1)
            m_i = m_ij
            acc = torch.baddbmm(acc * alpha[:, :, None], p.to(v.dtype), v[kv, tile_n, :])
        if lse is not None:
            lse[tile_b, tile_m] = m_i + torch.log(l_i)
        out[tile_b, tile_m, :] = (acc / l_i[:, :, None]).to(out.dtype)
    return out


blackwell_kernel = helion.kernel(_blackwell_kernel, static_shapes=True, backend="cute")
blackwell_triton = helion.kernel(_blackwell_kernel, static_shapes=True, backend="triton")  # the interpreter's


def _blackwell_takes(q, k, v, scale):
    """Whether blackwell_kernel is for this; what is not, general_kernel computes."""
    S, D = q.shape[2:]
    return (
        q.dtype != torch.float32
        and D in (64, 128)
        and S % 128 == 0
        and S == k.size(2)
        and math.isclose(scale, D**-0.5)
        and all(x.is_contiguous() and x.numel() <= 2**31 for x in (q, k, v))
    )


def _blackwell(is_cuda, causal, config, with_lse=False, launcher=None):
    """A call of blackwell_kernel as a function of q, k, v that returns out and lse, or None for it. Its first
    call compiles for their shape. Nothing is launched but what was recognised."""
    kernel = blackwell_kernel if is_cuda else blackwell_triton
    if launcher is None:
        launcher = helion.runtime.default_cute_launcher if is_cuda else helion.runtime.default_launcher
    run = None

    def launch(generated, grid, *args, **options):
        plans = [plan["kind"] for plan in getattr(generated, "_helion_cute_wrapper_plans", ())]
        if is_cuda and plans != ["helion_flash"]:
            raise RuntimeError(
                f"Helion's cute backend did not recognise blackwell_kernel with {config.config}: "
                "what it generated is slow and not launched"
            )
        return launcher(generated, grid, *args, **options)

    def call(q, k, v):
        nonlocal run
        out = torch.empty_like(q)
        lse = _lse_like(q) if with_lse else None
        arguments = [x if x is None else x.flatten(0, 1) for x in (q, k, v, out, lse)]
        if run is None:
            _not_captured(q)
            try:
                run = kernel.bind((*arguments, causal)).compile_config(config.config)
            except helion.exc.CuteBackendUnavailable as error:
                raise RuntimeError('config blackwell needs CUDA 13 and: pip install "helion[cute]==1.5.1"') from error
        run(*arguments, causal, _launcher=launch)
        return out, lse

    return call


def _diagonal(is_causal, M, N):
    """Row i sees keys up to i + diagonal; N, where every row sees all keys."""
    diagonal = N if is_causal is False else N - M if is_causal is CausalVariant.LOWER_RIGHT else 0
    return N if diagonal >= N - 1 else diagonal


def _is_wide(*tensors):
    return any(
        max(sum((n - 1) * s for n, s in zip(x.shape, x.stride())), *x.stride()) >= 2**31 for x in tensors
    )


@contextlib.contextmanager
def _scratch(q):
    """Memory of q's device for descriptors that a kernel makes."""
    before = _allocation._allocator.set(lambda size, *_: q.new_empty(size, dtype=torch.int8))
    try:
        yield
    finally:
        _allocation._allocator.reset(before)


def _columns(D):
    """E and D of hopper_kernel."""
    whole = triton.next_power_of_2(max(D, 16))
    if D <= 64 or 4 * D > 3 * whole:
        return 0, whole
    return triton.next_power_of_2(max(D - whole // 2, 16)), whole // 2


def _plan(q, k, v, is_causal, scale, config, exact_lse):
    """What a call runs, as a function of q, k, v that returns out and lse."""
    B, H, M, D = q.shape
    N = k.size(2)
    scale = D**-0.5 if scale is None else scale
    if isinstance(config, helion.Config):
        return _report(scale, config)
    if config is not None and config.kernel == "blackwell":
        if _blackwell_takes(q, k, v, scale):
            return _blackwell(q.is_cuda, is_causal is not False, config, True)
        config = None
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    plan = config or configs.best(capability, D, q.dtype, B * H, M, N)
    diagonal, like = _diagonal(is_causal, M, N), _out_like(q)
    tiles = B * H * triton.cdiv(M, plan.block_m)
    # hopper_kernel's `quotient` and its int32; and a masked score times its scale has to be -inf.
    large = tiles >= 2**19 or max(q.stride()) >= 2**31 or M * like.stride(2) >= 2**31
    other = configs.hopper_general(D)
    if plan.kernel == "hopper" and (large or D < 16 or scale < 2.0**-100):
        plan = other
    numbers = scale * LOG2E, D, diagonal
    constants = plan.block_m, plan.block_n, plan.block_m
    fix = lambda *tensors: tensors
    kernel = general = _wide[general_kernel] if _is_wide(q, k, v, like) else general_kernel
    redo = None
    if plan.kernel == "hopper":
        kernel, columns = hopper_kernel, _columns(D)
        # TMA does not repeat: of heads that are all the same one is enough.
        first = k.stride(1) == v.stride(1) == 0
        few = lambda q, k, v: (q, k[:, 0].unsqueeze(1), v[:, 0].unsqueeze(1)) if first else (q, k, v)
        copied = [not _readable_by_tma(x) for x in few(q, k, v)]
        # What fills up a row of q would be the next head's, which may be inf or NaN, and not TMA's zeros.
        copied[0] = copied[0] or D < sum(columns) and any(s % q.stride(2) for s in q.stride()[:2])
        if first or any(copied):
            fix = lambda *tensors: [
                x.clone(memory_format=torch.contiguous_format) if copy else x
                for x, copy in zip(few(*tensors), copied)
            ]
        online = q.dtype == torch.float16
        # The last tile holds the end of the keys, and the diagonal where that is a multiple of the tile. A
        # running maximum must not see what a row does not see. D = 256 has no code for a ragged last tile.
        masked = N < plan.block_n if diagonal == N else diagonal % plan.block_n > 0 or plan.block_n < plan.block_m
        masked |= online and diagonal < N or columns[1] == 256 and (diagonal < N or N % plan.block_n > 0)
        if not online:
            redo = _prepare(general, other, numbers, (other.block_m, other.block_n, REDO_ROWS))
        programs = helion.runtime.get_num_sm(q.device)
        numbers = *numbers, programs, int(diagonal < N and tiles > programs)
        constants = plan.block_m, plan.block_n, masked, online, exact_lse and not online, *columns
    launch = _prepare(kernel, plan, numbers, constants)

    def call(q, k, v):
        out, lse = _out_like(q), _lse_like(q)
        with _scratch(q):
            launch(*fix(q, k, v), out, lse)
        if redo is not None:
            redo(q, k, v, out, lse)
        return out, lse

    return call


def _kept(known, key, make, config, *tensors):
    """What the function that make() gives does to tensors. It is kept in _calls, where a caller has looked
    for this key and found known, or None."""
    x = tensors[0]
    if known and (not x.is_cuda or x.device.index == torch.cuda.current_device()):
        return known[0](*tensors)
    with torch.cuda.device_of(x):
        if known:
            return known[0](*tensors)
        with _lock:
            call = make()
            result = call(*tensors)
            if len(_calls) >= CALLS:
                _calls.clear()
            _calls[key] = call, config  # a config that is kept keeps its id
            return result


def _eager(q, k, v, is_causal, scale, enable_gqa, config, exact_lse):
    """flash_attention on tensors that have data. Returns out and lse."""
    try:
        if q.is_neg() or k.is_neg() or v.is_neg():  # -x, of which only a bit says so
            q, k, v = (x.resolve_neg() for x in (q, k, v))
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16,
            is_causal, type(is_causal), scale, enable_gqa, id(config), exact_lse,
        )  # fmt: skip
        known = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # not a tensor, without data, nothing to keep
        _check(q, k, v, is_causal, scale, enable_gqa, config)
        raise RuntimeError(
            "q, k and v must be plain tensors: under torch.vmap and torch.func, fold what is mapped into B"
        ) from None
    if known is None:
        _check(q, k, v, is_causal, scale, enable_gqa, config)
        if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"q must be on a CUDA device, got {q.device}: to execute the kernel on the CPU, "
                "start Python with TRITON_INTERPRET=1 (check.py shows what else that takes)"
            )
        if q.numel() == 0 or k.numel() == 0:
            return _out_like(q).zero_(), _lse_like(q).fill_(float("-inf"))
    return _kept(known, key, lambda: _plan(q, k, v, is_causal, scale, config, exact_lse), config, q, k, v)


def _parts(heads, group, M, N, D, size):
    """How the heads of keys and the queries are divided, so that ds takes about KEPT bytes: heads and queries
    at a time. So many heads as have q and do in L2 together, where each tile of keys reads them again, all
    queries of them; but as many as have BUSY keys."""
    a_query = group * N * size
    whole = min(KEPT // (a_query * M), L2 // (2 * group * M * D * size))
    some = min(heads, max(1, whole, min(triton.cdiv(BUSY, N), KEPT // (a_query * 128))))
    some = triton.cdiv(heads, triton.cdiv(heads, some))
    return some, min(M, max(128, KEPT // (a_query * some) // 128 * 128))


def _plan_gradients(q, k, v, out, do, with_dlse, is_causal, scale, of_q, of_kv):
    """The gradients as a function of q, k, v, out, lse, do and the gradient of lse."""
    B, H, M, D = q.shape
    Hk, N = k.shape[1:3]
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    best = functools.partial(configs.best_gradient, capability, D, q.dtype)
    plan, plan_q, plan_k = best()
    padded_m, padded_n = (triton.cdiv(x, 128) * 128 for x in (M, N))
    group = H // Hk
    wide = _is_wide(q, k, v, out, do) or 16 * B * H * M >= 2**31
    kept = plan_q.kernel == "dq" or wide
    heads, rows = _parts(B * Hk, group, padded_m, padded_n, D, q.element_size()) if kept else (B * Hk, padded_m)
    wide |= kept and heads * group * padded_n * rows >= 2**31
    if wide or kept and not of_kv:  # for ds alone Triton does not specialise
        plan, plan_q, plan_k = best(specialised=False)
    tma = plan.kernel == "hopper_dkdv"
    kernels = [_wide[x] if wide else x for x in (delta_kernel, dkdv_kernel, dq_kernel)]
    scale = D**-0.5 if scale is None else float(scale)
    divisor = scale if abs(scale) > 2.0**-60 else 2.0**-60  # with less, scores change nothing
    diagonal = _diagonal(is_causal, M, N)
    masked, summed = diagonal < N, of_kv and rows < padded_m
    # Heads of keys whose first tiles, which have most to do, come first: all of a launch, or as many as have BUSY keys.
    together = heads if kept else min(heads, triton.cdiv(BUSY, N))
    together, together_q = (together, together * group) if masked else (1, 1)
    apart = of_kv and plan_k is not None
    keeps = kept and of_q or apart
    launches = [(plan, (keeps, of_kv and not apart, of_kv))] if keeps or of_kv else []
    launches += [(plan_k, (False, True, False))] if apart else []
    run_delta = _prepare(kernels[0], configs.DELTA, (1 / divisor, D), (configs.DELTA.block_m, with_dlse))
    tiles, parts = (plan_q.block_m, plan_q.block_n), []
    for begin in range(0, B * Hk, heads):
        for m in range(0, padded_m, rows):
            some, m_range = min(heads, B * Hk - begin), (m // 128, min(m + rows, padded_m) // 128)
            numbers = scale, divisor * LOG2E, D, diagonal, begin, some, together, *m_range
            runs = [_prepare(kernels[1], x, numbers, (x.block_m, x.block_n, masked, *what, summed, tma))
                    for x, what in launches]  # fmt: skip
            if kept:
                numbers = scale, D, diagonal, begin * group, some * group, together_q, *m_range
                run_dq = _prepare(kernels[2], plan_q, numbers, tiles)
            else:
                numbers = scale, divisor * LOG2E, D, diagonal, together_q
                run_dq = _prepare(hopper_dq_kernel, plan_q, numbers, (*tiles, masked and diagonal % plan_q.block_n > 0))
            parts.append((runs, run_dq, slice(begin, begin + some)))
    copied = [tma and not _readable_by_tma(x) for x in (q, k, v, do)]

    def call(q, k, v, out, lse, do, dlse):
        with _scratch(q):
            aug, delta = q.new_empty((B, H, M, 16), dtype=torch.bfloat16), _lse_like(q)
            ds = q.new_empty((heads * group, padded_n, rows) if keeps else (1, 128, 128))
            dq = _out_like(q) if of_q else None
            dk, dv = (_out_like(x) if of_kv else x for x in (k, v))
            parts_of = dk, dv
            if summed:
                dk, dv, *parts_of = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v, k, v))
            lse = lse.contiguous()
            run_delta(out, do, lse, lse if dlse is None else dlse.contiguous(), aug, delta)
            if any(copied):
                q, k, v, do = (x.clone(memory_format=torch.contiguous_format) if copy else x
                               for x, copy in zip((q, k, v, do), copied))  # fmt: skip
            for runs, run_dq, some in parts:
                for run in runs:
                    run(q, do, aug, k, v, *parts_of, ds)
                if of_q:
                    run_dq(dq, k, ds) if kept else run_dq(dq, q, do, lse, delta, k, v)
                if summed:
                    for total, part in zip((dk, dv), parts_of):
                        total.flatten(0, 1)[some] += part.flatten(0, 1)[some]
        if not of_kv:
            return dq, None, None
        if summed:
            dk, dv = _out_like(k).copy_(dk), _out_like(v).copy_(dv)
        return dq, dk, dv

    return call


def _gradients(q, k, v, out, lse, do, dlse, is_causal, scale, of_q, of_kv):
    """dq, dk, dv, or None for those that are not asked for."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, k, v, do = (x.resolve_neg() for x in (q, k, v, torch.zeros_like(out) if do is None else do))
    key = (
        "gradients", *((x.shape, x.stride(), x.data_ptr() % 16) for x in (q, k, v, out, do)),
        q.dtype, q.device, dlse is None, is_causal, scale, of_q, of_kv,
    )  # fmt: skip
    make = lambda: _plan_gradients(q, k, v, out, do, dlse is not None, is_causal, scale, of_q, of_kv)
    return _kept(_calls.get(key), key, make, None, q, k, v, out, lse, do, dlse)


class _Attention(torch.autograd.Function):
    """flash_attention with its gradient, eagerly."""

    @staticmethod
    def forward(ctx, q, k, v, is_causal, scale, enable_gqa, config, exact_lse):
        out, lse = _eager(q, k, v, is_causal, scale, enable_gqa, config, exact_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = int(is_causal), scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlse):
        if _get_current_dispatch_mode() is not None:  # FlopCounterMode, around backward() alone
            return *_differentiate(ctx, do, dlse), None
        (variant, scale), (of_q, *of_kv) = ctx.options, ctx.needs_input_grad[:3]
        grads = _gradients(*ctx.saved_tensors, do, dlse, _masking(variant), scale, of_q, any(of_kv))
        return *grads, *[None] * 5


def _masking(variant):
    """is_causal of an operator's integer."""
    return CausalVariant(variant) if variant else False


# The same as an operator, for torch.compile, torch.export, dispatch modes and fake tensors. Its name
# has the module's in it: the file may be there twice.
@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: int, scale: float | None, enable_gqa: bool,
    exact_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _eager(q, k, v, _masking(variant), scale, enable_gqa, None, exact_lse)


@_operator.register_fake
def _(q, k, v, variant, scale, enable_gqa, exact_lse):
    _check(q, k, v, _masking(variant), scale, enable_gqa, None)
    return _out_like(q), _lse_like(q)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward", mutates_args=())
def _backward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, do: torch.Tensor,
    dlse: torch.Tensor | None, variant: int, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _gradients(q, k, v, out, lse, do, dlse, _masking(variant), scale, True, True)


@_backward_operator.register_fake
def _(q, k, v, out, lse, do, dlse, variant, scale):
    return _out_like(q), _out_like(k), _out_like(v)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:5]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do
    return *_backward_operator(q, k, v, out, lse, do, dlse, *ctx.options), *[None] * 4


_operator.register_autograd(_differentiate, setup_context=_save)
_operators = getattr(torch.ops, __name__.replace(".", "_"))
# As torch counts SDPA: 2 products forward and 5 backward, causal or not.
register_flop_formula(_operators.forward)(lambda q, k, *_, **__: 4 * math.prod(q) * k[2])
register_flop_formula(_operators.backward)(lambda q, k, *_, **__: 10 * math.prod(q) * k[2])


def _lower_right(is_causal):
    """What SDPA's flash backend means: CausalBias relies on it, plain is_causal has M = N there."""
    return CausalVariant.LOWER_RIGHT if is_causal else False


def _sdpa_forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if dropout_p or return_debug_mask:
        raise RuntimeError("flash_attn.py has no dropout: torch.nn.attention.restore_flash_attention_impl()")
    out, lse = _eager(q, k, v, _lower_right(is_causal), scale, True, None, True)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros((), dtype=torch.uint64, device=q.device)
    return out, lse, None, None, q.size(2), k.size(2), *no_dropout, q.new_empty(0)


def _sdpa_backward(do, q, k, v, out, lse, _q, _k, M, N, dropout_p, is_causal, _seed, _offset, *, scale=None):
    return _gradients(q, k, v, out, lse, do, None, _lower_right(is_causal), scale, True, True)


class _Registered:
    """What torch.nn.attention keeps while SDPA's flash backend is this file, on CUDA or, for check.py, the CPU."""

    def __init__(self, key="CUDA"):
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_scaled_dot_product_flash_attention", _sdpa_forward, key)
        self.library.impl("_scaled_dot_product_flash_attention_backward", _sdpa_backward, key)

    def remove(self):
        self.library._destroy()


# torch.nn.attention.activate_flash_attention_impl("helion") puts it behind SDPA, where torch has that.
if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl("helion", register_fn=_Registered)


def flash_attention(q, k, v, *, is_causal=False, scale=None, enable_gqa=False, return_lse=False, config=None):
    """softmax(q k^T * scale) v as torch's scaled_dot_product_attention names it, and its gradient.

    q: [B, H, M, D]; k, v: [B, Hk, N, D]. bfloat16, float16 or float32, all three the same; D is a
    multiple of 8 up to 256; M and N are any lengths; any strides. float32 products keep float32's
    precision (tf32x3). Sums are float32 throughout, and N * max|v| has to be below its 3.4e38.
    is_causal: True: row i sees keys up to i (CausalVariant.UPPER_LEFT of torch.nn.attention.bias).
    CausalVariant.LOWER_RIGHT: up to i + N - M, so that the last row sees all keys. A row that sees
    none is 0. NaN or inf in v may spread to rows that do not see it, as in SDPA's math backend.
    scale: a float of either sign or 0, below 2e38; 1 / sqrt(D) if None. Scores, q k^T * scale, have to be below
    2e38, too; float16 on Hopper: below 10^8.
    enable_gqa: Hk may be less than H, which it then divides: H / Hk heads of q in a row share one.
    config: what to run, from configs.py. A Plan runs general_kernel, or on Hopper hopper_kernel, or on
    Blackwell, with helion[cute], blackwell_kernel, which is compiled for each shape and leaves to
    general_kernel what it does not take. A helion.Config is the report's and runs attention_kernel, dense
    and compiled for each shape. None takes what configs.py knows to be best for this GPU.
    Returns out: [B, H, M, D] in q's dtype and layout. With return_lse, out and lse: [B, H, M], float32,
    the natural logarithm of each row's sum of exp(q k^T * scale), -inf for a row that sees nothing. out is
    the same, bit for bit.
    Differentiable once, with respect to q, k, v, out and lse, and the same bits at every run. The gradient takes
    about 1 GB for a while: less where all scores take less; where one head's take more, 16 bytes more for each
    element of k and v, and as much as the scores of 128 queries of a group of heads. With D from 40 to 64 in 16
    bits on Hopper it takes next to nothing.
    Tensors are read where they are, heads of k and v that are one head expanded, too. Only what TMA
    cannot read, rows that are not contiguous or do not start at multiples of 16 bytes, and a batch that
    is expanded, is copied, for hopper_kernel; and q in [B, S, H, D], where that fills D up with zeros.
    The first call of a kind (head dim, dtype, masking, alignment, config) compiles, for seconds; batch,
    heads, lengths and scale are run-time values. On Hopper few keys, N <= 128, and, in bf16 up to D = 64, few
    queries, M < 1024 or B * H * M < 2^17, are kinds of their own, which may differ in the last bits of out. Inside
    CUDA graph capture a kind must not be new.
    Under torch.compile, torch.export and dispatch modes (make_fx, selective checkpointing,
    FlopCounterMode) it is one operator, torch.ops.flash_attn.forward, and config has to be None.
    Under autocast q, k and v are cast as SDPA's are.
    Raises TypeError or ValueError, before anything is compiled, on input outside of the above: the
    message names the argument, what it was and what is accepted. Under torch.func, torch.vmap and
    torch.jit.trace RuntimeError.
    """
    if return_lse and isinstance(config, helion.Config):
        raise ValueError("config is the report's, whose kernel has no lse to return")
    if isinstance(q, torch.Tensor) and q.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if getattr(x, "dtype", None) in DTYPES else x for x in (q, k, v))
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise RuntimeError("flash_attention has no forward-mode derivative")
    gradient = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k, v))
    if gradient and isinstance(config, helion.Config):
        raise ValueError("config is the report's, whose kernel has no gradient: detach q, k and v")
    exact_lse = return_lse or gradient  # which takes p from it
    is_compiling = torch.compiler.is_compiling()
    if gradient and not is_compiling and torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "flash_attention has no gradient under torch.func: take it by torch.autograd.grad"
        )
    # A mode sees the operator: of the eager call it would see the memory and not the kernels.
    is_seen = is_compiling or _get_current_dispatch_mode() is not None
    if is_seen or type(q) not in (torch.Tensor, torch.nn.Parameter):
        _check(q, k, v, is_causal, scale, enable_gqa, config)
        if config is not None:
            raise ValueError("config must be None under torch.compile and dispatch modes, and for subclasses")
        out, lse = _operator(q, k, v, int(is_causal), scale, enable_gqa, exact_lse)
    else:
        run = _Attention.apply if gradient else _eager
        out, lse = run(q, k, v, is_causal, scale, enable_gqa, config, exact_lse)
    return (out, lse) if return_lse else out

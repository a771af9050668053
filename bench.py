"""Measure attention: Helion against PyTorch's scaled_dot_product_attention (SDPA) and FlashAttention.

    python bench.py                          # the report's three tables
    python bench.py --config hopper          # this project's kernel; also --causal, --kv-heads 8, --layout bshd
    python bench.py --shape 1,16,2048,64     # your shape [B, H, S, D]; may be repeated
    python bench.py --backward               # the gradient, and a training step
    python bench.py --sweep --json run.json  # TFLOPS at lengths from 512 to 16384
    python bench.py --plot sweep.svg         # four sweeps and their picture; or that of files: sweep.svg run.json
    python bench.py > table.md               # markdown goes to stdout, progress to stderr

Every result is compared with SDPA's before its time is believed. Times are medians of
triton.testing.do_bench (L2 flushed before each call); the competitors take turns over several rounds,
so that clock drift hits all alike. The smallest and the largest speedup of a round stand in brackets:
read a difference as real only where both are on the same side of 1.
Without a GPU the tables show what can be known without one.
"""
import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time

import check  # first: it decides between GPU and interpreter before triton is imported
import helion
import torch
import torch.nn.functional as F
import triton.testing
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import LOG2E, attention_kernel, configs, flash_attention

ROUNDS, WARMUP_MS, REP_MS = 5, 10, 50
GROWING = 100  # calls with one key more than the last
# The sweep is FlashAttention's own: batches of 16k tokens, all heads together 2048 wide.
LENGTHS, TOKENS, WIDTH = (512, 1024, 2048, 4096, 8192, 16384), 16384, 2048
PACKAGES = ("torch", "triton", "helion", "nvidia-cutlass-dsl", "flash-attn", "flash-attn-3", "fa3-fwd")


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def table(*head):
    print()
    row(*head)
    row(*("---" for _ in head))


def bracket(shape):
    return f"[{', '.join(map(str, shape))}]"


def first_line(error):  # some have no text at all
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}".replace("|", "/")


@dataclasses.dataclass
class Case:
    """What all rows of a table have in common."""

    dtype: str
    causal: bool
    kv_heads: int | None  # None: as many as q has
    layout: str
    backward: bool

    def __str__(self):
        return f"{'backward' if self.backward else 'forward'}, {'causal' if self.causal else 'dense'}"

    def tensors(self, shape, layout=None):
        """q, k, v: [B, H, S, D] whatever the layout in memory."""
        qkv = check.make(shape, self.dtype, heads=self.kv_heads)
        bshd = (layout or self.layout) == "bshd"
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv] if bshd else qkv

    def options(self, shape):
        """The keywords that say the same to SDPA and to flash_attention."""
        return {"is_causal": self.causal, "enable_gqa": self.kv_heads not in (None, shape[1])}

    def flops(self, shape):
        """As FlashAttention counts them, whatever a kernel computes beyond that."""
        return check.flops(shape) * (2.5 if self.backward else 1) / (2 if self.causal else 1)


def config_of(name, shape, case):
    """What a row runs. "default" is what flash_attention takes by itself, "hopper" what it takes on Hopper."""
    if name in configs.CONFIGS:
        return configs.CONFIGS[name]
    if name == "blackwell":
        return configs.BLACKWELL_CUTE
    capability = torch.cuda.get_device_capability() if check.GPU and name == "default" else (9, 0)
    return configs.best(capability, shape[3], check.DTYPES[case.dtype], shape[2])


# ---- The competitors: functions of q, k, v and a case's options ------------------------------------


def sdpa(backend, q, k, v, **options):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def library(function, q, k, v, is_causal, enable_gqa):
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal)  # [B, S, H, D]
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@functools.cache
def competitors(every):
    """{name: function}. every: SDPA's math backend, too, which is never the best.

    One package is called flash_attn, as our own file is: ours steps aside while they are looked for.
    """
    found = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", *["MATH"] * every):
        found[f"SDPA {name.split('_')[0].lower()}"] = functools.partial(sdpa, getattr(SDPBackend, name))
    path, ours = list(sys.path), sys.modules.pop("flash_attn")
    sys.path[:] = [p for p in path if os.path.realpath(p or ".") != str(check.HERE)]
    for name, module in (("FA2", "flash_attn"), ("FA3", "flash_attn_interface"), ("FA3", "fa3_fwd_interface"),
                         ("FA4", "flash_attn.cute")):  # fmt: skip
        try:
            if name not in found:
                found[name] = functools.partial(library, importlib.import_module(module).flash_attn_func)
        except Exception as error:  # not installed, or not for this GPU: say so and go on
            say(f"{name} ({module}): not used, {first_line(error)}")
    sys.path[:], sys.modules["flash_attn"] = path, ours
    return found


def gradient(attend, q, k, v, do):
    """The backward pass alone, as a function without arguments that returns dq, dk and dv.

    It calls the node that attend left in the autograd graph. The autograd engine would run it on the
    stream of the forward pass, which is not the one that a CUDA graph captures.
    Where attend leaves more than one node, the last one's result is not the gradient, and `agree` sees it.
    """
    out = attend(*(x.detach().requires_grad_() for x in (q, k, v)))
    node, transposed = out.grad_fn, out.grad_fn.name() == "TransposeBackward0"
    if transposed:  # by `library`
        node, do = node.next_functions[0][0], do.transpose(1, 2)
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    run = functools.partial(node.apply, do, None) if in_python else functools.partial(node, do)  # None: for lse
    turn = lambda x: x.transpose(1, 2) if transposed else x
    return torch.no_grad()(lambda: [turn(x) for x in run()[:3]])


def agree(found, expected):
    """Coarsely, but every element: each 64 rows of a head, as a whole, are within 5% of SDPA's."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape, f"a result of shape {tuple(x.shape)}, SDPA's is {tuple(y.shape)}"
        for a, b in zip(x.split(64, 2), y.split(64, 2)):
            error, size = (a.float() - b.float()).norm(dim=(2, 3)), b.float().norm(dim=(2, 3))
            assert (error <= 0.05 * size + 1e-3).all(), "another result than SDPA's"


# ---- With a GPU ----------------------------------------------------------------------------------


def take_turns(calls):
    """{name: ms of each round}. Another order each round: who runs before decides at which clock."""
    names, times = list(calls), {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in names:
            ms = triton.testing.do_bench(calls[name], warmup=WARMUP_MS, rep=REP_MS, return_mode="median")
            times[name].append(ms)
        names = names[1:] + names[:1]
    return times


def measure(functions, shape, case):
    """{name: ms of each round} of those that run and agree with SDPA. Each is replayed as a CUDA graph:
    a host that is slower than the GPU does not show."""
    (q, k, v), options = case.tensors(shape), case.options(shape)
    if case.backward:
        do, leaves = torch.randn_like(q), [x.detach().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **options), leaves, do)
    else:
        expected = [F.scaled_dot_product_attention(q, k, v, **options)]
    graphs, calls = {}, []  # calls have the tensors that a graph reads
    for name, function in functions.items():
        try:
            attend = functools.partial(function, **options)
            calls.append(gradient(attend, q, k, v, do) if case.backward else lambda f=attend: [f(q, k, v)])
            agree(calls[-1](), expected)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls[-1]()
            graphs[name] = graph.replay
        except Exception as error:
            if name == "Helion":  # no row without it
                raise
            say(f"  {name} does not run this: {first_line(error)}")
    return take_turns(graphs)


def host_cost(function, calls=100):
    """us until a call returns, median of those to a GPU that has nothing else to do."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def run_row(shape, config, case, every, host):
    """Check and time one row; a dict for --json. Raises what the kernel raises.

    host: also what a call costs the host. With --backward this is a training step, whose time is there, too.
    """
    ours, pytorch = functools.partial(flash_attention, config=config), F.scaled_dot_product_attention
    (q, k, v), options = case.tensors(shape), case.options(shape)
    if not case.backward:  # two heads by flash-attention's bound against float64
        out, group = ours(q, k, v, **options), q.size(1) // k.size(1)
        for b, h in ((0, 0), (-1, -1)):
            heads = ((out, h), (q, h), (k, h // group), (v, h // group))
            check.compare(*(x[b, i][None, None] for x, i in heads), is_causal=case.causal)
    rounds = measure({"Helion": ours, "PyTorch": pytorch, **competitors(every)}, shape, case)
    ms = {name: statistics.median(times) for name, times in rounds.items()}
    tflops = {name: case.flops(shape) / t / 1e9 for name, t in ms.items()}
    r = {"shape": shape, "ms": ms, "rounds": rounds, "tflops": tflops}
    if host:
        calls = {name: lambda f=f: f(q, k, v, **options) for name, f in (("Helion", ours), ("PyTorch", pytorch))}
        if case.backward:
            q, k, v = (x.requires_grad_() for x in case.tensors(shape, "bshd"))  # as models have them
            do = torch.randn_like(q)
            calls = {n: lambda f=f: torch.autograd.grad(f(), (q, k, v), do) for n, f in calls.items()}
            r["step_rounds"] = take_turns(calls)
        r["host_us"] = {name: host_cost(call) for name, call in calls.items()}
    return r


def speedup(rounds, name):
    """Name's time over Helion's: of the medians, and the smallest and the largest of one round, in which
    both had the same clock."""
    each = [other / ours for other, ours in zip(rounds[name], rounds["Helion"])]
    median = statistics.median(rounds[name]) / statistics.median(rounds["Helion"])
    return f"{median:.2f}x ({min(each):.2f} to {max(each):.2f})"


def best_of(r):
    """The fastest competitor. PyTorch's default dispatch is one of the others."""
    return min((n for n in r["ms"] if n not in ("Helion", "PyTorch")), key=r["ms"].get, default="PyTorch")


def gpu_table(name, shapes, case, args, rows):
    """The report's columns, then the best competitor; --all: and every other. --sweep: all in TFLOPS instead."""
    others, both = list(competitors(args.all)), ("Helion", "PyTorch")
    number = lambda numbers, n, digits=4: f"{numbers[n]:.{digits}f}" if n in numbers else ""
    over = lambda r, n: speedup(r["rounds"], n) if n in r["rounds"] else ""
    head, what = ["Helion (ms)", "PyTorch (ms)", "Speedup", "TFLOPS", "Best competitor (ms)", "Speedup over it"], "call"
    if case.backward:
        head, what = [*head, "Training step: Helion, PyTorch (ms)", "Speedup"], "step"
    head += [f"Host, one {what}: Helion, PyTorch (us)", *(f"{n} (ms), speedup" for n in others if args.all)]
    if args.sweep:
        head = [f"{n} (TFLOPS)" for n in ("Helion", *others)]

    def cells(r):
        if args.sweep:
            return [number(r["tflops"], n, 1) for n in ("Helion", *others)]
        best, found = best_of(r), [number(r["ms"], n) for n in both]
        found += [over(r, "PyTorch").partition(" ")[0], number(r["tflops"], "Helion", 1)]
        found += [f"{best} {number(r['ms'], best)}", over(r, best)]
        if case.backward:
            steps = r["step_rounds"]
            found += [", ".join(f"{statistics.median(steps[n]):.4f}" for n in both), speedup(steps, "PyTorch")]
        found.append(", ".join(number(r["host_us"], n, 1) for n in both))
        return found + [f"{number(r['ms'], n)} {over(r, n)}" for n in others if args.all]

    qkv = [x.requires_grad_(case.backward) for x in case.tensors((1, *shapes[0][1:]))]
    print("\n**PyTorch:** SDPA's default dispatch, here",
          SDPBackend(torch._fused_sdp_choice(*qkv, **case.options(shapes[0]))).name)  # fmt: skip
    table("Config [B, H, S, D]", *head)
    for i, shape in enumerate(shapes):
        say(f"{name}, {case}: {bracket(shape)}, then {len(shapes) - 1 - i} more")
        torch.cuda.empty_cache()
        try:
            rows.append(run_row(shape, config_of(name, shape, case), case, args.all, not args.sweep))
            row(bracket(shape), *cells(rows[-1]))
        except Exception as error:
            rows.append({"shape": shape, "error": str(error)[:2000]})
            row(bracket(shape), f"failed: {first_line(error)}", *[""] * (len(head) - 1))
    good = [r for r in rows if "error" not in r]
    means = [r["ms"][best_of(r)] / r["ms"]["Helion"] for r in good if best_of(r) in r["ms"]]
    if means and not args.sweep:
        print(f"\nGeometric mean of the speedups over the best competitor: {statistics.geometric_mean(means):.3f}x")
    if good and not (case.backward or args.sweep or name in configs.CONFIGS or name == "blackwell"):  # which compile
        growing_cost(config_of(name, shape, case), min((r["shape"] for r in good), key=check.flops), case)


def growing_cost(config, shape, case):
    """Print what a call costs the host if each has another length of keys, as with a KV cache."""
    q, k, v = case.tensors((*shape[:2], shape[2] + GROWING, shape[3]))
    q, options, costs = q[:, :, :1].contiguous(), {**case.options(shape), "is_causal": False}, []  # it sees all keys
    ours = functools.partial(flash_attention, config=config)
    for name, function in (("Helion", ours), ("PyTorch", F.scaled_dot_product_attention)):
        caches = iter([(k[:, :, :n], v[:, :, :n]) for n in range(shape[2], shape[2] + GROWING)])
        costs.append(f"{name} {host_cost(lambda: function(q, *next(caches), **options), GROWING):.1f}")
    print(f"\nOne query, and at each of {GROWING} calls one key more, from {shape[2]} on. Host us: {', '.join(costs)}.")


# ---- Tuning --------------------------------------------------------------------------------------


def candidates(plan):
    """Plans near this one."""
    if plan.kernel == "hopper":  # two warpgroups of 64 rows each; 168 registers are what 12 warps can have
        changes = [(128, n, {"maxnreg": registers, "num_stages": stages, "range_num_stages": [1, stages]})
                   for n, stages, registers in itertools.product((64, 128), (2, 3), (152, 160, 168))]  # fmt: skip
    else:
        changes = [(m, n, {"num_warps": warps, "num_stages": stages})
                   for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))]  # fmt: skip
    for m, n, change in changes:
        yield dataclasses.replace(plan, block_m=m, block_n=n, config=helion.Config(**{**plan.config.config, **change}))


def autotune(name, shape, case):
    """Print a Config or Plan for configs.py, tuned for this GPU and shape, beside the one it started from.

    Helion's search tunes the report's kernel. It does not suit the others: its reference config has to run,
    and in theirs nothing specialises. Of them all `candidates` are timed.
    """
    start, of = config_of(name, shape, case), lambda config: functools.partial(flash_attention, config=config)
    if isinstance(start, helion.Config):
        say("Helion's search. With HELION_AUTOTUNE_EFFORT=quick it took 3 minutes on an H100, without it takes much "
            "longer. HELION_AUTOTUNE_BUDGET_SECONDS=N ends it.")  # fmt: skip
        q, k, v = (x.flatten(0, 1) for x in case.tensors(shape))
        arguments = (q, k, v, torch.empty_like(q), shape[3] ** -0.5 * LOG2E)
        attention_kernel.settings.autotune_seed_configs = start
        tuned = attention_kernel.bind(arguments).autotune(arguments)
    else:
        plans, rounds = list(candidates(start)), {}
        for i, plan in enumerate(plans):
            say(f"{plan!r}: some 10 seconds, then {len(plans) - 1 - i} more")
            rounds |= measure({plan: of(plan)}, shape, case)
        tuned = min(rounds, key=lambda plan: statistics.median(rounds[plan]), default=start)
    functions = {"tuned": of(tuned), f"{name}, where it started": of(start), "PyTorch": F.scaled_dot_product_attention}
    rounds = measure(functions, shape, case)
    times = ", ".join(f"{n} {statistics.median(ms):.4f} ms" for n, ms in rounds.items())
    print(f"TUNED = {tuned!r}\n# {bracket(shape)}, {case.dtype}, {torch.cuda.get_device_name()}: {times}")
    return 0 if "tuned" in rounds else 1


# ---- The picture ---------------------------------------------------------------------------------


def plot(path, records):
    """TFLOPS against length, one panel for each kind of sweep. Grey on nothing is read on light and on dark."""
    import matplotlib.pyplot as plt

    grey, r0 = "#808890", records[0]
    colors = {"Helion": "#f76707", "FA3": "#228be6", "FA4": "#12a5a5", "SDPA cudnn": "#2f9e44",
              "SDPA flash": "#9c6ade", "FA2": "#d6409f", "SDPA efficient": "#a08a70"}  # fmt: skip
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "bench", "axes.spines.top": False, "axes.spines.right": False,
              "axes.grid": True, "grid.color": grey, "grid.alpha": 0.25}  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, sharey=True, layout="constrained")
        for ax, panel in zip(axes.flat, ("forward, dense", "forward, causal", "backward, dense", "backward, causal")):
            ax.set_title(panel, fontsize=11)
            rows = [r for record in records for r in record["sweeps"].get(panel, []) if "error" not in r]
            for name, color in colors.items():
                points = [(r["shape"][2], r["tflops"][name]) for r in rows if name in r["tflops"]]
                width = 2.5 if name == "Helion" else 1.3
                if points:
                    ax.plot(*zip(*points), "o-", color=color, label=name, linewidth=width, markersize=2 * width)
        ax.set_xscale("log", base=2)
        ax.set_xticks(LENGTHS, [f"{n // 1024}k" if n >= 1024 else n for n in LENGTHS])
        ax.set_ylim(bottom=0)
        lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=max(1, len(lines)), frameon=False)
        heads = f"{WIDTH // r0['head_dim']} heads" + f", {r0['kv_heads']} of k and v" * bool(r0["kv_heads"])
        figure.supylabel("TFLOPS", fontsize=10)
        figure.supxlabel(f"sequence length, in batches of {TOKENS} tokens\n\n{r0['gpu']}, {r0['dtype']}, head dim "
                         f"{r0['head_dim']}, {heads}, {r0['date'][:10]}\n"
                         + ", ".join(f"{n} {found}" for n, found in r0["versions"].items()), fontsize=9)  # fmt: skip
        figure.savefig(path, transparent=True, dpi=150)
    say(f"wrote {path}")


# ---- Without a GPU -------------------------------------------------------------------------------


def cpu_table(name, shapes, case, args, rows):
    """What is known of a config without a GPU: published times, machine code, and a small result."""
    published = {r[0]: r[1:] for r in check.PUBLISHED.get(name, []) if r[0] in shapes}
    if published:
        table("Published for a B200 [B, H, S, D]", "Helion (ms)", "PyTorch (ms)", "Speedup", "TFLOPS")
        for shape, numbers in published.items():
            row(bracket(shape), *numbers)
    B, H, S, D = shapes[0]
    config, small = config_of(name, shapes[0], case), (1, 2, min(S, 256), D)
    blackwell = name == "blackwell"
    sms, group = (100,) if blackwell else (90, 100), (case.causal, H // (case.kv_heads or H)) if blackwell else ()
    say(f"{name}: compiling for {' and '.join(f'sm_{sm}' for sm in sms)}")
    print(f"\nMachine code for D = {D}, {case.dtype}, from the compiler that {'cutlass-dsl' if blackwell else 'Triton'} has:")
    table("Target", "Threads", "Registers", "Spilled (bytes)", "Shared memory (bytes)", "CTAs per SM", "Tensor cores")
    codes = check.compile_in_child([(config, sm, D, case.dtype, *group) for sm in sms])
    for sm, code in zip(sms, codes):
        keys = ("threads", "registers", "spilled", "shared", "ctas", "instruction")
        failed = [f"does not compile: {code.get('error', '')}".replace("|", "/"), *[""] * 5]
        row(f"sm_{sm}", *(failed if "error" in code else (code[key] for key in keys)))
    say(f"{name}: executing {bracket(small)} in the interpreter")
    try:
        case = dataclasses.replace(case, kv_heads=case.kv_heads and max(1, 2 * case.kv_heads // H))
        q, k, v = case.tensors(small)
        out = flash_attention(q, k, v, config=config, **case.options(small))
        result = {"executed": check.compare(out, q, k, v, is_causal=case.causal)}
    except Exception as error:
        result = {"error": f"FAILED: {error}"}
    print(f"\nExecuted on the CPU at {bracket(small)}, against a float64 reference: {[*result.values()][0]}", flush=True)
    rows.append({"published": [*published.items()], "machine_code": codes, **result})


# ---- The command ---------------------------------------------------------------------------------


def shape_argument(text):
    try:
        B, H, S, D = shape = tuple(int(x) for x in text.split(","))
    except ValueError:
        shape = (0,)
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,S,D: four positive integers")
    return shape


def arguments():
    """What the command line says. A mistake in it is one line, and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    add, switch = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("--config", choices=[*configs.CONFIGS, "hopper", "blackwell", "default"], help="default: what flash_attention takes")
    add("--shape", type=shape_argument, action="append", metavar="B,H,S,D")
    add("--dtype", choices=list(check.DTYPES), default="bfloat16")
    switch("--causal", help="is_causal=True, for all")
    add("--kv-heads", type=int, metavar="N", help="heads of k and v; default: H, as many as q has")
    add("--layout", choices=("bhsd", "bshd"), default="bhsd", help="of q, k, v in memory")
    switch("--backward", help="the gradient: dq, dk, dv")
    switch("--all", help="show every competitor, not only the best one")
    switch("--sweep", help="TFLOPS at lengths from 512 to 16384")
    add("--head-dim", type=int, default=128, metavar="D", help="of --sweep and --plot")
    add("--plot", nargs="+", metavar=("FILE", "JSON"), help="draw sweeps; without a JSON run all four")
    add("--json", metavar="FILE", help="also write everything that is measured, and versions")
    add("--autotune", type=shape_argument, metavar="B,H,S,D", help="print a config that is tuned for this shape")
    args = parser.parse_args()
    args.sweep |= args.plot is not None
    special = args.causal or args.kv_heads is not None or args.backward or args.sweep
    names = ["default"] if special else ["tile128"] if args.autotune else configs.CONFIGS
    names = [args.config] if args.config else list(names)
    head_dims = range(8, 257, 8) if names[0] in ("hopper", "default") else check.HEAD_DIMS
    if args.sweep and args.head_dim in head_dims:
        args.shape = [(TOKENS // n, WIDTH // args.head_dim, n, args.head_dim) for n in LENGTHS]
    shapes = [args.autotune] if args.autotune else args.shape
    args.tables = {name: shapes or [r[0] for r in check.PUBLISHED.get(name, check.PUBLISHED["tile128"])] for name in names}
    needs = [f"--{name}" for name in ("autotune", "backward", "plot", "sweep") if getattr(args, name)]
    mistakes = {
        "--causal, --kv-heads, --backward and --sweep are not for the report's kernel: --config default has them":
            special and names[0] in configs.CONFIGS,
        "--autotune has a search for forward passes, and none for blackwell": args.autotune and (args.backward or names[0] == "blackwell"),
        "--plot needs matplotlib: pip install matplotlib": args.plot and not importlib.util.find_spec("matplotlib"),
        f"{' '.join(needs[:1])} needs a GPU, and there is none": needs and not check.GPU and not (args.plot and args.plot[1:]),
    }  # fmt: skip
    for B, H, S, D in [*args.tables[names[0]], (1, WIDTH, 1, args.head_dim)]:
        mistakes[f"head dim {D}: {names[0]} has {str(head_dims).replace('range', 'those in range')}"] = D not in head_dims
        n = args.kv_heads
        mistakes[f"--kv-heads {n} does not divide {H} heads"] = n is not None and (n < 1 or H % n)
    for path in filter(None, (args.json, *(args.plot or []))):
        mistakes[f"{path}: there is no such folder"] = not os.path.isdir(os.path.dirname(os.path.abspath(path)))
    for message in (message for message, made in mistakes.items() if made):
        parser.error(message)
    try:
        args.records = [json.load(open(path)) for path in (args.plot or [])[1:]]
        kinds = {json.dumps([r[x] for x in ("gpu", "dtype", "head_dim", "kv_heads", "versions")]) for r in args.records}
        assert len(kinds) < 2 and all(r["sweeps"] for r in args.records), "no sweep in it, or another GPU or case"
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        parser.error(f"--plot draws what --sweep --json wrote: {first_line(error)}")
    return args, Case(args.dtype, args.causal, args.kv_heads, args.layout, args.backward)


def main():
    args, case = arguments()
    if args.records:
        plot(args.plot[0], args.records)
        return 0
    if args.autotune:
        return autotune([*args.tables][0], args.autotune, case)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    now = datetime.datetime.now().isoformat(timespec="seconds")
    gpu = torch.cuda.get_device_name() if check.GPU else "none"
    print(f"**Date:** {now}  \n**GPU:** {gpu}  \n**Versions:** {', '.join(f'{n} {version}' for n, version in found.items())}  ")
    print(f"**Case:** {case.dtype}; {bracket(case.layout.upper())} in memory; heads of k, v: {case.kv_heads or 'H'}  ")
    if check.GPU:
        print(f"**Times:** medians of {ROUNDS} rounds of do_bench, L2 flushed, as CUDA graphs, competitors in turn; in "
              "brackets the smallest and the largest of a round. Host times, and training steps (autograd, [B, S, H, D] "
              "in memory), without a graph.  \n**TFLOPS** as FlashAttention counts: 2 products forward, 5 backward, half "
              "of them if causal.")  # fmt: skip
    else:
        print("**There is no GPU here: nothing below is a timing of this machine.**")
    record = {"date": now, "gpu": gpu, **vars(case), "head_dim": args.head_dim, "versions": found, "command": sys.argv,
              "tables": {}, "sweeps": {}}  # fmt: skip
    cases, status = [case], 0
    if args.plot:
        cases = [dataclasses.replace(case, backward=b, causal=c) for b in (False, True) for c in (False, True)]
    try:
        for case, (name, shapes) in itertools.product(cases, args.tables.items()):
            print(f"\n## {name}, {case}")
            for config in dict.fromkeys(config_of(name, shape, case) for shape in shapes):
                print(f"\n`{config!r}`")
            rows = record["sweeps"].setdefault(str(case), []) if args.sweep else record["tables"].setdefault(name, [])
            (gpu_table if check.GPU else cpu_table)(name, shapes, case, args, rows)
            status |= any("error" in r for r in rows)
        if args.plot:
            plot(args.plot[0], [record])
    except KeyboardInterrupt:
        say("\ninterrupted: what was done is above")
        status = 130
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)
        say(f"wrote {args.json}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

"""Measure attention: Helion against PyTorch's scaled_dot_product_attention (SDPA) and FlashAttention.

    python bench.py                          # the report's three tables
    python bench.py --config hopper          # this project's kernel; also --causal, --kv-heads 8, --layout bshd
    python bench.py --shape 1,16,2048,64     # your shape [B, H, S, D]; may be repeated
    python bench.py --backward               # the gradient, and a training step
    python bench.py --sweep --json run.json  # TFLOPS at lengths from 512 to 16384
    python bench.py --plot sweep.svg         # four sweeps and their picture; or that of files: sweep.svg run.json

Markdown goes to stdout, progress to stderr. Every result is compared with SDPA's before its time is
believed. Times are medians of triton.testing.do_bench (L2 flushed before each call); the competitors take
turns over several rounds, in random order, so that clock drift hits all alike. The smallest and the largest
speedup of a round stand in brackets: read a difference as real only where both are on the same side of 1.
Without a GPU the tables show what can be known without one.
"""
import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import timeit

import check  # first: it decides between GPU and interpreter before triton is imported
import helion
import torch
import torch.nn.functional as F
import triton.testing
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import LOG2E, attention_kernel, configs, flash_attention

ROUNDS, WARMUP_MS, REP_MS = 5, 50, 50
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


def first_line(error):  # some have no text at all
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}".replace("|", "/")


def kind(args):
    """args, here and below: the command line."""
    return f"{'backward' if args.backward else 'forward'}, {'causal' if args.causal else 'dense'}"


def tensors(shape, args, layout=None):
    """q, k, v: [B, H, S, D] whatever the layout in memory."""
    qkv, bshd = check.make(shape, args.dtype, heads=args.kv_heads), (layout or args.layout) == "bshd"
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv] if bshd else qkv


def options_of(shape, args):
    """The keywords that say the same to SDPA and to flash_attention."""
    return {"is_causal": args.causal, "enable_gqa": args.kv_heads not in (None, shape[1])}


def config_of(name, shape, args):
    """What a row runs. "default" is what flash_attention takes by itself, "hopper" what it takes on Hopper."""
    if name in configs.CONFIGS:
        return configs.CONFIGS[name]
    if name == "blackwell":
        return configs.BLACKWELL_CUTE
    capability = torch.cuda.get_device_capability() if check.GPU and name == "default" else (9, 0)
    B, H, S, D = shape
    return configs.best(capability, D, check.DTYPES[args.dtype], B * H, S, S)


def ours(config):
    return functools.partial(flash_attention, config=config)


def sdpa(backend, q, k, v, **options):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def library(function, q, k, v, is_causal, enable_gqa):
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal)  # [B, S, H, D]
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@functools.cache
def competitors(every):
    """{name: function of q, k, v and options}. every: SDPA's math backend, too, which is never the best.

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
    return torch.no_grad()(lambda out=out: [turn(x) for x in run()[:3]])  # out keeps the node alive


def agree(found, expected):
    """Coarsely, but every element: each 64 rows of a head, as a whole, are within 5% of SDPA's."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape, f"a result of shape {tuple(x.shape)}, SDPA's is {tuple(y.shape)}"
        for a, b in zip(x.split(64, 2), y.split(64, 2)):
            error, size = (a.float() - b.float()).norm(dim=(2, 3)), b.float().norm(dim=(2, 3))
            assert (error <= 0.05 * size + 1e-3).all(), "another result than SDPA's"


# ---- With a GPU ----------------------------------------------------------------------------------


def take_turns(calls):
    """{name: ms of each round}. In random order: a GPU at its power limit is faster after a call that took little."""
    order, times = random.Random(0), {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            ms = triton.testing.do_bench(calls[name], warmup=WARMUP_MS, rep=REP_MS, return_mode="median")
            times[name].append(ms)
    return times


def measure(functions, shape, args):
    """{name: ms of each round} of those that run and agree with SDPA. Each is replayed as a CUDA graph:
    a host that is slower than the GPU does not show."""
    (q, k, v), options = tensors(shape, args), options_of(shape, args)
    if args.backward:
        do, leaves = torch.randn_like(q), [x.detach().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **options), leaves, do)
    else:
        expected = [F.scaled_dot_product_attention(q, k, v, **options)]
    graphs, calls = {}, []  # calls have the tensors that a graph reads
    for name, function in functions.items():
        try:
            attend = functools.partial(function, **options)
            calls.append(gradient(attend, q, k, v, do) if args.backward else lambda f=attend: [f(q, k, v)])
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
    return 1e6 * statistics.median(timeit.repeat(function, torch.cuda.synchronize, repeat=calls, number=1))


def run_row(shape, config, args):
    """Check and time one row; a dict for --json. Raises what the kernel raises."""
    functions = {"Helion": ours(config), "PyTorch": F.scaled_dot_product_attention}
    rounds = measure(functions | competitors(args.all), shape, args)
    ms = {name: statistics.median(times) for name, times in rounds.items()}
    flops = check.flops(shape) * (2.5 if args.backward else 1) / (2 if args.causal else 1)
    r = {"shape": shape, "ms": ms, "rounds": rounds, "tflops": {n: flops / t / 1e9 for n, t in ms.items()}}
    if args.sweep:
        return r
    # What a model calls. A step is forward and backward pass together, through autograd, in the layout of models.
    qkv, options = tensors(shape, args, "bshd" if args.backward else None), options_of(shape, args)
    calls = {name: functools.partial(f, *qkv, **options) for name, f in functions.items()}
    if args.backward:
        qkv, do = [x.requires_grad_() for x in qkv], torch.randn_like(qkv[0])
        calls = {name: lambda f=f: torch.autograd.grad(f(), qkv, do) for name, f in calls.items()}
        r["step_rounds"] = take_turns(calls)
        r["step"] = {name: statistics.median(times) for name, times in r["step_rounds"].items()}
    return {**r, "host_us": {name: host_cost(call) for name, call in calls.items()}}


def speedup(rounds, name):
    """Name's time over Helion's: of the medians, and the smallest and the largest of one round, in which
    both had the same clock."""
    each = [other / ours for other, ours in zip(rounds[name], rounds["Helion"])]
    median = statistics.median(rounds[name]) / statistics.median(rounds["Helion"])
    return f"{median:.2f}x ({min(each):.2f} to {max(each):.2f})"


def best_of(r):
    """The fastest competitor; PyTorch's default dispatch, which is one of the others, if there is nobody else."""
    return min((n for n in r["ms"] if n not in ("Helion", "PyTorch")), key=r["ms"].get, default="PyTorch")


def gpu_table(name, shapes, args, rows):
    """The report's columns, then the best competitor; --all: and every other. --sweep: TFLOPS and speedups instead."""
    others, both = list(competitors(args.all)), ("Helion", "PyTorch")
    number = lambda numbers, n, digits=4: f"{numbers[n]:.{digits}f}" if n in numbers else ""
    over = lambda r, n: speedup(r["rounds"], n) if n in r["rounds"] else ""
    if args.sweep:
        columns = {"Helion (TFLOPS)": lambda r: number(r["tflops"], "Helion", 1)}
        columns |= {f"{n} (TFLOPS), speedup": lambda r, n=n: f"{number(r['tflops'], n, 1)} {over(r, n)}" for n in others}
    else:
        qkv = [x.requires_grad_(args.backward) for x in tensors((1, *shapes[0][1:]), args)]
        backend = SDPBackend(torch._fused_sdp_choice(*qkv, **options_of(shapes[0], args))).name
        print(f"\n**PyTorch:** SDPA's default dispatch, here {backend}")
        columns = {f"{n} (ms)": lambda r, n=n: number(r["ms"], n) for n in both}
        columns["Speedup"] = lambda r: over(r, "PyTorch").partition(" ")[0]
        columns["TFLOPS"] = lambda r: number(r["tflops"], "Helion", 1)
        columns["Best competitor (ms)"] = lambda r: f"{best_of(r)} {number(r['ms'], best_of(r))}"
        columns["Speedup over it"] = lambda r: over(r, best_of(r))
        if args.backward:
            columns["Step: Helion, PyTorch (ms)"] = lambda r: ", ".join(number(r["step"], n) for n in both)
            columns["Speedup of a step"] = lambda r: speedup(r["step_rounds"], "PyTorch")
        what = "a step" if args.backward else "a call"
        columns[f"Host, {what}: Helion, PyTorch (us)"] = lambda r: ", ".join(number(r["host_us"], n, 1) for n in both)
        if args.all:
            columns |= {f"{n} (ms), speedup": lambda r, n=n: f"{number(r['ms'], n)} {over(r, n)}" for n in others}
    table("Config [B, H, S, D]", *columns)
    for i, shape in enumerate(shapes):
        say(f"{name}, {kind(args)}: {[*shape]}, then {len(shapes) - 1 - i} more")
        torch.cuda.empty_cache()
        try:
            rows.append(run_row(shape, config_of(name, shape, args), args))
            row([*shape], *(cell(rows[-1]) for cell in columns.values()))
        except Exception as error:
            rows.append({"shape": shape, "error": str(error)[:2000]})
            row([*shape], f"failed: {first_line(error)}", *[""] * (len(columns) - 1))
    good = [r for r in rows if "error" not in r]
    if good and not args.sweep:
        means = [r["ms"][best_of(r)] / r["ms"]["Helion"] for r in good if best_of(r) in r["ms"]]
        print(f"\nGeometric mean of the speedups over the best competitor: {statistics.geometric_mean(means or [1]):.3f}x")
        if not args.backward and name in ("hopper", "default"):  # others would compile for each length
            growing_cost(name, min((r["shape"] for r in good), key=check.flops), args)


def growing_cost(name, shape, args):
    """Print what a call costs the host if each has another length of keys, as with a KV cache."""
    q, k, v = tensors((*shape[:2], shape[2] + GROWING, shape[3]), args)
    q, options, costs = q[:, :, :1].contiguous(), {**options_of(shape, args), "is_causal": False}, []  # it sees all keys
    for n, function in (("Helion", ours(config_of(name, shape, args))), ("PyTorch", F.scaled_dot_product_attention)):
        caches = iter([(k[:, :, :i], v[:, :, :i]) for i in range(shape[2], shape[2] + GROWING)])
        costs.append(f"{n} {host_cost(lambda: function(q, *next(caches), **options), GROWING):.1f}")
    print(f"\nOne query, and at each of {GROWING} calls one key more, from {shape[2]} on. Host us: {', '.join(costs)}.")


def autotune(name, shape, args):
    """Print a Config or Plan for configs.py, tuned for this GPU and shape, beside the one it started from.

    Helion's search tunes the report's kernel. It does not suit the others: its reference config has to run,
    and does not specialise; their tiles are no part of a Config. Some Plans near the one that we take are timed.
    """
    start = config_of(name, shape, args)
    if isinstance(start, helion.Config):
        say("Helion's search. With HELION_AUTOTUNE_EFFORT=quick it took 3 minutes on an H100, without it takes much "
            "longer. HELION_AUTOTUNE_BUDGET_SECONDS=N ends it.")  # fmt: skip
        q, k, v = (x.flatten(0, 1) for x in tensors(shape, args))
        arguments = (q, k, v, torch.empty_like(q), shape[3] ** -0.5 * LOG2E)
        attention_kernel.settings.autotune_seed_configs = start
        tuned = attention_kernel.bind(arguments).autotune(arguments)
    else:
        if start.kernel == "hopper":  # whose warps and stages are fixed
            near = [p for p in (configs.HOPPER, configs.HOPPER_64, configs.HOPPER_256) if shape[3] <= p.head_dim]
        else:
            sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
            near = [configs.Plan(start.kernel, m, n, helion.Config(
                        **{**start.config.config, "num_warps": warps, "num_stages": stages}))
                    for m, n, warps, stages in sizes]  # fmt: skip
        rounds = {}
        for i, plan in enumerate(near):
            say(f"{plan.block_m} queries x {plan.block_n} keys, {plan.config.num_warps} warps, {plan.config.num_stages} "
                f"stages: some 10 seconds, then {len(near) - 1 - i} more")  # fmt: skip
            rounds |= measure({plan: ours(plan)}, shape, args)
        tuned = min(rounds, key=lambda plan: statistics.median(rounds[plan]), default=start)
    functions = {"tuned": ours(tuned), f"{name}, its start": ours(start), "PyTorch": F.scaled_dot_product_attention}
    rounds = measure(functions, shape, args)
    times = ", ".join(f"{n} {statistics.median(ms):.4f} ms" for n, ms in rounds.items())
    print(f"TUNED = {tuned!r}\n# {[*shape]}, {args.dtype}, {torch.cuda.get_device_name()}: {times}")
    agrees = "tuned" in rounds
    say("It agrees with SDPA here. Run check.py with it in configs.py." if agrees else "It does not agree with SDPA.")
    return 0 if agrees else 1


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
        figure.supxlabel(f"sequence length, in batches of {TOKENS:,} tokens\n\n{r0['gpu']}, {r0['dtype']}, head dim "
                         f"{r0['head_dim']}, {heads}, {r0['date'][:10]}\n"
                         + ", ".join(f"{n} {found}" for n, found in r0["versions"].items()), fontsize=9)  # fmt: skip
        figure.savefig(path, transparent=True, dpi=150)
    say(f"wrote {path}")


# ---- Without a GPU -------------------------------------------------------------------------------


def cpu_table(name, shapes, args, rows):
    """What is known of a config without a GPU: published times, machine code, and a small result."""
    published = {r[0]: r[1:] for r in check.PUBLISHED.get(name, []) if r[0] in shapes}
    if published:
        table("Published for a B200 [B, H, S, D]", "Helion (ms)", "PyTorch (ms)", "Speedup", "TFLOPS")
        for shape, (ms, torch_ms, times, tflops) in published.items():
            row([*shape], f"{ms:.4f}", f"{torch_ms:.4f}", f"{times:.2f}x", tflops)
    B, H, S, D = shapes[0]
    config, small = config_of(name, shapes[0], args), (1, 2, min(S, 256), D)
    kernel = getattr(config, "kernel", "the report's")
    sms = {"blackwell": [100], "hopper": [90]}.get(kernel, [90, 100])
    case = [args.causal, H // (args.kv_heads or H), S] if kernel != "the report's" else []
    say(f"{name}: compiling for sm_{' and sm_'.join(map(str, sms))}")
    codes = check.compile_in_child([(config, sm, D, args.dtype, *case) for sm in sms])
    print(f"\nMachine code for D = {D}, {args.dtype}, {kind(args)}, from a compiler that needs no GPU:")
    table("Target", "Threads", "Registers", "Spilled (bytes)", "Shared memory (bytes)", "CTAs per SM", "Tensor cores")
    for sm, code in zip(sms, codes):
        found = (code.get(x, "") for x in ("threads", "registers", "spilled", "shared", "ctas", "instruction"))
        failed = ("does not compile: " + code.get("error", "").replace("|", "/"), *[""] * 5)
        row(f"sm_{sm}", *(failed if "error" in code else found))
    say(f"{name}: executing {[*small]} in the interpreter")
    try:
        args = argparse.Namespace(**{**vars(args), "kv_heads": args.kv_heads and max(1, 2 * args.kv_heads // H)})
        q, k, v = tensors(small, args)
        out = flash_attention(q, k, v, config=config, **options_of(small, args))
        result = {"executed": check.compare(out, q, k, v, is_causal=args.causal)}
    except Exception as error:
        result = {"error": f"FAILED: {error}"}
    print(f"\nExecuted on the CPU at {[*small]}, against a float64 reference: {[*result.values()][0]}", flush=True)
    rows.append({"published": [*published.items()], "machine_code": codes, **result})


# ---- The command ---------------------------------------------------------------------------------


def bhsd(text):
    B, H, S, D = map(int, text.split(","))
    return B, H, S, D


def arguments():
    """What the command line says. A mistake in it is one line, and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    add, switch = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("--config", choices=[*configs.CONFIGS, "hopper", "blackwell", "default"], help="default: what flash_attention takes")
    add("--shape", type=bhsd, action="append", metavar="B,H,S,D")
    add("--dtype", choices=list(check.DTYPES), default="bfloat16")
    switch("--causal", help="is_causal=True, for all")
    add("--kv-heads", type=int, metavar="N", help="heads of k and v; default: H, as many as q has")
    add("--layout", choices=("bhsd", "bshd"), default="bhsd", help="of q, k, v in memory")
    switch("--backward", help="the gradient: dq, dk, dv")
    switch("--all", help="show every competitor, not only the best one")
    switch("--sweep", help="TFLOPS at lengths from 512 to 16384")
    add("--head-dim", type=int, default=128, metavar="D", help="of --sweep and --plot")
    add("--plot", nargs="+", metavar=("FILE", "JSON"), default=[], help="draw sweeps; without a JSON run all four")
    add("--json", metavar="FILE", help="also write everything that is measured, and versions")
    add("--autotune", type=bhsd, metavar="B,H,S,D", help="print a config that is tuned for this shape")
    args = parser.parse_args()
    args.sweep |= bool(args.plot)
    special = args.causal or args.kv_heads is not None or args.backward or args.sweep
    names = ["default"] if special else ["tile128"] if args.autotune else [*configs.CONFIGS]
    names = [args.config] if args.config else names
    refuse = lambda made, message: made and parser.error(message)
    refuse(special and names[0] in configs.CONFIGS, "--causal, --kv-heads, --backward and --sweep are not for the report's "
           "kernel: leave --config out, or take hopper, blackwell or default")  # fmt: skip
    refuse(args.autotune and (args.backward or names[0] == "blackwell"), "--autotune is forward, and not for blackwell")
    refuse(args.sweep and args.shape, "--sweep and --plot have their own shapes: --head-dim is what they take")
    refuse(args.plot and not importlib.util.find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
    needs = [x for x in ("autotune", "backward", "plot", "sweep") if getattr(args, x) and not args.plot[1:]]
    refuse(needs and not check.GPU, f"--{' and --'.join(needs)}: this needs a GPU, and there is none")
    for path in filter(None, (args.json, *args.plot)):
        refuse(not os.path.isdir(os.path.dirname(os.path.abspath(path))), f"{path}: there is no such folder")
    shapes = [args.autotune] if args.autotune else args.shape
    if args.sweep:
        shapes = [(TOKENS // n, WIDTH // max(1, args.head_dim), n, args.head_dim) for n in LENGTHS]
    published = lambda name: [r[0] for r in check.PUBLISHED.get(name, check.PUBLISHED["tile128"])]
    args.tables = {name: shapes or published(name) for name in names}
    dims = range(8, 257, 8) if names[0] in ("hopper", "default") else check.HEAD_DIMS
    for B, H, S, D in args.tables[names[0]]:
        kv = H if args.kv_heads is None else args.kv_heads
        refuse(min(B, H, S, kv) < 1 or H % kv, f"[{B}, {H}, {S}, {D}], {kv} heads of k and v: not positive, or no divisor")
        refuse(D not in dims, f"head dim {D} is not one of those that {names[0]} has: {', '.join(map(str, dims))}")
    try:
        args.records = [json.load(open(path)) for path in args.plot[1:]]
        kinds = {json.dumps([r[x] for x in ("gpu", "dtype", "head_dim", "kv_heads", "versions")]) for r in args.records}
        assert len(kinds) < 2 and all(r["sweeps"] for r in args.records), "no sweep in it, or another GPU or case"
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        parser.error(f"--plot draws what --sweep --json wrote: {first_line(error)}")
    return args


def main():
    args = arguments()
    if args.records:
        return plot(args.plot[0], args.records)
    if args.autotune:
        return autotune([*args.tables][0], args.autotune, args)
    installed = {package.name.replace("_", "-") for package in importlib.metadata.distributions()}
    found = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}  # the first on the path
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    now = datetime.datetime.now().isoformat(timespec="seconds")
    gpu = torch.cuda.get_device_name() if check.GPU else "none"
    record = {x: getattr(args, x) for x in ("dtype", "causal", "kv_heads", "layout", "backward", "head_dim")}
    record |= {"date": now, "gpu": gpu, "versions": found, "command": sys.argv, "tables": {}, "sweeps": {}}
    print(f"**Date:** {now}  \n**GPU:** {gpu}  ")
    print("**Versions:** " + ", ".join(f"{name} {version}" for name, version in found.items()) + "  ")
    print(f"**Case:** {args.dtype}; {args.layout.upper()} in memory; heads of k, v: {args.kv_heads or 'H'}  ")
    print(f"**Times:** medians of {ROUNDS} rounds of do_bench, L2 flushed, competitors in random order, as CUDA graphs; host times "
          "and steps (forward and backward, BSHD) without a graph. In brackets the smallest and the largest of a round.  \n"
          "**TFLOPS** as FlashAttention counts: 2 products forward, 5 backward, half of them if causal." if check.GPU
          else "**There is no GPU here: nothing below is a timing of this machine.**")  # fmt: skip
    kinds, status = itertools.product((False, True), repeat=2) if args.plot else [(args.backward, args.causal)], 0
    try:
        for (args.backward, args.causal), (name, shapes) in itertools.product(kinds, args.tables.items()):
            print(f"\n## {name}, {kind(args)}")
            if not args.backward:  # whose kernels have their own
                used = dict.fromkeys(f"\n`{config_of(name, shape, args)!r}`" for shape in shapes)
                print(*used, sep="\n")
            rows = record["sweeps"].setdefault(kind(args), []) if args.sweep else record["tables"].setdefault(name, [])
            (gpu_table if check.GPU else cpu_table)(name, shapes, args, rows)
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
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""Products and kernels that are bound by memory: bench_gemm, bench_kernels and bench_inference."""

from figures.results import as_table, only_row, section_of


def gemm_ratio(role: str, field: str = "geometric_mean", device: str = "H100") -> str:
    """Speed of our 2:4 GEMM over the best library's, over the shapes: "geometric_mean", "minimum" or "maximum"."""
    section = section_of("bench_gemm", "shapes", device)
    if field == "maximum":
        name = "sparse_compile accurate" if role.endswith("accurate") else "sparse_compile"
        problem = role.partition(",")[0]
        ratios = [row["ratio"] for row in section["ratios"] if (row["name"], row["problem"]["name"]) == (name, problem)]
        return f"{max(ratios):.2f}x"
    return f"{only_row(section['summary'], 'the summary', role=role)[field]:.2f}x"


def tflops(name: str, device: str = "H100") -> str:
    """Dense-equivalent TFLOP/s at 8192 x 8192 x 8192."""
    return f"{only_row(section_of('bench_gemm', 'cube', device)['rows'], 'the cube', name=name)['tflops']:,.0f} TFLOP/s"


def copy_rate(op: str, rows: int, columns: int, device: str, part: str = "memory") -> str:
    """Of the rate of a device copy, what an op that is bound by memory reaches."""
    found = section_of("bench_kernels", part, device)["rows"]
    row = only_row(found, part, op=op, shape=[rows, columns])
    return f"{100 * row.get('share_of_copy', row.get('of_the_copy_rate')):.0f} %"


def copies(op: str, rows: int, columns: int, device: str, part: str) -> str:
    """How many times as long as a copy of as many bytes an op takes."""
    row = only_row(section_of("bench_kernels", part, device)["rows"], part, op=op, shape=[rows, columns])
    return f"{1 / row['share_of_copy']:.1f} times"


def host_times(device: str = "H100") -> str:
    """What a call of an op takes the host, from the fastest op to the slowest."""
    times = [1e3 * row["host_ms"]["median"] for row in section_of("bench_kernels", "host", device)["rows"]]
    return f"{min(times):.0f} to {max(times):.0f} us"


def stochastic_cost(device: str = "H100") -> str:
    """How many times as long casting and sampling a gradient takes with stochastic rounding, over the shapes."""
    rows = section_of("bench_kernels", "memory", device)["rows"]
    rate = {(row["op"], tuple(row["shape"])): row["of_the_copy_rate"] for row in rows}
    plain, stochastic = "cast_mvue, exact", "cast_mvue, exact, stochastic"
    ratios = [rate[plain, shape] / value for (op, shape), value in rate.items() if op == stochastic]
    return f"{min(ratios):.2f} to {max(ratios):.2f} times"


def _inference(part: str, device: str) -> dict[int, dict[str, float]]:
    """Microseconds of one product by tokens and candidate."""
    times: dict[int, dict[str, float]] = {}
    for row in section_of("bench_inference", part, device)["rows"]:
        best = min(timing["median"] for timing in row["ms"].values())
        times.setdefault(row["problem"]["columns"], {})[row["name"]] = 1e3 * best
    return dict(sorted(times.items()))


def inference_table(part: str, device: str = "H100") -> str:
    """One product by tokens, of a dense and a 2:4 weight in FP8 and bf16."""
    names = {"dense bf16": "dense bf16", "dense fp8": "dense FP8", "sparse_compile": "2:4 FP8"}
    return as_table(
        ("tokens", *names.values(), "2:4 FP8 against dense FP8", "against dense bf16"),
        [
            (
                f"{tokens:,}",
                *(f"{of[name]:.0f} us" for name in names),
                *(f"{of[dense] / of['sparse_compile']:.2f}x" for dense in ("dense fp8", "dense bf16")),
            )
            for tokens, of in _inference(part, device).items()
        ],
    )


def held_up(name: str, device: str = "H200", held: int = 8) -> str:
    """How many times as long as in one wave, alone, a product takes while so many multiprocessors are held."""
    rows = section_of("bench_gemm", "shared", device)["rows"]
    alone = {(row["n"], row["k"]): row["ms"] for row in rows if row["held"] == 0}
    times = [
        row["ms"][name]["median"] / alone[row["n"], row["k"]]["waves: 1"]["median"]
        for row in rows
        if row["held"] == held
    ]
    return f"{min(times):.2f} to {max(times):.2f} times"

"""The marked tables of the documents: one function of a results folder for each."""

from __future__ import annotations

from report import described, fastest_peer, is_ours, load, rate, share, table

WIDTHS = ("8 bit", "4 bit", "K4V2", "2 bit")


def _ms(seconds: float) -> str:
    digits = 0 if seconds >= 0.1 else 2
    return f"{seconds * 1e3:.{digits}f} ms"


def _case_label(shape: dict[str, int]) -> str:
    label = f"decode, {shape['kv_len']:,} tokens"
    if shape["batch"] > 1:
        label += f", batch {shape['batch']}"
    if shape["q_len"] > 1:
        label += f", {shape['q_len']} queries"
    if shape["head_dim"] != 128:
        label += f", head_dim {shape['head_dim']}"
    if shape["kv_heads"] != 8:
        label += f", {shape['kv_heads']} kv heads"
    return label


def _against(case: dict, names: list[str]) -> list[str]:
    """The fastest peer of a case and its time, and our variants' times with the ratio to it."""
    variants, name = case["variants"], fastest_peer(case)
    peer = variants[name]["median"]
    ours = (variants[own]["median"] for own in names)
    formulation = name.split(",")[0]
    return [f"{formulation}, {_ms(peer)}", *(f"{_ms(own)}, {peer / own:.1f}x" for own in ours)]


def turbo(device: str) -> str:
    """Decode and prefill against the fastest peer of all, and what an append costs."""
    result = load(device, "turbo")
    rows, errors, appends = [], [], []
    ours = [f"kvcore {width}" for width in WIDTHS]
    for case in result["cases"]:
        shape, variants = case["shape"], case["variants"]
        if case["name"].startswith("decode"):
            rows.append([_case_label(shape), *_against(case, ours)])
            if shape["kv_len"] == 32768 and shape["q_len"] == 1 and shape["head_dim"] == 128:
                found = [variants[name]["error"] for name in (fastest_peer(case), *ours)]
                errors = ["relative error on Gaussian data, 32,768 tokens"]
                errors += [f"{error:.3f}" for error in found]
        elif case["name"].startswith("causal prefill"):
            label = f"causal prefill, {shape['kv_len']:,} tokens, int8"
            rows.append([label, *_against(case, ["kvcore int8"]), "", "", ""])
        elif case["name"].startswith("append"):
            appends.append(case)
    rows.sort(key=lambda row: not row[0].startswith("decode"))
    lines = table(["", "fastest peer", "kvcore 8 bit", *WIDTHS[1:]], [*rows, errors])
    lines += ["", "Appending one token to each layer's cache:", ""]
    names = list(dict.fromkeys(name for case in appends for name in case["variants"]))
    lines += table(
        ["", *names],
        [
            [
                case["name"].removeprefix("append one token to ") + (", cold" * case["cold"]),
                *(
                    _ms(case["variants"][n]["median"]) if n in case["variants"] else ""
                    for n in names
                ),
            ]
            for case in appends
        ],
    )
    return "\n".join([*lines, "", described(result)])


def turbo_peers(device: str) -> str:
    """Decode against every library that was asked, in milliseconds."""
    result = load(device, "turbo")
    cases = [case for case in result["cases"] if case["name"].startswith("decode")]
    others = dict.fromkeys(
        name
        for case in cases
        for name in [*case["variants"], *case.get("absent", {})]
        if not is_ours(name) and not name.startswith("SDPA")
    )
    ours = [f"kvcore {width}" for width in WIDTHS]
    rows = []
    for case in cases:
        absent, variants = case.get("absent", {}), case["variants"]
        cells = [
            _ms(variants[name]["median"]) if name in variants else absent.get(name, "")
            for name in [*others, *ours]
        ]
        sdpa = variants[fastest_peer(case, "SDPA bf16")]["median"]
        rows.append([_case_label(case["shape"]), _ms(sdpa), *cells])
    lines = table(["", "SDPA bf16", *others, *ours], rows)
    return "\n".join([*lines, "", described(result), *_peers(result)])


def _peers(result: dict) -> list[str]:
    """A line on what the peers were, if there were any."""
    found = [f"{name} ({text})" for name, text in result.get("peers", {}).items()]
    absent = {
        f"{variant} {reason}"
        for case in result["cases"]
        for variant, reason in case.get("absent", {}).items()
    }
    lines = ["Peers: " + ", ".join(found) + "."] if found else []
    return lines + (["Not timed: " + ", ".join(sorted(absent)) + "."] if absent else [])


def _share(ratio: float) -> str:
    return f"1/{ratio:.2f}"


def _percent(interval: dict, digits: int) -> str:
    mean, half = 100 * interval["mean"], 100 * interval["half_width"]
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def _points(interval: dict) -> str:
    """Points of recall that are lost."""
    mean, half = -100 * interval["mean"], 100 * interval["half_width"]
    return f"{abs(mean):.2f} ± {half:.2f}" if mean or half else "0"


def demo(device: str) -> str:
    """What each cache costs the two shipped models."""
    result = load(device, "demo")
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["cache"] == "full":
            continue
        cells = rows.setdefault(row["cache"], [row["cache"], _share(row["ratio"])])
        quality = row["quality"]
        change, lost = _percent(quality["bits_change"], 2), _points(quality["recall_change"])
        cells.append(f"{change} %, {lost} points")
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    header = ["", "bytes against 16 bit", *(f"{m}: bits per byte, recall lost" for m in models)]
    return "\n".join(table(header, list(rows.values())))


def _cases(device: str, family: str) -> str:
    """Each of our variants beside the fastest peer."""
    result = load(device, family)
    rows = []
    for case in result["cases"]:
        fastest = fastest_peer(case)
        for name, variant in case["variants"].items():
            if not is_ours(name):
                continue
            cells = [f"{case['name']}{', cold' * case['cold']}", name, _ms(variant["median"])]
            if fastest is None:
                cells += ["", ""]
            else:
                seconds = case["variants"][fastest]["median"]
                cells += [f"{fastest}, {_ms(seconds)}", f"{seconds / variant['median']:.1f}x"]
            rows.append([*cells, rate(case, variant, result["ceilings"])])
    header = ["case", "variant", "median", "fastest peer", "speed", "rate (share of limit)"]
    return "\n".join([*table(header, rows), "", described(result), *_peers(result)])


def gdn(device: str) -> str:
    """The gated delta rule's cases."""
    return _cases(device, "gdn")


def _encode(result: dict) -> list[str]:
    """Microseconds a vector, and how many times ours each peer takes."""
    cases = [case for case in result["cases"] if case["name"].startswith("encode")]
    names = list(
        dict.fromkeys(n for case in cases for n in [*case["variants"], *case.get("absent", {})])
    )
    names.sort(key=is_ours)
    rows = []
    for case in cases:
        variants, vectors = case["variants"], case["shape"]["vectors"]
        cells = [case["name"]]
        for name in names:
            if name not in variants:
                cells.append(case["absent"][name])
                continue
            seconds = variants[name]["median"]
            times = seconds / variants["kvcore"]["median"]
            ratio = "" if is_ours(name) else f", {times:.0f}x"
            cells.append(f"{seconds / vectors * 1e6:,.1f}{ratio}")
        rows.append(cells)
    return table(["microseconds a vector", *names], rows)


def _decode(result: dict) -> list[str]:
    """Attention over codes: speed against the fastest peer, share of the limit of reading."""
    cases = [case for case in result["cases"] if case["name"].startswith("decode")]
    rows, columns = [], []
    for case in cases:
        ours = [name for name in case["variants"] if is_ours(name)]
        # What a name ends with, the bytes of a vector, depends on the tokens.
        columns = [name.split(", ")[1] for name in ours]
        peer, *cells = _against(case, ours)
        shares = (share(case, case["variants"][name], result["ceilings"]) for name in ours)
        cells = [f"{cell} ({of_limit})" for cell, of_limit in zip(cells, shares, strict=True)]
        rows.append([case["name"], peer, *cells])
    return table(["cold: time, speed, share of the limit", "fastest peer", *columns], rows)


def lexico(device: str) -> str:
    """The sparse codes' cases."""
    result = load(device, "lexico")
    lines = [*_encode(result), "", *_decode(result)]
    return "\n".join([*lines, "", described(result), *_peers(result)])


def dense(device: str) -> str:
    """Exact attention's cases."""
    return _cases(device, "dense")


def evaluation(device: str) -> str:
    """What `kvcore eval` found, a table for each model."""
    from kvcore.eval import report as eval_report  # the other tables need no kvcore

    result = load(device, "eval")
    setup, lines = result["setup"], []
    for model in result["models"]:
        header, *rows = eval_report.rows(model)
        lines += [f"**{model['model']}**", "", *table(header, rows), ""]
        names: dict[str, list[str]] = {}
        for name, reason in model["not_measured"].items():
            names.setdefault(reason, []).append(name)
        for reason, caches in names.items():
            lines += [f"{', '.join(caches)}: {reason}", ""]
    lines.append(
        f"`{result['command']}`: seeds {', '.join(map(str, result['plan']['seeds']))}; kvcore "
        f"{setup['kvcore']} at {setup['commit'][:10]}{' (modified)' * setup['modified']}, torch "
        f"{setup['torch']}, transformers {setup['transformers']}, {setup['date']}. {result['note']}"
    )
    return "\n".join(lines)


BLOCKS = {
    "turbo": turbo,
    "turbo_peers": turbo_peers,
    "demo": demo,
    "gdn": gdn,
    "lexico": lexico,
    "dense": dense,
    "eval": evaluation,
}

"""The doctor's findings as text."""

from __future__ import annotations

from typing import Any


def _environment_lines(env: dict[str, Any]) -> list[str]:
    torch_cuda = f"CUDA {env['torch_cuda']}" if env["torch_cuda"] else "no CUDA"
    lines = [
        f"kvcore {env['kvcore']}, Python {env['python']}, {env['platform']}",
        f"torch {env['torch']} ({torch_cuda}, {env['torch_threads']} threads), "
        f"transformers {env['transformers'] or 'not installed'}",
    ]
    if build := env["build"]:
        archs = " ".join(build["cuda_archs"]) or "none"
        lines.append(
            f"built with {build['compiler']} ({build['build_type']}) "
            f"for torch >= {build['torch_target']}, CUDA architectures: {archs}"
        )
    isa = env["cpu_isa"]
    if "active" in isa:
        lines.append(
            f"CPU kernels run at {isa['active']}; this machine supports "
            f"{', '.join(isa['supported'])}; built: {', '.join(isa['built'])}"
        )
    else:
        lines.append(f"CPU kernels: level unknown, {isa['reason']}")
    for gpu in env["gpus"]:
        lines.append(f"GPU {gpu['name']} ({gpu['arch']}, {gpu['memory_bytes'] / 2**30:.0f} GiB)")
    if not env["gpus"]:
        lines.append("GPU: none")
    lines += ["", "Libraries"]
    for library in env["libraries"]:
        state = "loaded" if library["loaded"] else f"not loaded: {library['reason']}"
        lines.append(f"  {library['name']:<12} {state}")
    return lines


def _width(bits: dict[str, Any]) -> str:
    # A tuple (one width per layer) comes back from JSON as a list, and is written as one.
    k, v = (list(b) if isinstance(b, tuple) else b for b in (bits["k_bits"], bits["v_bits"]))
    return f"k_bits={k}, v_bits={v}"


def _layer_line(layer: dict[str, Any]) -> str:
    k = layer["k"]
    heads = f"{layer['q_heads']}/{layer['kv_heads']}"
    norm = "yes" if layer["qk_norm"] else "no"
    outliers = f"{k['num_outliers']} ({k['max_ratio']:.1f}x)"
    start = f"  {layer['layer']:>5}  {heads:<7} {layer['head_dim']:>4}  {norm:<7}  {outliers:<12}"
    if "unsupported" in layer:
        return f"{start}  full precision: {layer['unsupported']}"
    errors = layer["errors"]
    plain = layer["error_8bit_without_balance_and_mean"]
    figures = [errors["8 bit"], plain, errors["4 bit"], errors["K4V2"], errors["2 bit"]]
    bits = layer["recommended"]
    width = "full" if bits is None else f"K{bits['k_bits']}V{bits['v_bits']}"
    return start + " ".join(f"{figure:>8.4f}" for figure in figures) + f"  {width}"


def _model_lines(model: dict[str, Any]) -> list[str]:
    lines = [
        f"Model {model['name']} on {model['tokens']} tokens",
        "  Relative error of each layer's attention when it reads the store; 'plain' is 8 bit",
        "  without balance and mean, and K outliers are channels far wider than the median one.",
        "  layer  heads    dim  QK norm  K outliers     8 bit    plain    4 bit     K4V2    2 bit"
        "  width",
        *map(_layer_line, model["layers"]),
    ]
    if model["caches"]:
        lines += ["", "  cache      K, V bytes   bits per token   KL to full   same top token"]
        for name, row in model["caches"].items():
            lines.append(
                f"  {name:<8} {row['kv_bytes']:>12,} {row['bits_per_token']:>16.4f} "
                f"{row['kl']:>12.2e} {row['agreement']:>15.1%}"
            )
    if model["recommended"] is None:
        lines += ["", f"  Recommended: the full cache; {model['reason']}."]
    else:
        lines += ["", f"  Recommended: TurboCache(config, {_width(model['recommended'])})"]
    lines.append("  One text says little: measure on your own data before you rely on it.")
    return lines


def render(diagnosis: dict[str, Any]) -> str:
    """The diagnosis of `kvcore.doctor.diagnose` as text for a terminal."""
    lines = _environment_lines(diagnosis["environment"])
    lines += ["", "Each op against its reference"]
    for check in diagnosis["checks"]:
        name = f"{check['op']} on {check['device']}"
        lines.append(f"  {check['status']:<8} {name:<28} {check['detail']}")
    if diagnosis["fallbacks"]:
        lines += ["", "Not used here, and why"]
        for fallback in diagnosis["fallbacks"]:
            lines.append(f"  {fallback['what']}")
            lines.append(f"    because {fallback['reason']}; {fallback['remedy']}")
    if "model" in diagnosis:
        lines += ["", *_model_lines(diagnosis["model"])]
    return "\n".join(lines)

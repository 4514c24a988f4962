"""The ``kvcore`` command.

Exit codes: 0 for success, 1 for a check that failed, 2 for a mistake in the call (one line on
standard error), 130 for an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL_HELP = "hybrid or control (shipped), the folder of a checkpoint, or a Hugging Face model id"


class UserError(Exception):
    """A mistake in the call: reported in one line, without a traceback."""


def _write_json(path: str, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def _read_text(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode(errors="replace")
        return Path(path).read_bytes().decode(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _need_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "this command needs transformers, which is not installed; run pip install 'kvcore[hf]'"
        ) from error
    # Its notes on optional kernels and generation flags are not about this command.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu or cuda, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {name}, but torch finds no GPU")


def _check_isa() -> None:
    """A level that KVCORE_CPU_ISA names wrongly would else be found when the first op runs."""
    from kvcore import _native

    if _native.status()["_C"].loaded:
        from kvcore import _C

        try:
            _C.cpu_isa()
        except RuntimeError as error:
            raise UserError(str(error)) from error


def _load_model(name: str, **kwargs: Any) -> Any:
    from kvcore.demo import models, textmodel

    _check_device(kwargs["device"])
    if name in models.NAMES:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is here, so nothing may be asked for
    _need_transformers()
    try:
        return textmodel.load(name, **kwargs)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def _doctor(args: argparse.Namespace) -> int:
    from kvcore import doctor

    if args.text is not None and args.model is None:
        raise UserError("--text needs --model")
    text = _read_text(args.text) if args.text is not None else None
    diagnosis = doctor.diagnose()
    if args.model is not None:
        loaded = _load_model(args.model, dtype=args.dtype, device=args.device)
        try:
            diagnosis["model"] = doctor.examine(loaded, text, max_tokens=args.max_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error
    if args.json is not None:
        _write_json(args.json, diagnosis)
    if args.json != "-":
        print(doctor.render(diagnosis))
    return 0 if doctor.healthy(diagnosis) else 1


def _generate(args: argparse.Namespace) -> int:
    from kvcore.demo.generate import generate
    from kvcore.eval.caches import CacheChoice

    try:
        names = [field.name for field in dataclasses.fields(CacheChoice) if field.name != "kind"]
        choice = CacheChoice(args.cache, **{name: getattr(args, name) for name in names})
    except ValueError as error:
        # The settings' names are the options'.
        name, _, rest = str(error).split(": ", 1)[-1].partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error
    _check_isa()
    text = args.prompt if args.prompt is not None else _read_text(args.prompt_file)
    loaded = _load_model(args.model, dtype=args.dtype, device=args.device, chat=args.chat)
    prompt = loaded.encode(text)
    if prompt.shape[1] == 0:
        raise UserError("the prompt is empty")
    total = prompt.shape[1] + args.max_new_tokens
    if loaded.max_positions is not None and total > loaded.max_positions:
        raise UserError(
            f"the prompt's {prompt.shape[1]} tokens and {args.max_new_tokens} new ones exceed the "
            f"{loaded.max_positions} positions of {args.model}; shorten the prompt"
        )
    decoder = loaded.decoder()

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        result = generate(
            loaded.model,
            prompt,
            choice,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            on_token=lambda token: show(decoder.push(token)),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    show(decoder.finish() + "\n")
    sizes = result.bytes
    state = f" and {sizes.state:,} bytes of recurrent state" if sizes.state else ""
    print(
        f"{choice.label} cache: {result.prompt_len} + {len(result.tokens)} tokens in "
        f"{sizes.kv:,} bytes of K and V{state} ({result.bytes_16bit / sizes.kv:.2f}x smaller than "
        f"16 bit); prefill {result.prefill_seconds:.2f} s, then "
        f"{result.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )
    return 0


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help="auto (as stored; float32 for the shipped models), float32, bfloat16 or float16",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def _doctor_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what runs here, check every op, and recommend bits for a model",
        description="Prints the versions, libraries and CPU instruction sets in use, runs each op "
        "against its reference, and says why anything is not used. With --model it also runs the "
        "model on a text and measures, per layer, outlier channels of K, QK norm, and the error of "
        "attention at each bit width. Exit code 1 if an op fails.",
    )
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--text", metavar="FILE", help="text to run the model on (default: a source file of Python)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="of that text (default 1024)"
    )
    _add_model_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the findings there; - prints them")
    parser.set_defaults(run=_doctor)


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt with the full or a compressed cache",
        description="Streams the continuation of a prompt to standard output and then reports the "
        "cache's bytes and the speed on standard error.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", help="- reads standard input")
    prompt.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: most likely token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--cache", default="turbo", metavar="KIND", help="turbo (default), lexico or full"
    )
    for name in ("k", "v"):
        cache.add_argument(
            f"--{name}-bits", type=int, default=4, metavar="B", help="8, 4 (default) or 2"
        )
    cache.add_argument(
        "--sink-pages", type=int, default=1, metavar="N", help="first pages of 64 tokens at 8 bit"
    )
    cache.add_argument(
        "--low-bit-heads", type=float, default=0.0, metavar="F", help="share of kv heads at 2 bit"
    )
    cache.add_argument(
        "--no-balance", dest="balance", action="store_false", help="no per-channel balance of K"
    )
    cache.add_argument(
        "--no-mean", dest="subtract_mean", action="store_false", help="keep the channel mean in K"
    )
    codes = parser.add_argument_group("cache, with --cache lexico")
    codes.add_argument(
        "--dictionaries",
        metavar="PATH",
        help="what train-dictionary made (default: beside the model's weights)",
    )
    for name in ("k", "v"):
        codes.add_argument(
            f"--{name}-sparsity", type=int, metavar="N", help="atoms of a code (default as trained)"
        )
    for name in ("k", "v"):
        codes.add_argument(
            f"--{name}-tolerance",
            type=float,
            default=0.0,
            metavar="T",
            help="relative error at which a code may end sooner (default 0)",
        )
    codes.add_argument(
        "--buffer-tokens", type=int, default=128, metavar="N", help="newest ones kept (default 128)"
    )
    codes.add_argument(
        "--encode-tokens", type=int, default=32, metavar="N", help="coded together (default 32)"
    )
    _add_model_options(parser)
    parser.set_defaults(run=_generate)


def _demo(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _need_transformers()
    _check_isa()
    from kvcore.demo import run

    try:
        return run.main(
            names=args.model or None, quick=args.quick, json_path=args.json, plot_path=args.plot
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _demo_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare full and compressed caches on two small models shipped with kvcore",
        description="Generates from a source file of the running Python with the full cache, with "
        "TurboCache at several widths and with LexicoCache, measures what each costs in quality on "
        "held-out text and recall, and prints a table. Takes minutes; downloads nothing.",
    )
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="hybrid or control (default both)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens, wider intervals")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot",
        default="kvcore-demo.png",
        metavar="FILE",
        help="plot of quality against bytes (default kvcore-demo.png; needs matplotlib)",
    )
    parser.set_defaults(run=_demo)


def _read_texts(paths: list[str]) -> tuple[list[str], str]:
    """The texts, and the SHA-256 of all their bytes."""
    import hashlib

    texts, sha = [], hashlib.sha256()
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--text {path}: {error.strerror}") from error
        sha.update(data)
        texts.append(data.decode(errors="replace"))
    return texts, sha.hexdigest()


def _train_dictionary(args: argparse.Namespace) -> int:
    for name in ("atoms", "sparsity", "steps", "batch", "vectors", "tokens", "context"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    texts, sha = _read_texts(args.text)
    _check_isa()
    loaded = _load_model(args.model, dtype=args.dtype, device=args.device)
    from kvcore import lexico_training

    context = min(args.context, loaded.max_positions or args.context)
    recipe = lexico_training.Recipe(
        atoms=args.atoms,
        sparsity=args.sparsity,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
    )
    try:
        report = lexico_training.train(
            loaded.model,
            lexico_training.text_rows(
                texts, loaded.encode, context=context, tokens=args.tokens, seed=args.seed
            ),
            args.out,
            name=args.model,
            source={"text_sha256": sha, "files": len(texts)},
            recipe=recipe,
            vectors=args.vectors,
        )
    except lexico_training.Interrupted:
        print(f"interrupted; the same command goes on with {args.out}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(lexico_training.render(report))
    print(f"dictionaries.safetensors, and .json with these figures: {args.out}")
    return 0


def _train_dictionary_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train-dictionary",
        help="train a model's dictionaries for LexicoCache",
        description="Runs the model on texts, trains a dictionary for K and one for V of every "
        "full-attention layer, and compares what codes lose with quantization, on vectors that "
        "were held out. After an interruption the same command goes on where it was.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="to run it on")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="gets dictionaries.safetensors and .json; until then, what a run goes on from",
    )
    parser.add_argument("--atoms", type=int, default=1024, metavar="N", help="default 1024")
    parser.add_argument(
        "--sparsity", type=int, default=16, metavar="N", help="atoms of a code (default 16)"
    )
    parser.add_argument(
        "--steps", type=int, default=4000, metavar="N", help="of each dictionary (default 4000)"
    )
    parser.add_argument(
        "--batch", type=int, default=1024, metavar="N", help="vectors of a step (default 1024)"
    )
    parser.add_argument(
        "--vectors",
        type=int,
        default=262_144,
        metavar="N",
        help="to train each dictionary on (default 262144)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=262_144,
        metavar="N",
        help="of the texts to run the model on (default 262144)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of a forward pass (default 2048, or the model's positions)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    _add_model_options(parser)
    parser.set_defaults(run=_train_dictionary)


def _subject(name: str, args: argparse.Namespace, texts: list[str] | None) -> Any:
    """The model that `kvcore eval` measures next, and what it is measured on."""
    import torch

    from kvcore.demo import models, tasks
    from kvcore.eval import recall, run

    loaded = _load_model(name, dtype=args.dtype, device=args.device)
    if texts is None:
        texts = [tasks.held_out_text().tobytes().decode(errors="replace")]
    tokens, prefix = run.text_tokens(texts, loaded.encode)
    symbols = None
    if name in models.NAMES:  # what they were trained to recall
        symbols = recall.Symbols(
            torch.arange(models.NUM_KEYS) + models.FIRST_KEY,
            torch.arange(models.NUM_VALUES) + models.FIRST_VALUE,
        )
    return run.Subject(
        name, loaded.model, loaded.decode, tokens, prefix, symbols, loaded.max_positions
    )


def _eval(args: argparse.Namespace) -> int:
    import platform
    import shlex

    _need_transformers()
    from kvcore.eval import command, options, specs

    source: dict[str, Any] = {"files": "held out of the standard library"}
    source["python"] = platform.python_version()
    texts = None
    if args.text is not None:
        texts, sha = _read_texts(args.text)
        source = {"files": len(args.text), "sha256": sha}
    _check_isa()
    try:
        plan = options.plan_of(args)
        caches = specs.parse_all(args.cache, args.dictionaries)
        names = list(dict.fromkeys(args.model))
        return command.main(
            (_subject(name, args, texts) for name in names),
            caches,
            plan,
            command=shlex.join(["kvcore", *args.argv]),
            text=source,
            out=None if args.out is None else Path(args.out),
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _eval_parser(commands: Any) -> None:
    from kvcore.eval import options

    parser = commands.add_parser(
        "eval",
        help="measure what caches cost a model in quality, and the bytes that they hold",
        description="Scores text and recall step by step through each cache and compares with the "
        "full one: bits per byte, KL, next-token agreement, needles by depth and length, recall "
        "against the number of pairs, how evenly a prompt suffers, and bytes. A cache that a model "
        "cannot have is listed with the reason. Ctrl-C keeps what was finished.",
    )
    parser.add_argument(
        "--model", required=True, action="append", metavar="MODEL", help=f"{MODEL_HELP}; repeatable"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="to score, and to hide needles in (default: source files of Python that the shipped "
        "models were not trained on)",
    )
    parser.add_argument("--out", metavar="DIR", help="gets eval.json and the plots")
    options.add_options(parser)
    _add_model_options(parser)
    parser.set_defaults(run=_eval)


def _lm_eval(args: argparse.Namespace) -> int:
    _need_transformers()
    try:
        from kvcore import lm_harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"this command needs lm-evaluation-harness, and there is no {error.name}; "
            "run pip install 'kvcore[eval]'"
        ) from error
    _check_isa()
    try:
        return lm_harness.main(args.options)
    except lm_harness.RefusedError as error:
        raise UserError(str(error)) from error


def _lm_eval_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "lm-eval",
        help="run tasks of lm-evaluation-harness through a cache",
        add_help=False,  # --help is the harness's
        allow_abbrev=False,
    )
    parser.set_defaults(run=_lm_eval, takes_options=True)


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    import kvcore

    # An editable installation lies in its checkout.
    checkout = Path(args.checkout or Path(kvcore.__file__).parents[2]).resolve()
    options = args.options
    name = "run"
    if options and options[0] in ("report", "compare", "ab"):
        name, options = options[0], options[1:]
    script = checkout / "bench" / f"{name}.py"
    if not script.is_file():
        raise UserError(
            f"{script} not found: the benchmarks are part of kvcore's source, not of the installed "
            "package; clone the repository, or unpack the sdist (pip download --no-deps "
            "--no-binary :all: kvcore), and name its folder with --checkout"
        )
    return subprocess.run([sys.executable, str(script), *options], check=False).returncode


def _bench_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="run the benchmarks of a checkout, and report or compare their results",
        description="Runs bench/run.py of a checkout of kvcore with this Python and this kvcore, "
        "and returns its exit code. All other options are passed on: --family turbo, --quick, "
        "--cases TEXT, --rounds N, --peers NAME, --out DIR. As first word, report (tables and "
        "plots from the results), compare (two results) or ab (two commits) runs that script "
        "instead.",
        allow_abbrev=False,  # --check is report's, not --checkout
    )
    parser.add_argument(
        "--checkout",
        metavar="DIR",
        help="folder of the checkout (default: the one that kvcore is imported from)",
    )
    parser.set_defaults(run=_bench, takes_options=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    import kvcore

    parser = argparse.ArgumentParser(
        prog="kvcore", description="Attention over a compressed KV cache."
    )
    parser.add_argument("--version", action="version", version=f"kvcore {kvcore.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    _doctor_parser(commands)
    _demo_parser(commands)
    _generate_parser(commands)
    _train_dictionary_parser(commands)
    _eval_parser(commands)
    _lm_eval_parser(commands)
    _bench_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: this process's) and returns the exit code."""
    parser = build_parser()
    args, args.options = parser.parse_known_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.options and not getattr(args, "takes_options", False):
        parser.error(f"unrecognized arguments: {' '.join(args.options)}")
    try:
        return args.run(args)
    except UserError as error:
        print(f"kvcore {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe left (`| head`); a second failure at exit would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

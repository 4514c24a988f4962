"""``kvcore generate``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from kvcore.cli.common import (
    MODEL_HELP,
    UserError,
    add_model_options,
    check_isa,
    load_model,
    read_text,
    refuse_given,
)


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
    for kind, options in args.of_cache.items():
        if kind != args.cache:
            refuse_given(args, options, f"--cache {kind}")
    check_isa()
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device, chat=args.chat)
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
        f"{sizes.kv:,} bytes of K and V{state} ({sizes.kv / result.bytes_16bit:.0%} of those in "
        f"16 bit); prefill {result.prefill_seconds:.2f} s, then "
        f"{result.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )
    return 0


def add_generate(commands: Any) -> None:
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
    parser.add_argument(
        "--cache", default="turbo", metavar="KIND", help="turbo (default), lexico or full"
    )
    cache = parser.add_argument_group("cache, with --cache turbo")
    turbo = [
        cache.add_argument(
            f"--{name}-bits", type=int, default=4, metavar="B", help="8, 4 (default) or 2"
        )
        for name in ("k", "v")
    ]
    turbo += [
        cache.add_argument(
            "--sink-pages",
            type=int,
            default=1,
            metavar="N",
            help="first pages of 64 tokens at 8 bit (default 1)",
        ),
        cache.add_argument(
            "--low-bit-heads",
            type=float,
            default=0.0,
            metavar="F",
            help="share of kv heads at 2 bit (default 0)",
        ),
        cache.add_argument(
            "--no-balance", dest="balance", action="store_false", help="no per-channel balance of K"
        ),
        cache.add_argument(
            "--no-mean",
            dest="subtract_mean",
            action="store_false",
            help="keep the channel mean in K",
        ),
    ]
    codes = parser.add_argument_group("cache, with --cache lexico")
    lexico = [
        codes.add_argument(
            "--dictionaries",
            metavar="PATH",
            help="what train-dictionary made (default: beside the model's weights)",
        )
    ]
    lexico += [
        codes.add_argument(
            f"--{name}-sparsity", type=int, metavar="N", help="atoms of a code (default as trained)"
        )
        for name in ("k", "v")
    ]
    lexico += [
        codes.add_argument(
            f"--{name}-tolerance",
            type=float,
            default=0.0,
            metavar="T",
            help="relative error at which a code may end sooner (default 0)",
        )
        for name in ("k", "v")
    ]
    lexico += [
        codes.add_argument(
            "--buffer-tokens",
            type=int,
            default=128,
            metavar="N",
            help="newest ones kept (default 128)",
        ),
        codes.add_argument(
            "--encode-tokens",
            type=int,
            default=32,
            metavar="N",
            help="coded together (default 32)",
        ),
    ]
    add_model_options(parser)
    parser.set_defaults(run=_generate, of_cache={"turbo": turbo, "lexico": lexico})

"""Files changed at random: refused, or a cache or dictionaries that work.

The long run: ``pytest -m slow tests/test_cache_files_fuzz.py``.
"""

import random

import pytest
import torch

from cache_files import FAMILIES, model_of, rewrite

SHORT_MUTATIONS, LONG_MUTATIONS, MUTATIONS_PER_TEST = 300, 10_000, 500


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def saved(request, tmp_path_factory):
    """The family of the files, and their folder."""
    family = FAMILIES[request.param]
    return family, family.save_all(tmp_path_factory.mktemp("saved"))


def mutate(content, rng):
    """Bytes flipped, cut out, put in or repeated, most often in the header."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(1 + min(len(content), rng.choice([16, 4000, len(content)])))
        kind = rng.randrange(6)
        if kind <= 1:
            content[at : at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in content[at : at + 1])
        elif kind == 2:
            content[at : at + 1] = bytes([rng.choice(b'0123456789"{}[]:,-\0\xff')])
        elif kind == 3:
            del content[at : at + rng.choice([1, 8, 300])]
        elif kind == 4:
            content[at:at] = rng.randbytes(rng.choice([1, 8, 300]))
        else:
            content[at:] = content[: rng.choice([0, 8, 300])]
    return bytes(content)


def fuzz_bytes(saved, path, seeds):
    family, folder = saved
    contents = {name: (folder / name).read_bytes() for name in family.names}
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(sorted(contents))
        content = mutate(contents[name], rng)
        path.write_bytes(content)
        if content == contents[name]:
            continue
        with pytest.raises(family.error):
            family.load(path, model_of(name))


def random_json(rng, depth=0):
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind < 6:
        return rng.choice([None, True, False, 0, -1, 1, 2, 8, 64, 2**31, 10**30, 1.5, "", "turbo"])
    items = [random_json(rng, depth + 1) for _ in range(rng.randrange(3))]
    return items if kind == 6 else {str(i): item for i, item in enumerate(items)}


def fuzz_content(saved, path, seeds):
    """Changed facts and values under a digest that is right: refused, or something that works."""
    family, folder = saved
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(family.names)

        def change(metadata, parts, tensors, rng=rng):
            for _ in range(rng.choice([1, 1, 2])):
                if rng.random() < 0.5:
                    target = parts[rng.choice(family.parts)]
                    if isinstance(target, list):
                        target = rng.choice(target)
                    key = rng.choice(sorted(target) or ["more"])
                    target[key] = random_json(rng)
                    continue
                tensor = tensors[rng.choice(sorted(tensors))]
                if tensor.numel():
                    flat = tensor.view(-1).view(torch.uint8)
                    for _ in range(rng.choice([1, 4])):
                        flat[rng.randrange(flat.numel())] = rng.randrange(256)

        rewrite(folder / name, path, change, names=family.parts)
        try:
            loaded = family.load(path, model_of(name))
        except ValueError:
            continue
        family.use(loaded)


@pytest.mark.parametrize("fuzz", [fuzz_bytes, fuzz_content])
def test_mutated_files(tmp_path, saved, fuzz):
    fuzz(saved, tmp_path / "file", range(SHORT_MUTATIONS))


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_bytes, fuzz_content])
@pytest.mark.parametrize("part", range(LONG_MUTATIONS // MUTATIONS_PER_TEST))
def test_mutated_files_long(tmp_path, saved, fuzz, part):
    begin = 1_000_000 + part * MUTATIONS_PER_TEST
    fuzz(saved, tmp_path / "file", range(begin, begin + MUTATIONS_PER_TEST))

"""The kvcore command: what it prints, its exit codes, and one line for each mistake."""

import builtins
import json
import os
import subprocess
import sys

import pytest
import torch

import kvcore
from kvcore import cli

transformers = pytest.importorskip("transformers")

from kvcore.demo import textmodel  # noqa: E402
from kvcore.demo.generate import generate  # noqa: E402
from kvcore.eval import bytes_16bit, cache_bytes  # noqa: E402
from kvcore.eval.caches import CacheChoice  # noqa: E402

TEXT = "def greet(name):\n    return 'Grüße, ' + name  # naïve, 你好, 😀\n" * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a small random model and a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    return str(path)


def _fails(capsys, *argv):
    """The one line that a wrong call prints."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert "Traceback" not in line
    return line


# ---- the command itself


def test_module_runs():
    run = subprocess.run(
        [sys.executable, "-m", "kvcore", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"kvcore {kvcore.__version__}\n"


@pytest.mark.parametrize("command", [[], ["doctor"], ["demo"], ["generate"], ["eval"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: kvcore")
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert all(len(line.split(maxsplit=1)) == 2 for line in options)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["generate"], ["demo", "--nonsense"]])
def test_unknown_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_interruption(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "_doctor", stop)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")


def test_closed_pipe_is_quiet():
    run = subprocess.run(
        f"{sys.executable} -m kvcore doctor | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("kvcore")
    assert "Traceback" not in run.stderr


# ---- doctor


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "Each op against its reference" in capsys.readouterr().out


def test_doctor_json(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(path)]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(path.read_text())
    assert set(printed) == set(written) == {"environment", "checks", "fallbacks"}
    assert printed["environment"] == written["environment"]


def test_doctor_fails_with_a_wrong_op(monkeypatch, capsys):
    monkeypatch.setattr(kvcore, "turbo_rewind", lambda *args, **kwargs: None)
    assert cli.main(["doctor"]) == 1
    assert "failed   turbo_rewind on cpu" in capsys.readouterr().out


def test_doctor_model(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    path = tmp_path / "doctor.json"
    argv = ["doctor", "--model", checkpoint, "--text", str(text), "--max-tokens", "300"]
    assert cli.main([*argv, "--json", str(path)]) == 0
    assert "Recommended: TurboCache(" in capsys.readouterr().out
    model = json.loads(path.read_text())["model"]
    assert model["tokens"] == 300
    assert len(model["layers"]) == 2


def test_doctor_mistakes(checkpoint, prompt_file, tmp_path, capsys):
    assert _fails(capsys, "doctor", "--text", prompt_file) == "kvcore doctor: --text needs --model"
    for option, value in (("--max-tokens", "300"), ("--dtype", "float16"), ("--device", "cuda")):
        assert _fails(capsys, "doctor", option, value) == f"kvcore doctor: {option} needs --model"
    line = _fails(capsys, "doctor", "--model", checkpoint, "--text", prompt_file)
    assert "the text must have at least 256 tokens" in line
    line = _fails(capsys, "doctor", "--model", checkpoint, "--text", "no/such/file")
    assert line == "kvcore doctor: no/such/file: No such file or directory"
    line = _fails(capsys, "doctor", "--json", str(tmp_path / "no" / "x.json"))
    assert line.endswith("x.json: No such file or directory")


# ---- generate


def _generate(checkpoint, *argv):
    return cli.main(["generate", "--model", checkpoint, "--max-new-tokens", "24", *argv])


def test_generate_full_matches_transformers(checkpoint, prompt_file, capsys):
    assert _generate(checkpoint, "--prompt-file", prompt_file, "--cache", "full") == 0
    captured = capsys.readouterr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert captured.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert f"full cache: {ids.shape[1]} + {len(expected)} tokens" in captured.err
    assert "(200% of those in 16 bit)" in captured.err  # the model computes in fp32


def test_generate_turbo_matches_the_cache_class(checkpoint, capsys):
    options = ["--k-bits", "8", "--v-bits", "4", "--sink-pages", "0", "--no-mean"]
    assert _generate(checkpoint, "--prompt", TEXT, *options) == 0
    captured = capsys.readouterr()
    loaded = textmodel.load(checkpoint)
    model, ids = loaded.model, loaded.encode(TEXT)
    cache = kvcore.cache.TurboCache(
        model.config, k_bits=8, v_bits=4, sink_pages=0, subtract_mean=False
    )
    kvcore.hf.enable(model)
    expected = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
    assert captured.out == loaded.decode(expected[0, ids.shape[1] :].tolist()) + "\n"
    assert f"K8V4 cache: {ids.shape[1]} + " in captured.err
    assert f"{cache_bytes(cache).kv:,} bytes of K and V" in captured.err


def test_generate_lexico_matches_the_cache_class(capsys):
    options = ["--cache", "lexico", "--k-sparsity", "9", "--v-sparsity", "5"]
    options += ["--k-tolerance", "0.3", "--buffer-tokens", "16", "--encode-tokens", "8"]
    assert _generate("hybrid", "--prompt", TEXT, *options) == 0
    captured = capsys.readouterr()
    loaded = textmodel.load("hybrid")
    model, ids = loaded.model, loaded.encode(TEXT)
    cache = kvcore.cache.LexicoCache(
        model.config,
        kvcore.cache.Dictionaries.load(model.name_or_path),
        k_sparsity=9,
        v_sparsity=5,
        k_tolerance=0.3,
        buffer_tokens=16,
        encode_tokens=8,
    )
    kvcore.hf.enable(model)
    expected = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
    assert captured.out == loaded.decode(expected[0, ids.shape[1] :].tolist()) + "\n"
    assert f"9+5 atoms cache: {ids.shape[1]} + " in captured.err
    assert f"{cache_bytes(cache).kv:,} bytes of K and V" in captured.err


def test_generate_reads_standard_input(checkpoint, monkeypatch, capsys):
    import io

    assert _generate(checkpoint, "--prompt", TEXT) == 0
    expected = capsys.readouterr().out
    stdin = io.TextIOWrapper(io.BytesIO(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert _generate(checkpoint, "--prompt-file", "-") == 0
    assert capsys.readouterr().out == expected


def test_generate_sampling_follows_the_seed(checkpoint, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        argv = ["--prompt", TEXT, "--temperature", "1.5", "--seed", seed]
        assert _generate(checkpoint, *argv) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_generate_chat_template(checkpoint, capsys):
    loaded = textmodel.load(checkpoint, chat=True)
    assert loaded.encode("hi")[0, 0].item() == 0
    assert _generate(checkpoint, "--prompt", TEXT, "--chat") == 0
    tokens = loaded.encode(TEXT).shape[1]
    assert f"4 bit cache: {tokens} + " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt-file", "no/such/file"], "no/such/file: No such file or directory"),
        (["--prompt", "x", "--k-bits", "3"], "--k-bits must be 8, 4 or 2, got 3"),
        (["--prompt", "x", "--v-bits", "16"], "--v-bits must be 8, 4 or 2, got 16"),
        (["--prompt", "x", "--cache", "huge"], "--cache must be one of"),
        (
            ["--prompt", "x", "--sink-pages", "-1"],
            "--sink-pages must be an int in [0, 2^31), got -1",
        ),
        (["--prompt", "x", "--low-bit-heads", "2"], "--low-bit-heads must be in [0, 1], got 2.0"),
        (["--prompt", "x", "--dtype", "int3"], "dtype must be one of"),
        (["--prompt", "x", "--device", "toaster"], "--device must be cpu or cuda, got toaster"),
        (["--prompt", "x", "--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--prompt", "x", "--sink-pages", "9" * 20], "--sink-pages must be an int in [0, 2^31)"),
        (["--prompt", "x", "--k-sparsity", "0"], "--k-sparsity must be an int in [1, 64], got 0"),
        (["--prompt", "x", "--v-tolerance", "1"], "--v-tolerance must be in [0, 1), got 1.0"),
        (["--prompt", "x", "--buffer-tokens", "-1"], "--buffer-tokens must be an int in [0, "),
        (["--prompt", "x", "--cache", "lexico"], "dictionaries: there are none in "),
        (["--prompt", "x", "--k-sparsity", "4"], "--k-sparsity needs --cache lexico"),
        (["--prompt", "x", "--cache", "full", "--v-bits", "2"], "--v-bits needs --cache turbo"),
        (["--prompt", "x", "--cache", "lexico", "--no-mean"], "--no-mean needs --cache turbo"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 3000], "exceed the 512 positions"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_generate_mistakes(checkpoint, argv, message, capsys):
    assert message in _fails(capsys, "generate", "--model", checkpoint, *argv)


def test_generate_finds_a_wrong_isa_before_it_begins(checkpoint):
    environment = {**os.environ, "KVCORE_CPU_ISA": "mmx"}
    command = [sys.executable, "-m", "kvcore", "generate", "--model", checkpoint, "--prompt", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kvcore generate: KVCORE_CPU_ISA must be one of scalar")
    assert done.stderr.count("\n") == 1


def test_unknown_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = _fails(capsys, "generate", "--model", "/no/such", "--prompt", "x")
    assert line == "kvcore generate: there is no folder /no/such"
    line = _fails(capsys, "generate", "--model", str(tmp_path), "--prompt", "x")
    assert "no config.json in" in line
    line = _fails(capsys, "generate", "--model", "no-such-model", "--prompt", "x")
    assert "model must be hybrid, control, a folder with a checkpoint" in line
    assert "got 'no-such-model'" in line


def test_without_transformers(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    line = _fails(capsys, "generate", "--model", "hybrid", "--prompt", "x")
    assert "this command needs transformers" in line


# ---- text and sizes


@pytest.mark.parametrize("text", [TEXT, "", "\n\n", "😀", "a\r\n\tb"])
def test_streamed_text_is_whole(checkpoint, text):
    loaded = textmodel.load(checkpoint)
    assert loaded.decode(loaded.encode(text)[0].tolist()) == text
    byte_model = textmodel.ByteDecoder()
    pieces = [byte_model.push(byte) for byte in text.encode()]
    assert "".join(pieces) + byte_model.finish() == text


def test_byte_decoder_holds_back_and_shows_symbols():
    decoder = textmodel.ByteDecoder()
    first, *rest = "é".encode()
    assert decoder.push(first) == ""
    assert decoder.push(rest[0]) == "é"
    assert decoder.push(256 + 12) == "<k12>"
    assert decoder.push(first) == ""
    assert decoder.push(256 + 64 + 3) == "\ufffd<v3>"
    assert decoder.push(first) == ""
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        transformers.Qwen3Config(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            use_sliding_window=True,
            sliding_window=20,
            max_window_layers=1,
        ),
    ],
    ids=["llama", "sliding"],
)
def test_bytes_16bit(config):
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        for part in torch.ones(1, 30, dtype=torch.int64).split(1, dim=1):
            model(part, past_key_values=cache)
    held = sum(t.numel() * 2 for layer in cache.layers for t in (layer.keys, layer.values))
    assert bytes_16bit(config, 30) == held


def test_generate_rejects_and_counts(checkpoint):
    loaded = textmodel.load(checkpoint)
    full = CacheChoice("full")
    with pytest.raises(ValueError, match=r"prompt must have shape \[1, tokens\], got \[3\]"):
        generate(loaded.model, torch.arange(3), full, max_new_tokens=1)
    result = generate(loaded.model, loaded.encode(TEXT), full, max_new_tokens=5, stop_at_eos=False)
    assert len(result.tokens) == 5
    # The last token is not fed back, so the cache does not hold it.
    assert result.cache.get_seq_length() == result.prompt_len + 4
    assert result.bytes.kv == 2 * result.bytes_16bit
    assert result.tokens_per_second > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "x"}, "cache must be one of"),
        ({"k_bits": 5}, "k_bits must be 8, 4 or 2, got 5"),
        ({"v_bits": (8, 3)}, "v_bits must be 8, 4 or 2, got 3"),
        ({"sink_pages": -2}, r"sink_pages must be an int in \[0, 2\^31\), got -2"),
        ({"encode_tokens": 0}, r"encode_tokens must be an int in \[1, 4096\], got 0"),
        ({"low_bit_heads": 1.5}, r"low_bit_heads must be in \[0, 1\], got 1.5"),
    ],
)
def test_cache_choice_rejects(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CacheChoice(**kwargs)


def test_other_commands_take_no_unknown_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--family", "turbo"])
    assert "unrecognized arguments: --family turbo" in capsys.readouterr().err

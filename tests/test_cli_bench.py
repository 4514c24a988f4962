"""`kvcore bench`: which script it runs, and what it passes on."""

import pytest

import kvcore
from kvcore import cli


@pytest.fixture
def bench_folder(tmp_path):
    """A checkout whose benchmark prints its arguments."""
    script = tmp_path / "bench" / "run.py"
    script.parent.mkdir()
    script.write_text("import sys; print(*sys.argv[1:]); sys.exit(3)")
    return tmp_path


def test_bench_runs_the_script_of_a_checkout(bench_folder, capfd):
    options = ["--family", "turbo", "--rounds", "2", "--quick"]
    assert cli.main(["bench", "--checkout", str(bench_folder), *options]) == 3
    assert capfd.readouterr().out == "--family turbo --rounds 2 --quick\n"


@pytest.mark.parametrize("name", ["report", "compare", "ab"])
def test_bench_runs_what_its_first_word_names(bench_folder, capfd, name):
    script = bench_folder / "bench" / f"{name}.py"
    script.write_text("import sys; print(*sys.argv[1:]); sys.exit(4)")
    assert cli.main(["bench", "--checkout", str(bench_folder), name, "--check", "a", "b"]) == 4
    assert capfd.readouterr().out == "--check a b\n"


def test_bench_finds_the_checkout_that_it_belongs_to(monkeypatch, bench_folder, capfd):
    monkeypatch.setattr(kvcore, "__file__", str(bench_folder / "python" / "kvcore" / "__init__.py"))
    assert cli.main(["bench"]) == 3


def test_bench_says_where_the_benchmarks_are(tmp_path, capsys):
    assert cli.main(["bench", "--checkout", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"kvcore bench: there is no bench/run.py in {tmp_path}: " in error
    assert "in a clone of the repository" in error


def test_an_installed_package_runs_the_benchmarks_of_the_clone_it_is_run_in(
    monkeypatch, bench_folder, tmp_path, capsys
):
    installed = tmp_path / "lib" / "site-packages" / "kvcore"
    monkeypatch.setattr(kvcore, "__file__", str(installed / "__init__.py"))
    monkeypatch.chdir(bench_folder)
    assert cli.main(["bench"]) == 2  # the folder of some other project
    assert f"there is no bench/run.py in {tmp_path / 'lib'}: " in capsys.readouterr().err
    (bench_folder / "python" / "kvcore").mkdir(parents=True)
    assert cli.main(["bench"]) == 3


def test_bench_of_this_checkout_knows_its_families(capfd):
    assert cli.main(["bench", "--family", "nonsense"]) == 2
    assert "--family" in capfd.readouterr().err

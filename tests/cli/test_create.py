"""``create``: what it prints, refuses and leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from byre.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


DEFAULTS = "cluster_size=65536 extended_l2=off compression_type=zlib"

# Arguments and the line that release 10 of the peer prints.
LINES = {
    "-f qcow2 x 1M": f"'x', fmt=qcow2 {DEFAULTS} size=1048576 lazy_refcounts=off refcount_bits=16",
    "x 1.5k": "'x', fmt=raw size=1536",
    "-o size=1M,nocow=off,preallocation=off,extent_size_hint=0 x":
        "'x', fmt=raw size=1048576 nocow=off preallocation=off extent_size_hint=0",
    "-f raw -f qcow2 -o cluster_size=4k -o lazy_refcounts,cluster_size=8k x 128M":
        "'x', fmt=qcow2 cluster_size=8192 extended_l2=off compression_type=zlib size=134217728 lazy_refcounts=on "
        "refcount_bits=16",
    "-f qcow2 -b base -F raw x":
        f"'x', fmt=qcow2 {DEFAULTS} size=1048576 backing_file=base backing_fmt=raw lazy_refcounts=off refcount_bits=16",
    "-f qcow2 -u -b a,b -F raw x 2M":
        f"'x', fmt=qcow2 {DEFAULTS} size=2097152 backing_file=a,,b backing_fmt=raw lazy_refcounts=off "
        "refcount_bits=16",
    "-f qcow2 -o compat=v3,preallocation=metadata,data_file=d,data_file_raw=on,refcount_bits=8 x 1M":
        "'x', fmt=qcow2 cluster_size=65536 extended_l2=off preallocation=metadata compression_type=zlib size=1048576 "
        "compat=v3 data_file=d data_file_raw=on lazy_refcounts=off refcount_bits=8",
    "-f qcow2 -o compat=0.10 x 0": f"'x', fmt=qcow2 {DEFAULTS} size=0 compat=0.10 lazy_refcounts=off refcount_bits=16",
}  # fmt: skip


@pytest.mark.parametrize("arguments", LINES)
def test_the_line_it_prints(arguments: str, capsys: Output) -> None:
    Path("base").write_bytes(bytes(1 << 20))
    assert main(["create", *arguments.split()]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"Formatting {LINES[arguments]}\n"
    assert captured.err == ""
    assert os.path.exists("x")


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", LINES)
def test_the_peer_prints_the_same(arguments: str, qemu_img: object) -> None:
    Path("base").write_bytes(bytes(1 << 20))
    done = qemu_img("create", *arguments.split())  # type: ignore[operator]
    assert done.stdout == f"Formatting {LINES[arguments]}\n"


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", LINES)
def test_the_peer_finds_no_fault(arguments: str, qemu_img: object) -> None:
    Path("base").write_bytes(bytes(1 << 20))
    assert main(["create", "-q", *arguments.split()]) == 0
    if "qcow2" in arguments and "-u" not in arguments:
        qemu_img("check", "-f", "qcow2", "x")  # type: ignore[operator]


def test_quiet(capsys: Output) -> None:
    assert main(["create", "-q", "x", "1M"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("x", "needs a size"),
        ("x 1M y", "unexpected argument: y"),
        ("x 1Q", "invalid image size"),
        ("x -- -1024", "must be between 0 and 9223372036854775807"),
        ("-o size=1M x 1M", "only once"),
        ("-f nonsense x 1M", "unknown driver 'nonsense'"),
        ("-f file x 1M", "cannot create images"),
        ("-f qcow2 -o cluster_size=1000 x 1M", "1000"),
        ("-f qcow2 -o nonsense=1 x 1M", "has no option 'nonsense'"),
        ("-f qcow2 -o lazy_refcounts=maybe x 1M", "maybe"),
        ("-f qcow2 -o size=foobar x", "foobar"),
        ("-f qcow2 -o , x 1M", "invalid option list: ,"),
        ("-f qcow2 -b x -F qcow2 x 1M", "same name"),
        ("-f qcow2 -o backing_file= x 1M", "empty"),
        ("-f qcow2 -u -b base -F qcow2 x", "needs a size"),
        ("-f qcow2 -b base x", "without its format"),
        ("-f qcow2 -u -b base x 1M", "without its format"),
        ("-f qcow2 -b missing -F raw x", "missing"),
        ("-f raw -b base -F raw x", "backing file not supported"),
        ("nonsense:x 1M", "unknown protocol 'nonsense'"),
        ("null-co:// 1M", "cannot create images"),
        ("missing/x 1M", "No such file"),
    ],
)
def test_refusals_leave_nothing_behind(arguments: str, part: str, capsys: Output) -> None:
    Path("base").write_bytes(bytes(1 << 20))
    assert main(["create", *arguments.split()]) == 1
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert os.listdir(".") == ["base"]


def test_words_are_judged_after_the_line_is_printed(capsys: Output) -> None:
    assert main(["create", "-f", "qcow2", "-o", "compat=0.42", "x", "64M"]) == 1
    captured = capsys.readouterr()
    assert captured.out == (
        f"Formatting 'x', fmt=qcow2 {DEFAULTS} size=67108864 compat=0.42 lazy_refcounts=off refcount_bits=16\n"
    )
    assert "0.42" in captured.err
    assert not os.path.exists("x")


def test_bad_numbers_are_explained_as_the_peer_does(capsys: Output) -> None:
    assert main(["create", "x", "foobar"], "qemu-img") == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert main(["create", "-f", "qcow2", "-o", "size=foobar", "x"], "qemu-img") == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
        "and exabytes, respectively.",
    ]


class TestOptionHelp:
    def test_with_a_target(self, capsys: Output) -> None:
        assert main(["create", "-f", "qcow2", "-o", "cluster_size=4k,help", "x", "1M"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Supported options:"
        assert "  cluster_size=<size>    - qcow2 cluster size" in lines
        assert "  compression_type=<str> - Compression method used for image cluster compression" in lines
        assert "  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image" in lines
        assert "  refcount_bits=<num>    - Width of a reference count entry in bits" in lines
        assert "  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)" in lines
        assert lines[1:] == sorted(lines[1:])
        assert os.listdir(".") == []

    @pytest.mark.parametrize(("format", "some"), [("qcow2", "preallocation"), ("raw", "size")])
    def test_without_a_target_the_options_of_files_are_left_out(self, capsys: Output, format: str, some: str) -> None:
        assert main(["create", "-f", format, "-o", "help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"Supported {format} options:"
        assert lines[-2:] == ["The protocol level may support further options.",
                              "Specify the target filename to include those options."]  # fmt: skip
        assert any(line.startswith(f"  {some}=") for line in lines)
        assert not any(line.startswith("  nocow=") for line in lines)

    def test_a_file_may_be_called_help(self) -> None:
        Path("x,help").write_bytes(bytes(1 << 20))
        assert main(["create", "-f", "qcow2", "-o", "backing_file=x,,help,backing_fmt=raw", "y"]) == 0
        assert os.path.exists("y")


def test_an_existing_file_survives_a_refusal(capsys: Output) -> None:
    Path("x").write_bytes(b"precious")
    assert main(["create", "-f", "qcow2", "-o", "cluster_size=3", "x", "1M"]) == 1
    assert Path("x").read_bytes() == b"precious"

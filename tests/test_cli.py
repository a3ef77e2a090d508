"""Every command: what it prints, its JSON, its exit status, and one line for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rpcompile.cli import main
from rpcompile.plan import Plan
from tests.chains import chain, partition
from tests.test_plan import plan_of

ROOT = Path(__file__).parents[1]
COMMANDS = [
    *("plan", "fit", "show", "verify", "diff", "trace", "report", "plot", "export", "explain"),
    *("simulate", "compare", "probe", "profile", "train", "doctor"),
]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))).sum()


def make():
    return Net(), {"x": torch.zeros(2, 4)}


def without_inputs():
    return Net()


def broken():
    raise RuntimeError("no luck")


def number():
    return 5


def leaves():
    raise SystemExit(7)


def misfit():
    return Net(), {"y": torch.zeros(2, 4)}


def wrong_size():
    return Net(), {"x": torch.zeros(2, 5)}
"""


def profile() -> dict[str, Any]:
    segment = {"forward_s": 0.01, "backward_s": 0.02, "weight_bytes": 10**8, "gradient_bytes": 10**8}
    sizes = {"boundary_bytes": 10**7, "saved_bytes": 10**8}
    segments = [{"name": f"layers.{index}", **segment, **sizes} for index in range(5)]
    segments.append({"name": "head", **segment, **sizes, "boundary_bytes": 0})
    return {
        "format": "rpcompile.profile",
        "version": 1,
        "hardware": "rtx4090",
        "tokens_per_microbatch": 1024,
        "segments": segments,
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile, a plan of it, a model's configuration, a factory, and broken files."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "profile.json").write_text(json.dumps(profile()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "net.py").write_text(FACTORY)
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "text.txt").write_text("some words " * 3)
    (folder / "unknown.yaml").write_text("model: x\ntext: y\nstep: 3\n")
    (folder / "list.yaml").write_text("- a\n")
    plan_of((chain(3), partition("F0-1", "FB2-2", "B0-1"), 2, 2, "sync")).save(folder / "plan.json")
    apart = plan_of((chain(3), partition("F0-1", "FB2-2", "B1-1", "B0-0"), 2, 2, "sync"))
    apart.save(folder / "apart.json")
    content = json.loads((folder / "plan.json").read_text())
    queues = content["plan"]["schedule"]["queues"]
    queues[0]["actions"] = queues[0]["actions"][1:]
    (folder / "unsound.json").write_text(json.dumps(content))
    content["version"] = 99
    (folder / "newer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command in that folder: (status, standard output, standard error)."""
    monkeypatch.chdir(files)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# ------------------------------------------------------------------- help


def test_help_of_everything_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom rpcompile.cli import main\n"
        f"for command in {COMMANDS!r}:\n    assert main([command, '--help']) == 0, command\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'ortools', 'transformers', 'numba', 'bokeh', 'matplotlib', 'networkx', 'sympy'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    for command in COMMANDS:
        assert f"Usage: rpcompile {command} " in done.stdout
    assert done.stdout.count("--json") == len(COMMANDS)


def test_every_command_is_listed(run: Any) -> None:
    status, out, _ = run("--help")
    assert status == 0
    listed = [
        line.split()[0]
        for line in out.split("Commands:")[1].splitlines()
        if line.startswith("  ") and line[2] != " "
    ]
    assert sorted(listed) == sorted(COMMANDS)
    assert run("--version")[1].startswith("rpcompile 0.")


def test_python_m_rpcompile() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpcompile", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "rpcompile")


# ------------------------------------------------------------------- planning


def test_plan_of_a_profile(run: Any, files: Path) -> None:
    flags = ["--profile", "profile.json", "--gpus", "2", "--microbatches", "4", "--solver-time", "0.2"]
    status, out, err = run("plan", *flags, "--out", "made.json")
    assert (status, err) == (0, "")
    assert "Saved to made.json" in out
    plan = Plan.load(files / "made.json")
    assert (plan.gpus, plan.microbatches, plan.model_name) == (2, 4, "profile")
    status, out, _ = run("plan", *flags, "--json")
    found = json.loads(out)
    assert found["source"] == "simulated"
    assert [name for stage in found["stages"] if stage["kind"] != "B" for name in stage["segments"]] == [
        *(f"layers.{index}" for index in range(5)),
        "head",
    ]
    assert found["prediction"]["iteration_s"] >= found["solver"]["bound_s"] > 0


@pytest.mark.parametrize(
    ("model", "options", "microbatch"),
    [
        ("config.json", ["--batch", "8", "--seq", "16", "--microbatches", "4"], {"batch": 2, "sequence": 16}),
        (".", ["--batch", "8", "--microbatches", "4", "--lora", "2"], {"batch": 2, "sequence": 64}),
        ("net.py:make", ["--batch", "6", "--gpus", "1"], {"batch": 3}),
    ],
)
def test_plan_of_a_model(run: Any, model: str, options: list[str], microbatch: dict[str, int]) -> None:
    status, out, err = run("plan", model, "--gpus", "2", "--solver-time", "0.2", *options, "--json")
    assert status == 0, err
    assert json.loads(out)["sizes"] == microbatch


def test_a_lora_plan_trains_only_the_adapters(run: Any) -> None:
    status, out, err = run(
        "profile", "config.json", "--lora", "2", "--out", "lora.json", "--costs", "costs.json"
    )
    assert status == 0, err
    segments = json.loads(Path("lora.json").read_text())["segments"]
    assert 0 < sum(s["gradient_bytes"] for s in segments) < 0.3 * sum(s["weight_bytes"] for s in segments)
    assert json.loads(Path("costs.json").read_text())["format"] == "rpcompile.costs"
    status, out, _ = run("plan", "--profile", "lora.json", "--gpus", "2", "--solver-time", "0.2", "--json")
    assert (status, json.loads(out)["model"]) == (0, "lora")


def test_fit_finds_the_largest_that_can_be_planned(run: Any) -> None:
    status, out, err = run("fit", "config.json", "--seq", "16", "--gpus", "2", "--host-gb", "0.01", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["asked"] == "batch"
    assert found["size"] > 0
    assert found["host_bytes"] <= found["host_limit_bytes"] == 10**7
    assert "the host: weights, gradients, boundaries and AdamW's state need" in found["binds"]


def test_fit_says_when_nothing_fits(run: Any) -> None:
    status, out, _ = run("fit", "config.json", "--batch", "1", "--gpus", "2", "--host-gb", "0.00001")
    assert status == 1
    assert "Not even sequence 1 fits: at sequence 1 the host" in out


def test_lists(run: Any) -> None:
    found = json.loads(run("plan", "--list", "--json")[1])
    assert "qwen3-235b-a22b" in found["models"]
    assert "rtx4090" in found["gpus"]


# ------------------------------------------------------------------- reading plans


def test_show(run: Any) -> None:
    status, out, _ = run("show", "plan.json")
    assert status == 0
    assert "Plan " in out
    assert "Memory     peak of each GPU" in out
    assert "no schedule of these stages" in out
    found = json.loads(run("show", "plan.json", "--json")[1])
    assert [stage["kind"] for stage in found["stages"]] == ["F", "FB", "B"]
    assert found["stages"][0]["jobs"] == [
        {"index": 0, "gpu": 0, "round": 0, "replica": 0, "microbatches": [0, 1]}
    ]


def test_verify(run: Any) -> None:
    status, out, _ = run("verify", "plan.json")
    assert (status, "actions hold" in out) == (0, True)
    status, out, _ = run("verify", "unsound.json", "--json")
    found = json.loads(out)
    assert (status, found["holds"]) == (1, False)
    assert "0F0" in found["problem"] or "segment 0" in found["problem"]


def test_diff(run: Any, files: Path) -> None:
    assert run("diff", "plan.json", "plan.json")[:2] == (0, "the plans are the same\n")
    plan_of((chain(3), partition("F0-0", "FB1-2", "B0-0"), 2, 4, "sync")).save(files / "other.json")
    status, out, _ = run("diff", "plan.json", "other.json", "--json")
    rows = {row["what"]: (row["left"], row["right"]) for row in json.loads(out)["differences"]}
    assert status == 1
    assert rows["microbatches"] == ("2", "4")
    assert rows["stage 0"] == ("F 0..1 on 0", "F 0..0 on 0")
    assert rows["stage 1"] == ("FB 2..2 on 1", "FB 1..2 on 1")
    assert {"iteration", "stage 2"} <= rows.keys()
    assert "model" not in rows


def test_trace_plot_and_export(run: Any, files: Path) -> None:
    assert run("trace", "plan.json", "--out", "trace.json")[0] == 0
    assert json.loads((files / "trace.json").read_text())["traceEvents"]
    for name, start in (("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml"), ("plan.pdf", b"%PDF")):
        assert run("plot", "plan.json", "--out", name)[0] == 0
        assert (files / name).read_bytes().startswith(start)
    assert run("export", "plan.json", "--policy", "1f1b", "--out", "actions.csv")[0] == 0
    assert (files / "actions.csv").read_text() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    status, out, _ = run("export", "plan.json", "--out", "schedule.py", "--json")
    assert (status, json.loads(out)["bytes"]) == (0, (files / "schedule.py").stat().st_size)


def test_explain(run: Any) -> None:
    status, out, _ = run("explain", "plan.json")
    assert status == 0
    assert "What would help" in out
    assert len(json.loads(run("explain", "plan.json", "--json")[1])["stages"]) == 3


# ------------------------------------------------------------------- measuring, doctor


def test_probe_writes_a_file_that_plan_takes(run: Any) -> None:
    status, out, err = run("probe", "--seconds", "0.01", "--out", "here.json", "--json")
    assert status == 0, err
    assert json.loads(out)["flops_per_s"] > 0
    status, _, err = run(
        "plan", "--profile", "profile.json", "--gpu", "here.json", "--gpus", "2", "--solver-time", "0.1"
    )
    assert status == 0, err


def test_doctor(run: Any) -> None:
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["versions"]["torch"]
    assert found["host"]["memory_bytes"] > 0
    assert bool(found["gpus"]) or any("no CUDA device" in problem for problem in found["problems"])


# ------------------------------------------------------------------- bad input

BAD = [
    (["plan"], "give a MODEL or --profile FILE, one of them"),
    (["plan", "qwen3-8b", "--profile", "profile.json"], "one of them"),
    (["plan", "qwen3-9b"], "did you mean qwen3-8b"),
    (["plan", "nothing-like-it"], "built-in names are smollm2-135m"),
    (["plan", "missing.py:make"], "model file missing.py does not exist"),
    (["plan", "no_such_module:make"], "ModuleNotFoundError: No module named 'no_such_module'"),
    (["plan", "net.py:other"], "has no function 'other'"),
    (["plan", "net.py:broken"], "RuntimeError: no luck"),
    (["plan", "net.py:leaves"], "net.py:leaves: SystemExit: 7"),
    (["plan", "net.py:misfit"], "The example inputs are y, but forward takes (x): missing a required"),
    (["plan", "net.py:wrong_size"], "If the module runs on these inputs"),
    (["plan", "net.py:number"], "returns a int; it must return an nn.Module"),
    (["plan", "net.py:without_inputs"], "the inputs of Net cannot be inferred"),
    (["plan", "broken.json"], "is no JSON"),
    (["plan", "list.json"], 'has no "model_type"'),
    (["plan", "config.json", "--dtype", "int7"], "dtype 'int7'; choose one of bfloat16"),
    (
        ["plan", "config.json", "--batch", "7", "--microbatches", "2"],
        "--batch 7 does not divide into --microbatches 2",
    ),
    (["plan", "config.json", "--gpu", "rtx409"], "did you mean rtx4090"),
    (["plan", "config.json", "--mode", "warp"], "mode"),
    (["plan", "config.json", "--gpus", "0"], "--gpus"),
    (["plan", "config.json", "--gpus", "many"], "--gpus"),
    (["plan", "config.json", "--batch", "-1"], "--batch"),
    (["plan", "config.json", "--seq", "0"], "--seq"),
    (["plan", "config.json", "--effort", "default"], "--effort 'default'; choose none, fast"),
    (["plan", "config.json", "--gpus", "64", "--effort", "none"], "gpus=64 is more than the"),
    (["plan", "--profile", "missing.json"], "missing.json: cannot be read"),
    (["plan", "--profile", "plan.json"], "is no profile"),
    (["plan", "--profile", "broken.json"], "is no JSON"),
    (["plan", "--profile", "profile.json", "--batch", "4"], "a profile is for one size of microbatch"),
    (["plan", "--profile", "profile.json", "--gpu", "nope"], "hardware 'nope' is not in the catalogue"),
    (
        ["plan", "--profile", "profile.json", "--out", "plan.json/x.json", "--gpus", "2"],
        "cannot write the plan",
    ),
    (["fit", "config.json"], "give --seq to find the largest microbatch"),
    (["fit", "config.json", "--seq", "8", "--batch", "8"], "give --seq"),
    (["fit", "net.py:make", "--batch", "8", "--gpus", "1"], "the model has no size 'sequence'; it has batch"),
    (["show"], "Missing argument"),
    (["show", "missing.json"], "missing.json: cannot read the plan: No such file"),
    (["show", "broken.json"], "is no plan file"),
    (["show", "profile.json"], "is no plan file: its format is 'rpcompile.profile'"),
    (["show", "newer.json"], "was made by a newer rpcompile: its version is 99"),
    (["verify", "missing.json"], "cannot read the plan"),
    (["explain", "list.json"], "is no plan file"),
    (["diff", "plan.json"], "Missing argument"),
    (["diff", "plan.json", "missing.json"], "missing.json: cannot read the plan"),
    (["trace", "plan.json", "--out", "plan.json/trace.json"], "plan.json: "),
    (["report", "missing.json"], "cannot read the plan"),
    (["report", "plan.json", "--out", "plan.json/report.html"], "cannot write the report"),
    (["plot", "plan.json", "--out", "plan.gif"], "plan.gif: end it in .png, .svg, .pdf"),
    (["export", "plan.json", "--out", "plan.txt"], "end it in .py (readable Python) or .csv"),
    (["export", "apart.json", "--out", "plan.csv"], "torch.distributed.pipelining cuts both alike"),
    (["simulate"], "give a PLAN or --profile FILE"),
    (["simulate", "plan.json", "--policy", "gpip"], "policy 'gpip' is unknown; did you mean gpipe?"),
    (["simulate", "plan.json", "--gpus", "3"], "need --policy or --profile"),
    (["simulate", "--profile", "profile.json", "--partition", "1,x"], "'1,x' is no list of counts"),
    (
        ["simulate", "--profile", "profile.json", "--partition", "2,2|0,2"],
        "have 4 segments; besides the last one, the chain has 5",
    ),
    (["simulate", "plan.json", "--semantics", "strict"], "--semantics strict needs --policy"),
    (
        ["simulate", "plan.json", "--policy", "gpipe", "--semantics", "loose"],
        "semantics is 'loose'; choose one of full, strict, published",
    ),
    (["simulate", "--profile", "profile.json", "--gpus", "65"], "less than or equal to 64"),
    (["simulate", "--profile", "profile.json", "--microbatches", "4097"], "less than or equal to 4096"),
    (["compare", "missing.json"], "cannot read the plan"),
    (["compare"], "give a PLAN or --profile FILE"),
    (["probe", "--out", "here.txt"], "a hardware file ends in .json"),
    (["probe", "--like", "rtx409"], "did you mean rtx4090"),
    (["probe", "--seconds", "0"], "--seconds"),
    (["profile", "net.py:make", "--measure", "--device", "gpu"], "device 'gpu' is unknown; use cpu or cuda:"),
    (["profile", "net.py:make", "--measure", "--device", "cuda:99"], "device 'cuda:99' is not here"),
    (["profile", "net.py:make", "--measure", "--device", "mps"], "device 'mps' cannot be measured"),
    (["profile", "missing"], "model 'missing' is no file"),
    (["profile", "config.json", "--out", "plan.json/p.json"], "cannot be written"),
    (["train"], "training needs 'model'"),
    (["train", "missing.yaml"], "configuration missing.yaml cannot be read"),
    (["train", "list.yaml"], "holds no `name: value` lines"),
    (["train", "unknown.yaml"], "training option 'step' is unknown; did you mean 'steps'?"),
    (["train", "--model", "qwen3-8b", "--text", "text.txt"], "its weights are not here"),
    (["train", "--model", "smollm2-135m", "--text", "missing.txt"], "text missing.txt cannot be read"),
    (["train", "--model", "nowhere", "--text", "text.txt"], "there is no such folder"),
    (["train", "--model", ".", "--text", "text.txt"], "model . cannot be loaded"),
    (
        ["train", "--model", "x", "--text", "y", "--batch", "3", "--microbatches", "2"],
        "batch 3 is no multiple",
    ),
    (["trace", "plan.json", "--out", "."], "rpcompile: .: Is a directory"),
    (["trace", "plan.json", "--out", "/dev/null/x.json"], "/dev/null"),
    (["export", "plan.json", "--out", "x.csv", "--policy", "gpip"], "did you mean gpipe?"),
    (["export", "apart.json", "--out", "x.csv"], "Use the plan under policy gpipe, 1f1b"),
    (["doctor", "--far"], "No such option"),
    (["plam"], "No such command 'plam'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_status_2(run: Any, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert message in err
    assert (status, out) == (2, "")
    assert err.startswith("rpcompile: ")
    assert err.count("\n") == 1


def test_every_command_with_input_has_bad_input_above() -> None:
    assert {arguments[0] for arguments, _ in BAD} >= set(COMMANDS)


def test_debug_shows_where_an_error_is_from(run: Any) -> None:
    status, _, err = run("show", "missing.json", "--debug")
    assert status == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("rpcompile: missing.json")


def test_ctrl_c_ends_cleanly(files: Path) -> None:
    flags = ["plan", "--profile", "profile.json", "--gpus", "2"]
    program = (
        "import sys, rpcompile.chain_planner\nfrom rpcompile.cli import main\n"
        "def slow(*arguments):\n    print('planning', flush=True)\n    import time; time.sleep(60)\n"
        "rpcompile.chain_planner.plan_profile = slow\n"
        f"sys.exit(main({flags!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "planning\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "Interrupted.\n")


def test_terminals_without_unicode_get_question_marks(files: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpcompile", "show", "plan.json"],
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert " ? sync\n" in done.stdout


def test_output_into_a_closed_pipe_is_no_error(files: Path) -> None:
    shell = f"{sys.executable} -m rpcompile show plan.json | head -1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell], cwd=files, env=environment, capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")

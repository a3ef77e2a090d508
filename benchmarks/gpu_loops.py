"""One training loop in a process of its own, which does what `gpu_bench.py` tells it to.

Processes keep the loops apart: RoundPipe ends its process when one of its threads fails, running out of host
memory kills one, and a CUDA error spoils one. The loops' weights and batch are the same, so their losses
can be compared. Settings come as JSON in the first argument, commands as lines of standard input ("turn",
"predict", "waits"); each is answered with a line of JSON, {"found": ...} or {"error": ...}, as is the start.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import rpcompile
from rpcompile.hardware import lookup
from rpcompile.ir import Hardware, Stream
from rpcompile.probe import probe
from rpcompile.simulate import Timeline, measured, simulate
from rpcompile.trace import Run, write_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "Qwen3-1.7B": dict(zip(_KEYS, (2048, 6144, 28, 16), strict=True)),
    "Qwen3-8B": dict(zip(_KEYS, (4096, 12288, 36, 32), strict=True)),
    "tiny": dict(zip(_KEYS, (32, 64, 3, 4), strict=True)),
}
TIED = ("Qwen3-1.7B", "tiny")
RESERVE_BYTES = 3 * 2**29  # of the cap, for what is not in the plan


@dataclass(frozen=True)
class Settings:
    """What a loop needs to know.

    Attributes:
        loop: A key of `LOOPS`.
        model: A key of `SHAPES`.
        sequence: Tokens of a row.
        microbatches: Rows of the batch, one a microbatch.
        gpus: Logical GPUs, which share the devices there are.
        device: "cuda"; "cpu" tries the script out where there is no GPU.
        cap_bytes: Memory of a GPU that may be used.
        effort: As for `rpcompile.compile`.
        folder: Where traces go.
    """

    loop: str
    model: str
    sequence: int
    microbatches: int
    gpus: int
    device: str
    cap_bytes: int
    effort: str | None
    folder: str

    def batch(self) -> dict[str, torch.Tensor]:
        """Random tokens, the same in every loop; shape (microbatches, sequence)."""
        vocabulary = 151_936 if self.model != "tiny" else 128
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, vocabulary, (self.microbatches, self.sequence), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


def qwen3(name: str, layers: int | None = None) -> Any:
    """The model in bfloat16, with all its layers or a few of them.

    Weights repeat one block of random numbers, which takes seconds, not minutes.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151_936 if name != "tiny" else 128,
        num_key_value_heads=8 if name != "tiny" else 2,
        head_dim=128 if name != "tiny" else 8,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        tie_word_embeddings=name in TIED,
        use_cache=False,
        dtype=torch.bfloat16,
        **SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers}),
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.fill_(1)
                continue
            for piece in parameter.view(-1).split(block.numel()):
                piece.copy_(block[: piece.numel()])
    return model.train()


# ------------------------------------------------------------------- the loops


class RpcompileLoop:
    """Plans with times measured on the device; forward and backward, gradients on the host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._model, self._batch = qwen3(settings.model), settings.batch()
        cuda = settings.device == "cuda"
        count = torch.cuda.device_count() if cuda else 1
        self._devices = [f"cuda:{i % count}" if cuda else "cpu" for i in range(settings.gpus)]
        self.hardware = capped(probe(seconds=0.3).hardware if cuda else lookup("rtx4090"), settings.cap_bytes)
        self._compiled = rpcompile.compile(
            self._model,
            settings.gpus,
            example_inputs=self._batch,
            microbatches=settings.microbatches,
            gpu=self.hardware,
            devices=self._devices,
            seconds="measured",
            effort=settings.effort,
            progress=False,
        )

    def facts(self) -> dict[str, Any]:
        return {"hardware": asdict(self.hardware), "plan": str(self._compiled.plan).splitlines()[:5]}

    def run(self) -> float:
        loss = self._compiled.forward_backward(**self._batch)
        self._model.zero_grad()
        return float(loss)

    def predict(self) -> dict[str, Any]:
        """One recorded run against what the plan said, and both traces in one file."""
        self.run()
        clean_up(self._settings)
        before = memory(self._settings, "allocated")
        engine = self._compiled._training.engine
        engine.record_times = True
        self.run()
        engine.record_times = False
        plan = self._compiled.plan
        recorded = measured(plan.schedule, engine.times)
        path = Path(self._settings.folder) / f"gpu_bench_{self._settings.model}.trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_trace(plan.schedule, simulate(plan.schedule), path, Run(plan.schedule, recorded, "measured"))
        peaks = memory(self._settings, "allocated", most=True)
        return {
            "predicted_s": plan.prediction.iteration_s,
            "recorded_s": recorded.makespan_s,
            "predicted_peak_bytes": self._by_device(plan.prediction.gpu_peak_bytes),
            "measured_peak_bytes": [peak - start for peak, start in zip(peaks, before, strict=True)],
            "hidden_transfer_share": hidden_share(self._compiled.plan, recorded),
            "trace": path.name,
        }

    def _by_device(self, peaks: Sequence[int]) -> list[int]:
        """The peaks of logical GPUs that share a device, added up: what it needs at most."""
        devices = self._devices
        return [
            sum(peak for peak, device in zip(peaks, devices, strict=True) if device == one)
            for one in dict.fromkeys(devices)
        ]

    def waits(self) -> dict[str, Any]:
        """A run in which any wait of the host for the device is an error."""
        if self._settings.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.run()
        finally:
            if self._settings.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return {"host_waits": 0}


class RoundPipeLoop:
    """RoundPipe's `forward_backward` on the model as the sequence of layers that it asks for.

    Its own preset for Qwen3 (0.1.1) is for transformers 4. A run ends when the gradients are on the host, and
    takes them out of RoundPipe's way as its `step` does; its `synchronize` would copy them once more.
    """

    def __init__(self, settings: Settings) -> None:
        import roundpipe  # type: ignore[import-not-found]

        self._model, self._batch = qwen3(settings.model), settings.batch()
        self._microbatches = settings.microbatches
        self._wrapped = roundpipe.RoundPipe(
            as_sequence(self._model),
            model_run_config=roundpipe.RoundPipeRunConfig(num_microbatch=settings.microbatches),
        )

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"roundpipe": version("roundpipe")}

    def run(self) -> float:
        loss = self._wrapped.forward_backward(
            input_kwargs=self._batch, loss_fn=lambda loss, _: loss / self._microbatches
        )
        for layer in self._wrapped.layer_attrs:
            layer.grad_download_started.wait()
            layer.grad_downloaded.synchronize()
        for parameter in self._model.parameters():
            attribute: Any = parameter.roundpipe_param_attr  # type: ignore[attr-defined]
            for layer, gradient in attribute.grad_cpu.items():
                attribute.grad_buffer[layer], attribute.grad_cpu[layer] = gradient, None
        return float(loss)


class ResidentLoop:
    """Plain PyTorch, everything on the first GPU; with or without recompute of each layer."""

    def __init__(self, settings: Settings) -> None:
        self._device, self._microbatches = settings.device, settings.microbatches
        self._batch = settings.batch()
        self._model = qwen3(settings.model)
        if settings.device == "cuda" and 2 * self._model.num_parameters() * 2 > settings.cap_bytes:
            raise MemoryError("weights and gradients alone are more than the GPU's memory")
        self._model.to(settings.device)
        if settings.loop == "resident, recompute":
            self._model.gradient_checkpointing_enable({"use_reentrant": False})

    def facts(self) -> dict[str, Any]:
        return {}

    def run(self) -> float:
        total = torch.zeros((), device=self._device)
        parts = zip(*(value.chunk(self._microbatches) for value in self._batch.values()), strict=True)
        for part in parts:
            moved = {name: value.to(self._device) for name, value in zip(self._batch, part, strict=True)}
            loss = self._model(**moved).loss / self._microbatches
            loss.backward()
            total += loss.detach()
        self._model.zero_grad()
        return float(total)


LOOPS: dict[str, Callable[[Settings], Any]] = {
    "rpcompile": RpcompileLoop,
    "roundpipe": RoundPipeLoop,
    "resident": ResidentLoop,
    "resident, recompute": ResidentLoop,
}


# ------------------------------------------------------------------- RoundPipe's layers


class Embed(nn.Module):
    """Tokens (B, S) -> hidden states (B, S, D), cosines and sines of positions, and labels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens, self.rotary_emb = model.model.embed_tokens, model.model.rotary_emb

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return hidden, *self.rotary_emb(hidden, positions), labels


class Layer(nn.Module):
    """A decoder layer, causal."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, cos, sin, labels = values
        return self.layer(hidden, position_embeddings=(cos, sin)), cos, sin, labels


class Loss(nn.Module):
    """Last norm, LM head and RoundPipe's compiled loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        from roundpipe.models.function import CompileForCausalLMLoss  # type: ignore[import-not-found]

        self.norm, self.lm_head = model.model.norm, model.lm_head
        self._loss = CompileForCausalLMLoss

    def forward(self, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden, _, _, labels = values
        logits = self.lm_head(self.norm(hidden))
        return self._loss(logits=logits, labels=labels, vocab_size=logits.shape[-1])


def as_sequence(model: Any) -> nn.Sequential:
    """The model as a sequence of modules, each of which takes what the one before returns."""
    return nn.Sequential(Embed(model), *(Layer(layer) for layer in model.model.layers), Loss(model))


# ------------------------------------------------------------------- measuring


def capped(hardware: Hardware, cap_bytes: int) -> Hardware:
    """The GPU as if it had `cap_bytes` of memory at most."""
    total = min(hardware.memory_bytes, cap_bytes)
    return replace(
        hardware, memory_bytes=total, usable_bytes=min(hardware.usable_bytes, total - RESERVE_BYTES)
    )


def hidden_share(plan: rpcompile.Plan, timeline: Timeline) -> float:
    """The share of copying time during which the same GPU computes."""
    spans: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for action in plan.schedule.actions():
        key = action.gpu, action.stream is Stream.COMPUTE
        spans.setdefault(key, []).append((timeline.start_s[action.id], timeline.end_s[action.id]))
    copying = hidden = 0.0
    for gpu in range(plan.gpus):
        busy = sorted(spans.get((gpu, True), []))
        for begin, end in spans.get((gpu, False), []):
            copying += end - begin
            hidden += sum(max(0.0, min(end, to) - max(begin, since)) for since, to in busy)
    return hidden / copying if copying else 1.0


def turn(loop: Any, settings: Settings) -> dict[str, Any]:
    """A run that fills the allocator's caches again, then a timed one."""
    clean_up(settings)
    loop.run()
    synchronize(settings)
    retries = memory_retries(settings)
    started = time.perf_counter()
    loss = loop.run()
    synchronize(settings)
    seconds = time.perf_counter() - started
    found = {
        "seconds": seconds,
        "loss": loss,
        "peak_bytes": memory(settings, "allocated", most=True),
        "peak_reserved_bytes": memory(settings, "reserved", most=True),
        "allocation_retries": memory_retries(settings) - retries,
    }
    clean_up(settings)
    return found


def clean_up(settings: Settings) -> None:
    """Gives cached memory back, for the other loops' processes, and forgets peaks."""
    if settings.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def synchronize(settings: Settings) -> None:
    if settings.device == "cuda":
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def memory(settings: Settings, kind: str, most: bool = False) -> list[int]:
    """Bytes "allocated" or "reserved" on each device, now or at most."""
    if settings.device != "cuda":
        return [0]
    read = getattr(torch.cuda, f"{'max_' if most else ''}memory_{kind}")
    return [read(device) for device in range(torch.cuda.device_count())]


def memory_retries(settings: Settings) -> int:
    """How often the allocator had to give caches back, for which everything waits."""
    if settings.device != "cuda":
        return 0
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.memory_stats(device).get("num_alloc_retries", 0) for device in devices)


# ------------------------------------------------------------------- the process


def machine(settings: Settings) -> dict[str, Any]:
    """What results depend on."""
    cuda = settings.device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(0) if cuda else "none",
        "gpus": torch.cuda.device_count() if cuda else 0,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def cap_memory(settings: Settings) -> None:
    """Makes this process's GPUs what cards with less memory would be, for those who ask, too."""
    if settings.device != "cuda":
        return
    for device in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.cap_bytes / total), device)
    ask = torch.cuda.mem_get_info

    def capped_info(device: Any = None) -> tuple[int, int]:
        # What another loop's process has on a larger card is none of this one's.
        free, total = ask(device)
        mine = settings.cap_bytes - torch.cuda.memory_reserved(device)
        return max(0, min(free, mine)), min(total, settings.cap_bytes)

    torch.cuda.mem_get_info = capped_info


class Server:
    """Does what it is told to: "start" first, then any of the other commands."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop: Any = None

    def answer(self, command: str) -> dict[str, Any]:
        """What was found, or the error."""
        try:
            return {"found": self._do(command)}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _do(self, command: str) -> dict[str, Any]:
        if command == "start":
            cap_memory(self._settings)
            self._loop = LOOPS[self._settings.loop](self._settings)
            return {**machine(self._settings), **self._loop.facts()}
        if command == "turn":
            return turn(self._loop, self._settings)
        return getattr(self._loop, command)()


def main() -> None:
    """Serves until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    server = Server(Settings(**json.loads(sys.argv[1])))
    for command in chain(("start",), map(str.strip, sys.stdin)):
        print(json.dumps(server.answer(command)), file=replies, flush=True)


if __name__ == "__main__":
    main()

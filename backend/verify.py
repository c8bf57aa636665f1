"""Exactness in the loop: sampled live steps are executed again, adapter by adapter, and compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from backend.around import AroundLive
from backend.base import NO_SLOT, StepBatch, StepTiming
from backend.errors import BackendError
from backend.sgmv import sgmv

if TYPE_CHECKING:
    from backend.live import LiveBackend
    from backend.step_inputs import StepInputs


Value = TypeVar("Value")


@dataclass(slots=True)
class Verified:
    """What was compared: steps; rows times linears of all layers, bit for bit; tokens, and logits as |a - b| / |b|."""

    steps: int = 0
    lora_rows: int = 0
    tokens: int = 0
    tokens_that_differ: int = 0
    largest_logit_error: float = 0.0


class VerifyingBackend(AroundLive):
    """A live backend that checks every `every`-th step after it was timed.

    The step is computed again with the requests of one adapter at a time, on the keys and values that it found, and left as
    it was. The LoRA product of each of its rows must have the same bits as with its adapter alone (I9); logits and
    tokens must too where the backend is deterministic, elsewhere they are counted. Raises `BackendError` where bits differ.
    """

    def __init__(self, live: LiveBackend, every: int) -> None:
        super().__init__(live)
        self.every = every
        self.found = Verified()

    def report(self) -> dict[str, object]:
        """`Verified` as plain data."""
        return asdict(self.found)

    def execute(self, batch: StepBatch) -> StepTiming:
        """Run one step and, if it is one's turn, check it; what that takes is in no timing."""
        due = self.live.steps_executed % self.every == 0
        before = self.live.decoder.last_token.clone() if due else None
        timing = self.live.execute(batch)
        if before is not None:
            self._check(batch, before)
        return timing

    @torch.inference_mode()
    def _check(self, batch: StepBatch, before: torch.Tensor) -> None:
        decoder = self.live.decoder
        inputs = self.live.layout(batch)
        self.found.steps += 1
        self._check_lora(inputs)
        samples = sum(batch.samples)
        logits, after = decoder.logits[:samples].clone(), decoder.last_token.clone()
        number: dict[int, int] = {}  # of each sampling request's logits
        for request, sampled in enumerate(batch.samples):
            if sampled:
                number[request] = len(number)
        with self._kept(inputs):
            for slot in sorted(set(batch.slots)):
                mine = [i for i, other in enumerate(batch.slots) if other == slot]
                decoder.last_token.copy_(before)
                alone = self.live.again(_part(batch, mine))
                rows = [number[i] for i in mine if batch.samples[i]]
                self._compare(logits[rows], decoder.logits[: len(rows)], after, alone)
        decoder.last_token.copy_(after)

    def _check_lora(self, inputs: StepInputs) -> None:
        """Every layer's LoRA product of the step's rows, on inputs as its last layer left them."""
        decoder, rows = self.live.decoder, inputs.rows
        slots = torch.from_numpy(inputs.row_slots).to(decoder.device)
        buffers = {
            "qkv": (decoder.normed, decoder.qkv),
            "o": (decoder.heads_out, decoder.attended),
            "gate_up": (decoder.normed, decoder.gate_up),
            "down": (decoder.activated, decoder.attended),
        }
        groups = [torch.nonzero(slots == slot)[:, 0] for slot in sorted(set(inputs.row_slots.tolist()) - {NO_SLOT})]
        calls = [(name, linear) for layer in decoder.bank.layout.layers for name, linear in layer.items()]
        for name, linear in calls:
            x, base = (buffer[:rows].clone() for buffer in buffers[name])
            together = base.clone()
            sgmv(x, together, decoder.bank, linear, decoder.segments.of(slots, decoder.bank))
            for group in groups:
                alone = base[group]
                sgmv(x[group], alone, decoder.bank, linear, decoder.segments.of(slots[group], decoder.bank))
                self.found.lora_rows += len(group)
                if not torch.equal(_bits(alone), _bits(together[group])):
                    raise BackendError(
                        f"verify: step {self.live.steps_executed - 1}: the LoRA product of {name} of slot"
                        f" {int(slots[group[0]])} has other bits in the batch than alone"
                    )

    def _compare(self, logits: torch.Tensor, alone: torch.Tensor, after: torch.Tensor, inputs: StepInputs) -> None:
        if not len(logits):
            return
        places = torch.from_numpy(inputs.sample_to).to(after.device).long()
        error = float((alone.double() - logits.double()).norm() / logits.double().norm())
        differ = int((after[places] != self.live.decoder.last_token[places]).sum())
        self.found.tokens += len(logits)
        self.found.tokens_that_differ += differ
        self.found.largest_logit_error = max(self.found.largest_logit_error, error)
        if self.live.deterministic and (differ or not torch.equal(_bits(logits), _bits(alone))):
            raise BackendError(
                f"verify: step {self.live.steps_executed - 1}: {differ} of {len(logits)} tokens differ from those of their"
                f" adapter's requests alone (logits by {error:.2e}), in deterministic mode"
            )

    @contextmanager
    def _kept(self, inputs: StepInputs) -> Iterator[None]:
        """Put keys and values of the step's rows back as they were."""
        decoder = self.live.decoder
        cells = torch.from_numpy(inputs.kv_slots).to(decoder.device).long()
        size = self.live.limits.block_size
        block, offset = cells // size, cells % size
        caches = [*decoder.k_cache, *decoder.v_cache]
        kept = [cache[block, :, offset] for cache in caches]
        yield
        for cache, values in zip(caches, kept, strict=True):
            cache[block, :, offset] = values


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)


def _part(batch: StepBatch, mine: list[int]) -> StepBatch:
    """The requests `mine` of a step."""

    def of(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(values[i] for i in mine) if values else ()

    return StepBatch(
        of(batch.query_lens),
        of(batch.context_lens),
        of(batch.slots),
        of(batch.samples),
        of(batch.block_tables),
        of(batch.decodes),
    )

"""The requests that wait: in which order admission tries them, and who is preempted when blocks are short.

`fcfs` and `priority` are vLLM's (`v1/core/sched/request_queue.py`). `sjf` and `adapter_aware` stand beside them, each
with an ageing bound: nobody overtakes a request that has waited `ageing_s`, so none starves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from sim.state import RequestState
from workloads.requests import BASE

Key = tuple[float, float, int]


class Waiting(Protocol):
    """A queue of waiting requests and its policy."""

    def add(self, state: RequestState) -> None:
        """A request arrives."""
        ...

    def requeue(self, state: RequestState) -> None:
        """A preempted request comes back."""
        ...

    def remove(self, state: RequestState) -> None:
        """A request leaves: admitted, aborted, or finished by a token that was in flight when it was preempted."""
        ...

    def candidates(self, now_s: float, resident: Container[int]) -> Iterable[RequestState]:
        """The order in which admission tries them; `resident`: the adapters in GPU slots."""
        ...

    def is_barrier(self, state: RequestState, now_s: float) -> bool:
        """Whether nobody behind `state` is admitted while its adapter finds no room."""
        ...

    def victim(self, running: Sequence[RequestState]) -> RequestState:
        """The running request that is preempted when blocks are short."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RequestState]: ...


class _Open:
    """Nobody holds others back, and the latest admitted is preempted first."""

    def is_barrier(self, state: RequestState, now_s: float) -> bool:
        del state, now_s
        return False

    def victim(self, running: Sequence[RequestState]) -> RequestState:
        return running[-1]


class Fcfs(_Open):
    """First come first served; preempted requests go to the front and the latest admitted is preempted first."""

    def __init__(self) -> None:
        self._states: OrderedDict[int, RequestState] = OrderedDict()

    def add(self, state: RequestState) -> None:
        self._states[state.request.request_id] = state

    def requeue(self, state: RequestState) -> None:
        self.add(state)
        self._states.move_to_end(state.request.request_id, last=False)

    def remove(self, state: RequestState) -> None:
        del self._states[state.request.request_id]

    def candidates(self, now_s: float, resident: Container[int]) -> Iterable[RequestState]:
        del now_s, resident
        return self._states.values()

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())


class Sorted(_Open):
    """Smallest `key` first, also among those that come back; the latest admitted is preempted first."""

    def __init__(self, key: Callable[[RequestState], Key]) -> None:
        self._key = key
        self._states: list[RequestState] = []

    def add(self, state: RequestState) -> None:
        insort(self._states, state, key=self._key)

    def requeue(self, state: RequestState) -> None:
        self.add(state)

    def remove(self, state: RequestState) -> None:
        del self._states[bisect_left(self._states, self._key(state), key=self._key)]

    def candidates(self, now_s: float, resident: Container[int]) -> Iterable[RequestState]:
        del now_s, resident
        return self._states

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states)


class Priority(Sorted):
    """Smallest `priority` value first, then arrival (`PriorityRequestQueue`, `Request.__lt__`)."""

    def __init__(self) -> None:
        super().__init__(lambda s: (s.request.priority, s.request.arrival_s, s.request.request_id))

    def victim(self, running: Sequence[RequestState]) -> RequestState:
        # Of equals the first, which has most progress to lose: vLLM compares without the request id here.
        return max(running, key=lambda s: (s.request.priority, s.request.arrival_s))


class AdapterAware(Fcfs):
    """Requests of the base model and of adapters in GPU slots first, then the others; each first come first served."""

    def candidates(self, now_s: float, resident: Container[int]) -> Iterable[RequestState]:
        del now_s
        others = []
        for state in self._states.values():
            if state.adapter == BASE or state.adapter in resident:
                yield state
            else:
                others.append(state)
        yield from others


class Ageing:
    """The order of `inner`, but those that arrived `ageing_s` ago first and overtaken by nobody."""

    def __init__(self, inner: Waiting, ageing_s: float) -> None:
        self._inner = inner
        self._ageing_s = ageing_s
        self.add = inner.add
        self.requeue = inner.requeue
        self.remove = inner.remove
        self.victim = inner.victim

    def candidates(self, now_s: float, resident: Container[int]) -> Iterable[RequestState]:
        aged = [state for state in self._inner if self.is_barrier(state, now_s)]
        yield from sorted(aged, key=lambda s: (s.request.arrival_s, s.request.request_id))
        yield from (s for s in self._inner.candidates(now_s, resident) if not self.is_barrier(s, now_s))

    def is_barrier(self, state: RequestState, now_s: float) -> bool:
        return now_s - state.request.arrival_s >= self._ageing_s

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._inner)


def _work(state: RequestState) -> Key:
    return (
        state.request.prompt_tokens + state.request.output_tokens,
        state.request.arrival_s,
        state.request.request_id,
    )


WAITING: Mapping[str, Callable[[float], Waiting]] = {
    "fcfs": lambda _: Fcfs(),
    "priority": lambda _: Priority(),
    # The outputs' true lengths are known here: what a perfect length predictor could reach.
    "sjf": lambda ageing_s: Ageing(Sorted(_work), ageing_s),
    "adapter_aware": lambda ageing_s: Ageing(AdapterAware(), ageing_s),
}
"""`engine.scheduling_policy` by name; each takes `engine.ageing_s`."""

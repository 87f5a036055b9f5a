"""Data-parallel training: processes forked here on a CPU, or those of `accelerate launch`.

On a machine shared with other work, threads that meet in every matrix product wait for the slower
one all the time; processes that meet once a step do not. Weights lie in shared memory; every
process adds its gradients into its own row of one shared buffer, and the first process takes the
mean and the optimizer's step. Sums are taken in a fixed order, so a run repeats to the bit.
"""

import multiprocessing as mp
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch import Tensor, nn

from serve.errors import Failure
from trainer.parallel import workers as launched

METRICS = 5  # numbers that a process hands back each step

# compute(rank, step, done) -> metrics, after gradients were added to the parameters' .grad
Compute = Callable[[int, int, float], Sequence[float]]


class Team(Protocol):
    """Processes that share the work of a step; the main one writes and reports."""

    count: int
    main: bool

    def step(self, step: int, done: float) -> Tensor:
        """Leave the mean gradient in `.grad`; returns the metrics [count, METRICS]."""

    def agree(self, seconds: float) -> float:
        """The main process's measurement, in all of them."""

    def close(self) -> None:
        """End what was started."""


def make_team(modules: Sequence[nn.Module], compute: Compute, count: int) -> Team:
    """Processes that `accelerate launch` started, or `count` that are forked here."""
    launched().check_whole("backbone")
    return Launched(modules, compute) if launched().count > 1 else Workers(modules, compute, count)


class Launched:
    """The processes of `accelerate launch`: each has the weights, and takes every step itself."""

    def __init__(self, modules: Sequence[nn.Module], compute: Compute) -> None:
        self.processes, self.compute = launched(), compute
        self.count, self.main = self.processes.count, self.processes.main
        self.gradients = flat_gradients(parameters_of(modules))

    def step(self, step: int, done: float) -> Tensor:
        """See `Team`. Raises Failure if a process died."""
        self.gradients.zero_()
        metrics = torch.zeros(self.count, METRICS, dtype=torch.float64)
        rank = self.processes.rank
        metrics[rank] = torch.tensor(list(self.compute(rank, step, done)))
        self.gradients.copy_(self.processes.sum(self.gradients) / self.count)
        return self.processes.sum(metrics.to(self.gradients.device)).cpu()

    def agree(self, seconds: float) -> float:
        """See `Team`: clocks differ, and the schedule must not."""
        return self.processes.sum_values({"seconds": seconds if self.main else 0.0})["seconds"]

    def close(self) -> None:
        """Wait for the slowest."""
        self.processes.wait()


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules, each once."""
    return list(dict.fromkeys(p for m in modules for p in m.parameters()))


def flat_gradients(parameters: Sequence[nn.Parameter], buffer: Tensor | None = None) -> Tensor:
    """One vector (new without `buffer`) that holds all gradients: `.grad` are views of it."""
    if buffer is None:
        buffer = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    place = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad = buffer[place : place + size].view_as(parameter)
        place += size
    return buffer


class Workers:
    """`count` processes which compute gradients of the same shared parameters.

    modules: their parameters are moved to shared memory, and `.grad` of each is a view of a
    shared buffer from then on. With a count of 1 everything happens in the calling process.
    """

    def __init__(self, modules: Sequence[nn.Module], compute: Compute, count: int) -> None:
        self.parameters = parameters_of(modules)
        self.compute, self.count, self.main = compute, count, True
        total = sum(p.numel() for p in self.parameters)
        device = self.parameters[0].device
        self.gradients = torch.zeros(count, total, device=device)
        self.metrics = torch.zeros(count, METRICS, dtype=torch.float64)
        self.processes: list[mp.process.BaseProcess] = []
        self.pipes: list[Connection] = []  # to each process; one that died ends its pipe
        if count > 1:
            for module in modules:
                module.share_memory()
            for tensor in (self.gradients, self.metrics):
                tensor.share_memory_()
            context = mp.get_context("fork")
            for rank in range(1, count):
                mine, theirs = context.Pipe()
                self.pipes.append(mine)
                process = context.Process(target=self._serve, args=(rank, theirs), daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
        self._attach(0)

    def _attach(self, rank: int) -> None:
        flat_gradients(self.parameters, self.gradients[rank])

    def agree(self, seconds: float) -> float:
        """See `Team`: only this process keeps time."""
        return seconds

    def _serve(self, rank: int, pipe: Connection) -> None:
        for pipe_of_main in self.pipes:  # with the last copy of its end a pipe ends
            pipe_of_main.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        self._attach(rank)
        while True:
            try:
                task = pipe.recv()
            except EOFError:  # the main process died
                return
            if task is None:
                return
            self._compute(rank, *task)
            pipe.send(None)

    def _compute(self, rank: int, step: int, done: float) -> None:
        self.gradients[rank].zero_()
        self.metrics[rank] = torch.tensor(list(self.compute(rank, step, done)))

    def step(self, step: int, done: float) -> Tensor:
        """Gradients of one step: the mean over processes is in `.grad`. Returns the metrics
        [count, METRICS]. Raises Failure if a process died."""
        try:
            for pipe in self.pipes:
                pipe.send((step, done))
            self._compute(0, step, done)
            for pipe in self.pipes:
                pipe.recv()
        except (EOFError, ConnectionError):
            raise Failure("a training process died: start again with --resume") from None
        for rank in range(1, self.count):
            self.gradients[0] += self.gradients[rank]
        if self.count > 1:
            self.gradients[0] /= self.count
        return self.metrics

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()

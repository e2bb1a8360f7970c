"""A teacher whose blocks wait in the CPU's memory, each brought to the device just before it runs.

While a block computes, the next one is on its way (on CUDA from pinned memory, on a stream of its own): the device
holds two blocks' weights beside the embedding, the last norm and the head. Measured on no GPU yet; on CPU, where the
device is the same memory, it serves the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.teacher import Teacher


class Prefetch:
    """Brings the blocks' weights to ``device`` in the order in which they run, one ahead, and lets them go behind."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.blocks, self.device = list(blocks), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.home = [{name: self._waiting(p.data) for name, p in block.named_parameters()} for block in self.blocks]
        self.held: dict[int, dict[str, Tensor]] = {}
        """The weights on the device, or on their way, by block."""
        self.arrived: dict[int, Any] = {}
        for number, block in enumerate(self.blocks):
            self._place(number, self.home[number])
            block.register_forward_pre_hook(lambda *_, number=number: self._enter(number))
            block.register_forward_hook(lambda *_, number=number: self._leave(number), always_call=True)

    def _waiting(self, weight: Tensor) -> Tensor:
        return weight.pin_memory() if self.stream is not None else weight

    def _place(self, number: int, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.blocks[number].named_parameters():
            parameter.data = weights[name]

    def _fetch(self, number: int) -> None:
        if number in self.held:
            return
        with torch.cuda.stream(self.stream):  # without one, where the weights are copied is no matter
            self.held[number] = {
                name: torch.empty_like(weight, device=self.device).copy_(weight, non_blocking=True)
                for name, weight in self.home[number].items()
            }
            if self.stream is not None:
                self.arrived[number] = self.stream.record_event()

    def _enter(self, number: int) -> None:
        self._fetch(number)
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.arrived.pop(number))
            for weight in self.held[number].values():
                weight.record_stream(now)  # its memory is not given away before this block has run
        self._place(number, self.held[number])
        self._fetch((number + 1) % len(self.blocks))  # behind the last, the first one for the next batch

    def _leave(self, number: int) -> None:
        self._place(number, self.home[number])
        if len(self.blocks) > 1:
            del self.held[number]


class OffloadedTeacher(Teacher):
    """A frozen model, loaded on CPU, that computes on ``device`` (by default a GPU if there is one)."""

    def __init__(self, model: Any, device: torch.device | None = None) -> None:
        super().__init__(model)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        blocks = model.model.layers
        inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in inside:
                    getattr(module, name).data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.prefetch = Prefetch(blocks, device)
